"""What a client maps is an address space; what it unmaps goes when nobody holds it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from viommu.endpoints.client_memory import ClientMemory
from viommu.endpoints.dma import EndpointDma
from viommu.errors import Access, PeerError, SessionFaulted, TranslationFault
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory import MappedFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
RW = Access.READ | Access.WRITE


class World:
    """Four pages of a client's memory, of which a device may hold some."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.files = MappedFiles()
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, 4 * PAGE)
        self.memory = ClientMemory(self.loop)
        self.faults: list[TranslationFault] = []
        self.dma = EndpointDma(self.memory.mapper, self.memory, self.faults.append, self.loop)
        self.dma.enabled = True

    def map(self, gpa: int, size: int, access: Access = RW, offset: int | None = None) -> None:
        start = gpa if offset is None else offset
        self.memory.map(
            gpa,
            size,
            readable=Access.READ in access,
            writable=Access.WRITE in access,
            file=self.files.get(self.fd, start, size, writable=True),
            offset=start,
        )

    def turn(self) -> None:
        for _ in range(2):
            self.loop.turn(0)

    def close(self) -> None:
        self.faults.clear()
        self.dma.close()
        self.memory.close()
        self.memory._check()
        assert len(self.files) == 0
        os.close(self.fd)
        self.loop.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def test_what_is_mapped_is_reached_where_and_as_it_is_mapped(world: World) -> None:
    world.map(0, PAGE)
    world.map(PAGE, PAGE, Access.READ)
    world.map(1 << 40, PAGE, offset=2 * PAGE)
    assert world.memory.mapper.mappings() == [
        MappingInfo(0, 0, PAGE, RW),
        MappingInfo(PAGE, PAGE, PAGE, Access.READ),
        MappingInfo(1 << 40, 1 << 40, PAGE, RW),
    ]
    world.dma.write(1 << 40, b"far")
    assert os.pread(world.fd, 3, 2 * PAGE) == b"far"
    with pytest.raises(TranslationFault):
        world.dma.write(PAGE - 1, b"no")
    assert world.dma.read(PAGE - 1, 2) == bytes(2)


def test_mapping_the_same_again_changes_nothing(world: World) -> None:
    for _ in range(2):
        world.map(0, PAGE)
    assert len(world.memory.mapper.mappings()) == 1


def test_a_refused_region_is_not_mapped(world: World) -> None:
    world.map(0, 2 * PAGE)
    file = world.files.get(world.fd, 0, PAGE, writable=True)
    with pytest.raises(PeerError):
        world.memory.map(PAGE, PAGE, readable=True, writable=True, file=file)
    file.close()
    assert len(world.memory.mapper.mappings()) == 1


@pytest.mark.parametrize(("gpa", "size"), [(0, PAGE), (PAGE, PAGE), (0, 4 * PAGE), (1 << 40, PAGE)])
def test_only_a_whole_region_is_unmapped(world: World, gpa: int, size: int) -> None:
    world.map(0, 2 * PAGE)
    with pytest.raises(PeerError) as caught:
        world.memory.unmap(gpa, size)
    assert caught.value.errno == errno.ENOENT
    assert len(world.memory.mapper.mappings()) == len(world.memory.regions()) == 1


def test_memory_that_nobody_holds_goes_at_once(world: World) -> None:
    world.map(0, PAGE)
    world.dma.write(0, b"data")
    assert world.memory.unmap(0, PAGE) is None
    assert world.memory.regions() == []
    with pytest.raises(TranslationFault):
        world.dma.read(0, 4)
    assert world.memory.unmap_all() is None


@pytest.mark.parametrize("everything", [False, True])
def test_memory_that_is_held_goes_when_it_is_released(world: World, everything: bool) -> None:
    world.map(0, PAGE)
    world.map(PAGE, PAGE)
    held, other = world.dma.export(0, 8, RW), world.dma.export(PAGE, 8, RW)
    done = world.memory.unmap_all() if everything else world.memory.unmap(0, PAGE)
    assert done is not None
    ended: list[str] = []
    done.then(lambda _: ended.append("unmap"))
    with pytest.raises(SessionFaulted):
        world.dma.export(PAGE, 8, RW)
    world.turn()
    held.write(b"the end.")
    held.release()
    world.turn()
    assert ended == [], "the whole session has to let go"
    assert len(world.memory.regions()) == 2
    other.release()
    world.turn()
    assert ended == ["unmap"]
    assert len(world.memory.regions()) == (0 if everything else 1)
    assert os.pread(world.fd, 8, 0) == b"the end."
    world.map(0, PAGE)
    assert world.dma.read(0, 8) == b"the end."


def test_several_may_wait_for_the_same_release(world: World) -> None:
    world.map(0, PAGE)
    world.map(PAGE, PAGE)
    world.map(2 * PAGE, PAGE)
    held = [world.dma.export(at, 8, RW) for at in (0, PAGE)]
    waiting = [world.memory.unmap(0, PAGE), world.memory.unmap(PAGE, PAGE)]
    assert world.memory.unmap(2 * PAGE, PAGE) is None
    for region in held:
        region.release()
    world.turn()
    assert all(done is not None and done.done for done in waiting)
    assert world.memory.regions() == []


def test_a_client_that_goes_takes_its_memory_with_it(world: World) -> None:
    world.map(0, PAGE)
    held = world.dma.export(0, 8, RW)
    done = world.memory.unmap(0, PAGE)
    assert done is not None
    held.release()  # the device is reset
    world.memory.close()
    assert world.memory.regions() == []
    world.turn()
    assert not done.done, "nobody waits for it"
    world.map(0, PAGE)
    world.dma.write(0, b"next")


@pytest.mark.parametrize("waiting", [False, True])
def test_a_device_that_holds_on_is_told_of(
    world: World, waiting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world.map(0, PAGE)
    held = world.dma.export(0, 8, RW)
    if waiting:
        assert world.memory.unmap(0, PAGE) is not None
        world.map(PAGE, PAGE)
    world.memory.close()
    assert "still holds memory" in caplog.text
    assert world.memory.regions() == []
    held.release()
    world.turn()
    world.map(0, PAGE)
    world.dma.write(0, b"next")


def test_what_the_next_client_unmaps_waits_for_what_is_held_of_its_own(world: World) -> None:
    world.map(0, PAGE)
    held = world.dma.export(0, 8, RW)
    world.memory.close()
    world.map(0, PAGE)
    held.release()  # which the loop has not come to when the next is exported and unmapped
    held = world.dma.export(0, 8, RW)
    done = world.memory.unmap(0, PAGE)
    world.turn()
    assert done is not None
    assert (done.done, len(world.memory.regions())) == (False, 1)
    held.release()
    world.turn()
    assert (done.done, world.memory.regions()) == (True, [])
