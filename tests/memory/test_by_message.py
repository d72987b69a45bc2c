"""Memory of which some is behind a port: one file for [0, 2) pages, none for [2, 4), one again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.rig import Port
from viommu.errors import GuestMemoryError, NotMappable
from viommu.memory import GuestMemory, MappedFiles, MessageMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
WITHOUT = range(2 * PAGE, 4 * PAGE)
END = 6 * PAGE
READ_ONLY = 8 * PAGE
LOCKED = 9 * PAGE


class World:
    """All of the guest's memory, and what a device reaches of it."""

    def __init__(self, files: MappedFiles, fd: int) -> None:
        self.guest = GuestMemory()
        self.add(self.guest, files, fd, 0, 16 * PAGE)
        self.port = Port(self.guest)
        self.memory = MessageMemory()
        self.memory.port = self.port
        self.add(self.memory, files, fd, 0, 2 * PAGE)
        self.memory.map(2 * PAGE, 2 * PAGE, readable=True, writable=True, file=None)
        self.add(self.memory, files, fd, 4 * PAGE, 2 * PAGE)
        self.memory.map(READ_ONLY, PAGE, readable=True, writable=False, file=None)
        self.memory.map(LOCKED, PAGE, readable=False, writable=True, file=None)

    def add(self, memory: GuestMemory, files: MappedFiles, fd: int, gpa: int, size: int) -> None:
        file = files.get(fd, gpa, size, writable=True)
        memory.map(gpa, size, readable=True, writable=True, file=file, offset=gpa)


@pytest.fixture
def world(files: MappedFiles, memfd: Callable[..., int]) -> Iterator[World]:
    world = World(files, memfd())
    world.guest.write(0, os.urandom(16 * PAGE))
    yield world
    world.memory.close()
    world.guest.close()
    assert len(files) == 0


RANGES = [
    pytest.param(100, 50, id="shared"),
    pytest.param(PAGE, PAGE, id="up to the border"),
    pytest.param(WITHOUT.start, 8, id="behind the port"),
    pytest.param(WITHOUT.start - 8, 16, id="into it"),
    pytest.param(WITHOUT.stop - 8, 16, id="out of it"),
    pytest.param(8, END - 16, id="through it"),
    pytest.param(0, END, id="everything"),
    pytest.param(WITHOUT.start + 4, 0, id="nothing"),
]


@pytest.mark.parametrize(("gpa", "size"), RANGES)
def test_memory_is_read_and_written_wherever_it_is(world: World, gpa: int, size: int) -> None:
    assert world.memory.read(gpa, size) == world.guest.read(gpa, size)
    before, data = world.guest.read(0, END), os.urandom(size)
    world.memory.write(gpa, data)
    assert world.guest.read(0, END) == before[:gpa] + data + before[gpa + size :]


@pytest.mark.parametrize(("gpa", "size"), RANGES)
@pytest.mark.parametrize("write", [False, True])
def test_only_what_is_shared_has_views(world: World, gpa: int, size: int, write: bool) -> None:
    if gpa < WITHOUT.stop and WITHOUT.start < gpa + size and size:
        with pytest.raises(NotMappable):
            world.memory.views(gpa, size, write=write)
    else:
        views = world.memory.views(gpa, size, write=write)
        assert b"".join(views) == world.guest.read(gpa, size)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (END - 4, 8),
        (END, 1),
        (WITHOUT.start, END),
        (READ_ONLY, PAGE + 1),
        (1 << 63, 8),
        (4, -1),
        (WITHOUT.start, -1),
    ],
)
def test_what_is_no_memory_is_no_memory(world: World, gpa: int, size: int) -> None:
    with pytest.raises(GuestMemoryError):
        world.memory.read(gpa, size)
    with pytest.raises(GuestMemoryError) as caught:
        world.memory.views(gpa, size, write=False)
    assert not isinstance(caught.value, NotMappable)


def test_nothing_is_written_when_some_of_it_is_no_memory(world: World) -> None:
    before = world.guest.read(0, END)
    with pytest.raises(GuestMemoryError, match="no memory at 0x6000"):
        world.memory.write(WITHOUT.start, bytes(END))
    assert world.guest.read(0, END) == before
    assert world.port.written == []


def test_protection_holds_behind_the_port_too(world: World) -> None:
    assert world.memory.read(READ_ONLY, 8) == world.guest.read(READ_ONLY, 8)
    with pytest.raises(GuestMemoryError, match="not writable"):
        world.memory.write(READ_ONLY, b"no")
    with pytest.raises(GuestMemoryError, match="not writable"):
        world.memory.views(READ_ONLY, 8, write=True)
    world.memory.write(LOCKED, b"yes")
    with pytest.raises(GuestMemoryError, match="not readable"):
        world.memory.read(LOCKED, 3)
    assert world.port.written == [LOCKED]


def test_what_the_port_refuses_is_an_error(world: World) -> None:
    world.port.refused = range(3 * PAGE, 4 * PAGE)
    assert world.memory.read(WITHOUT.start, PAGE) == world.guest.read(WITHOUT.start, PAGE)
    with pytest.raises(GuestMemoryError, match="the VMM refuses"):
        world.memory.read(WITHOUT.start, 2 * PAGE)
    with pytest.raises(GuestMemoryError, match="the VMM refuses"):
        world.memory.write(3 * PAGE, b"data")


def test_without_a_port_it_is_memory_like_any_other(world: World) -> None:
    world.memory.port = None
    world.memory.write(8, b"data")
    assert world.guest.read(8, 4) == b"data"
    for touch in (
        lambda: world.memory.read(WITHOUT.start, 8),
        lambda: world.memory.write(WITHOUT.start, b"data"),
        lambda: world.memory.views(WITHOUT.start, 8, write=False),
    ):
        with pytest.raises(GuestMemoryError, match="without a file descriptor") as caught:
            touch()
        assert not isinstance(caught.value, NotMappable)
