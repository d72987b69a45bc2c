"""A VMM's memory becomes regions that DMA targets follow; refusals leave nothing half done."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, LaterTarget, RecordingTarget, pages
from viommu.errors import BackendError, PeerError
from viommu.memory import MappedFiles
from viommu.memory.dma_target import DmaNeeds
from viommu.memory.managed import ManagedMemory
from viommu.memory.regions import RegionManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Rig:
    """Managed memory with two targets, one of which wants addresses."""

    def __init__(self, memfd: Callable[..., int]) -> None:
        self.manager = RegionManager()
        self.memory = ManagedMemory(self.manager)
        self.target = RecordingTarget("by file", DmaNeeds.FILE)
        self.other = RecordingTarget("by address", DmaNeeds.HOST_VA)
        self.registrations = [
            self.manager.register(target, target.name, target.needs)
            for target in (self.target, self.other)
        ]
        self.files = MappedFiles()
        self.fd = memfd(64 * PAGE)

    def map(self, gpa: int, size: int, offset: int = 0, *, writable: bool = True) -> None:
        file = self.files.get(self.fd, offset, size, writable=writable)
        try:
            self.memory.map(gpa, size, readable=True, writable=writable, file=file, offset=offset)
        except PeerError:
            file.close()
            raise

    def held(self) -> list[tuple[int, int, int, bool]]:
        """What both targets hold: first page, end, page of the file, writable."""
        found = [
            [
                (e.where.start // PAGE, e.where.end // PAGE, e.file_offset // PAGE, e.writable)
                for _, e in sorted(target.entries.items())
            ]
            for target in (self.target, self.other)
        ]
        assert found[0] == found[1]
        return found[0]

    def close(self) -> None:
        self.memory.close()
        for registration in self.registrations:
            registration.release()
        assert len(self.files) == 0
        assert self.target.violations == self.other.violations == []
        assert self.manager.regions() == []


@pytest.fixture
def rig(memfd: Callable[..., int]) -> Iterator[Rig]:
    rig = Rig(memfd)
    yield rig
    rig.close()


def test_what_a_vmm_maps_is_mapped_for_devices_until_it_is_unmapped(rig: Rig) -> None:
    rig.map(0, 16 * PAGE)
    rig.map(32 * PAGE, 4 * PAGE, 16 * PAGE, writable=False)

    assert rig.held() == [(0, 16, 0, True), (32, 36, 16, False)]
    rig.memory.unmap(0, 16 * PAGE)
    assert rig.held() == [(32, 36, 16, False)]
    rig.memory.unmap_all()
    assert rig.held() == []
    assert rig.memory.regions() == []


def test_devices_and_the_guest_see_the_same_bytes(rig: Rig) -> None:
    rig.map(4 * PAGE, PAGE, 8 * PAGE)
    rig.memory.write(4 * PAGE + 1, b"guest")

    (entry,) = rig.target.entries.values()

    assert entry.file is not None
    assert os.pread(entry.file.fileno(), 5, entry.file_offset + 1) == b"guest"


def test_the_same_map_again_changes_nothing(rig: Rig) -> None:
    rig.map(0, PAGE)
    rig.map(0, PAGE)

    assert rig.held() == [(0, 1, 0, True)]
    rig.memory.unmap(0, PAGE)
    with pytest.raises(PeerError) as caught:
        rig.memory.unmap(0, PAGE)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("gpa", "size"), [(0, PAGE), (PAGE, 2 * PAGE), (0, 4 * PAGE)])
def test_only_exactly_what_was_mapped_can_be_unmapped(rig: Rig, gpa: int, size: int) -> None:
    rig.map(0, 2 * PAGE)

    with pytest.raises(PeerError):
        rig.memory.unmap(gpa, size)

    assert rig.held() == [(0, 2, 0, True)]


def test_what_has_no_file_is_the_guest_s_alone(rig: Rig) -> None:
    rig.memory.map(0, PAGE, readable=True, writable=True, file=None)

    assert rig.held() == []
    assert len(rig.memory.regions()) == 1
    rig.memory.unmap(0, PAGE)
    assert rig.memory.regions() == []


@pytest.mark.parametrize(
    ("gpa", "size", "offset", "held"),
    [
        (0x800, 3 * PAGE, 0x800, [(1, 3, 1, True)]),
        (PAGE, 2 * PAGE + 0x10, 0, [(1, 3, 0, True)]),
        (0x800, 0x800, 0x800, []),
        (0x800, PAGE, 0x800, []),
        (PAGE, PAGE, 0x800, []),
    ],
)
def test_only_whole_pages_are_kept(
    rig: Rig, gpa: int, size: int, offset: int, held: list[tuple[int, int, int, bool]]
) -> None:
    rig.map(gpa, size, offset)

    assert rig.held() == held
    rig.memory.unmap(gpa, size)
    assert rig.held() == []


def test_memory_that_can_not_be_read_is_no_device_s(rig: Rig) -> None:
    file = rig.files.get(rig.fd, 0, PAGE, writable=True)
    rig.memory.map(0, PAGE, readable=False, writable=True, file=file)

    assert rig.held() == []


@pytest.mark.parametrize("target", ["target", "other"])
def test_a_refusal_of_the_host_refuses_the_map_and_leaves_nothing(rig: Rig, target: str) -> None:
    refusing: RecordingTarget = getattr(rig, target)
    refusing.reject = {3}
    rig.map(8 * PAGE, PAGE)

    with pytest.raises(PeerError, match=r"no device can be given .* rejects") as caught:
        rig.map(0, 4 * PAGE)

    assert caught.value.errno == errno.ENOMEM
    assert rig.held() == [(8, 9, 0, True)]
    assert [region.gpa for region in rig.memory.regions()] == [8 * PAGE]
    refusing.reject = set()
    rig.map(0, 4 * PAGE)
    assert rig.held() == [(0, 4, 0, True), (8, 9, 0, True)]


def test_an_overlap_is_refused_before_anybody_is_told(rig: Rig) -> None:
    rig.map(0, 4 * PAGE)
    told = len(rig.target.calls)

    with pytest.raises(PeerError, match="overlaps"):
        rig.map(3 * PAGE, PAGE)

    assert len(rig.target.calls) == told


def test_a_device_s_region_in_the_way_refuses_the_map(rig: Rig) -> None:
    bar = rig.manager.add_region("BAR", pages(2, 4))

    with pytest.raises(PeerError, match="'BAR'"):
        rig.map(0, 4 * PAGE)

    assert rig.memory.regions() == []
    rig.manager.remove_region(bar)


def test_an_unmap_that_the_host_refuses_is_told_and_the_memory_stays_alive(rig: Rig) -> None:
    rig.map(0, PAGE)
    rig.target.refuse = {0}

    with pytest.raises(BackendError, match="refuses"):
        rig.memory.unmap(0, PAGE)

    assert rig.memory.regions() == []
    (entry,) = rig.target.entries.values()
    assert entry.file is not None
    assert os.fstat(entry.file.fileno()).st_size == 64 * PAGE
    rig.target.refuse = set()
    rig.manager.retry()
    assert rig.target.entries == {}


def test_at_the_end_a_refusal_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.map(0, PAGE)
    rig.map(4 * PAGE, PAGE)
    rig.target.refuse = {0}

    rig.memory.unmap_all()

    assert "a device may still reach guest memory" in caplog.text
    assert sorted(rig.target.entries) == [0]
    rig.target.refuse = set()
    rig.manager.retry()


@pytest.mark.parametrize("everything", [True, False])
def test_an_unmap_is_done_when_the_last_device_has_let_go(rig: Rig, everything: bool) -> None:
    targets = [LaterTarget("later", DmaNeeds.NONE), LaterTarget("later still", DmaNeeds.NONE)]
    registrations = [rig.manager.register(each, each.name) for each in targets]
    rig.map(0, 4 * PAGE)
    assert rig.manager.settled() is None

    gone = rig.memory.unmap_all() if everything else rig.memory.unmap(0, 4 * PAGE)
    assert gone is not None
    assert rig.held() == []  # the others have let go at once
    for target in targets:
        assert not gone.done
        assert target.held is not None
        target.held.resolve(None)
    finished = gone.done
    assert finished
    assert rig.manager.settled() is None
    for registration in registrations:
        registration.release()


def test_without_devices_that_answer_later_nothing_is_waited_for(rig: Rig) -> None:
    rig.map(0, 4 * PAGE)

    assert rig.memory.unmap(0, 4 * PAGE) is None
    assert rig.memory.unmap_all() is None
