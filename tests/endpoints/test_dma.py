"""The bus-master port: sessions, pinned views, faults."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest

from viommu.basic import BasicMemoryMapper
from viommu.endpoints.dma import EndpointDma
from viommu.errors import Access, GuestMemoryError, SessionFaulted, TranslationFault
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec.virtio_iommu import FaultReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.export import ExportedRegion

PAGE = mmap.PAGESIZE
RW = Access.READ | Access.WRITE


class World:
    """A port on four pages of memory; IOVA page 0 is memory page 1, IOVA page 1 is nothing."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.memory = GuestMemory()
        fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4 * PAGE)
        file = MappedFiles().get(fd, 0, 4 * PAGE, writable=True)
        os.close(fd)
        self.memory.map(0, 4 * PAGE, readable=True, writable=True, file=file)
        self.mapper = BasicMemoryMapper()
        self.mapper.add_map(MappingInfo(0, PAGE, PAGE, RW))
        self.mapper.add_map(MappingInfo(PAGE, 0x900000, PAGE, RW))
        self.faults: list[TranslationFault] = []
        self.dma = EndpointDma(self.mapper, self.memory, self.faults.append, self.loop)
        self.dma.enabled = True


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.dma.close()
    world.memory.close()
    world.faults.clear()  # an exception keeps the frames it went through
    world.loop.close()


def test_nothing_goes_anywhere(world: World) -> None:
    assert world.dma.read(1 << 60, 0) == b""
    world.dma.write(1 << 60, b"")

    assert not world.faults
    assert world.mapper.exports.total == 0


def test_data_goes_where_it_is_mapped(world: World) -> None:
    world.dma.write(8, b"hello")

    assert world.memory.read(PAGE + 8, 5) == b"hello"
    assert world.dma.read(8, 5) == b"hello"
    assert world.mapper.exports.total == 0
    assert world.faults == []


def test_an_access_past_the_last_address_blames_its_first(world: World) -> None:
    last = 2**64 - PAGE
    world.mapper.add_map(MappingInfo(last, PAGE, PAGE, RW))
    assert len(world.dma.read(last, PAGE)) == PAGE

    with pytest.raises(TranslationFault):
        world.dma.read(2**64 - 8, 16)

    assert [fault.iova for fault in world.faults] == [2**64 - 8]


def test_a_blocked_access_is_reported_once_and_raised(world: World) -> None:
    with pytest.raises(TranslationFault):
        world.dma.write(0x5000, b"x")

    (fault,) = world.faults
    assert (fault.iova, fault.access) == (0x5000, Access.WRITE)
    assert world.dma.blocked == 1


def test_mapped_but_no_memory_is_no_fault_of_the_iommu(world: World) -> None:
    with pytest.raises(GuestMemoryError):
        world.dma.read(PAGE, 4)
    with pytest.raises(GuestMemoryError):
        world.dma.views(PAGE, 4, write=True)

    assert world.faults == []
    assert world.mapper.exports.total == 0


def test_without_bus_mastering_nothing_leaves_the_device(world: World) -> None:
    world.dma.enabled = False

    with pytest.raises(TranslationFault) as caught:
        world.dma.read(0, 4)

    assert caught.value.reason == FaultReason.UNKNOWN
    assert world.faults == []


def test_views_stay_pinned_and_are_given_again_for_nothing(world: World) -> None:
    first = world.dma.views(0, 16, write=True)
    second = world.dma.views(0, 16, write=True)

    first[0][0] = 7
    assert second[0][0] == 7
    assert world.mapper.exports.total == 1


def test_turning_bus_mastering_off_drops_the_views(world: World) -> None:
    world.dma.views(0, 16, write=False)
    generation = world.dma.generation

    world.dma.enabled = False

    assert world.dma.generation != generation
    assert world.mapper.exports.total == 0


def test_generation_follows_memory(world: World) -> None:
    generation = world.dma.generation

    world.memory.map(1 << 32, PAGE, readable=True, writable=True, file=None)

    assert world.dma.generation != generation


def test_pinned_views_let_an_unmap_through_at_the_next_turn(world: World) -> None:
    world.dma.views(0, 16, write=False)
    generation = world.dma.generation

    _, resolution = world.mapper.remove_map(0, PAGE)
    assert resolution is not None
    assert not resolution.is_set()
    world.loop.turn(0)

    assert resolution.is_set()
    assert world.dma.generation != generation
    with pytest.raises(TranslationFault):
        world.dma.views(0, 16, write=False)


def test_a_fault_that_the_loop_has_not_seen_yet_is_handled_by_the_next_access(world: World) -> None:
    world.dma.views(0, 16, write=False)
    _, resolution = world.mapper.remove_map(0, PAGE)
    world.mapper.add_map(MappingInfo(0, 2 * PAGE, PAGE, RW))

    world.dma.write(0, b"new")

    assert resolution is not None
    assert resolution.is_set()
    assert world.memory.read(2 * PAGE, 3) == b"new"
    world.loop.turn(0)


def test_a_transfer_that_goes_on_keeps_the_unmap_waiting(world: World) -> None:
    seen: list[ExportedRegion] = []
    region = world.dma.export(0, 8, Access.WRITE)
    world.dma.on_fault(lambda: seen.append(region))

    _, resolution = world.mapper.remove_map(0, PAGE)
    world.loop.turn(0)
    assert resolution is not None
    assert seen == [region]
    assert not resolution.is_set()
    with pytest.raises(SessionFaulted):
        world.dma.export(0, 4, Access.READ)
    # To a ring it is memory that can't be reached, and no other error.
    for access in (
        lambda: world.dma.read(0, 4),
        lambda: world.dma.write(0, b"late"),
        lambda: world.dma.views(0, 4, write=False),
    ):
        with pytest.raises(GuestMemoryError, match="can't be exported: 1 exports"):
            access()

    region.release()
    assert resolution.is_set()
    with pytest.raises(TranslationFault):
        world.dma.read(0, 4)


def test_who_leaves_lets_another_session_begin(world: World) -> None:
    world.dma.views(0, 16, write=True)

    world.dma.leave()

    assert world.mapper.exports.total == 0
    world.mapper.start_export_session().close()
    assert world.dma.read(0, 4) == bytes(4)


def test_closing_releases_and_forgets(world: World) -> None:
    world.dma.views(0, 16, write=False)

    world.dma.close()
    world.dma.close()

    assert world.mapper.exports.total == 0
    with pytest.raises(TranslationFault):
        world.dma.read(0, 1)
