from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, cast

import pytest

from tests.backends.passthrough.fake_device import BAR0, BAR2, FakeVfioDevice
from tests.memory.recording import RecordingTarget
from viommu.errors import BackendError
from viommu.memory.dma_target import AddressRange, DmaNeeds, MemoryKind
from viommu.memory.regions import RegionManager
from viommu.pci.layout import BarPlace
from viommu_backends.passthrough.areas import BarAreas
from viommu_backends.passthrough.bars import BarRegions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu_backends.vfio_device import VfioDevice

PAGE = mmap.PAGESIZE
TABLE = BarPlace(0, 0x2000, 0x4000)


class Rig:
    def __init__(self, device: FakeVfioDevice) -> None:
        self.manager = RegionManager()
        self.target = RecordingTarget("peer", DmaNeeds.HOST_VA)
        self.registration = self.manager.register(self.target, "peer", self.target.needs)
        self.areas = BarAreas(cast("VfioDevice", device), [TABLE])
        self.bars = BarRegions(device.name, device.regions, self.areas, self.manager)

    def seen(self) -> dict[int, tuple[int, int, MemoryKind]]:
        """What the peer has: address, to offset in the file, size and kind."""
        return {
            at: (entry.file_offset, entry.where.size, entry.kind)
            for at, entry in self.target.entries.items()
        }

    def close(self) -> None:
        self.bars.keep({})
        self.registration.release()
        assert self.areas.holders() == {}
        self.areas.close()
        assert self.target.violations == []
        assert self.manager.regions() == []


@pytest.fixture
def rig(device: FakeVfioDevice) -> Iterator[Rig]:
    rig = Rig(device)
    yield rig
    rig.close()


def test_a_placed_bar_is_within_reach_of_others(rig: Rig) -> None:
    rig.bars.add({0: 0xFE00_0000, 2: 0x8_0000_0000})

    assert rig.seen() == {
        0xFE00_0000: (0, 0x2000, MemoryKind.DEVICE),
        0xFE00_4000: (0x4000, 0x4000, MemoryKind.DEVICE),
        0x8_0000_0000: (BAR0, BAR2, MemoryKind.DEVICE),
    }
    assert rig.bars.placed == {0: 0xFE00_0000, 2: 0x8_0000_0000}


def test_a_bar_that_moves_is_taken_away_first(rig: Rig) -> None:
    rig.bars.add({0: 0xFE00_0000, 2: 0x8_0000_0000})

    rig.bars.keep({0: 0xFE00_0000, 2: 0x9_0000_0000})
    assert sorted(rig.seen()) == [0xFE00_0000, 0xFE00_4000]
    rig.bars.add({0: 0xFE00_0000, 2: 0x9_0000_0000})

    assert sorted(rig.seen()) == [0xFE00_0000, 0xFE00_4000, 0x9_0000_0000]


def test_what_stays_is_not_touched(rig: Rig) -> None:
    rig.bars.add({2: 0x8_0000_0000})
    calls = len(rig.target.calls)

    rig.bars.keep({2: 0x8_0000_0000})
    rig.bars.add({2: 0x8_0000_0000})

    assert len(rig.target.calls) == calls


def test_a_bar_that_can_not_be_mapped_is_no_region(rig: Rig) -> None:
    rig.bars.add({5: 0xFE10_0000})

    assert rig.bars.placed == {}
    assert rig.manager.regions() == []


@pytest.mark.parametrize(
    ("address", "why"), [(0x8_0000_8000, "overlap"), (0x9_0000_0800, "whole pages")]
)
def test_a_bar_in_an_impossible_place_is_logged_and_left_out(
    rig: Rig, caplog: pytest.LogCaptureFixture, address: int, why: str
) -> None:
    other = rig.manager.add_region("other", AddressRange(0x8_0000_0000, 0x8_0001_0000))

    rig.bars.add({2: address})

    assert why in caplog.text
    assert "no device can reach BAR 2" in caplog.text
    assert rig.bars.placed == {}
    assert rig.areas.holders() == {}
    rig.manager.remove_region(other)


def test_a_device_that_can_not_map_a_bar_does_without(rig: Rig) -> None:
    rig.target.reject = {0x8_0000_0000 // PAGE}

    rig.bars.add({0: 0xFE00_0000, 2: 0x8_0000_0000})

    assert sorted(rig.seen()) == [0xFE00_0000, 0xFE00_4000]
    assert rig.bars.placed == {0: 0xFE00_0000, 2: 0x8_0000_0000}


def test_a_bar_that_a_device_does_not_let_go_of_is_in_use(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.bars.add({2: 0x8_0000_0000})
    rig.target.refuse = {0x8_0000_0000 // PAGE}

    rig.bars.keep({})

    assert "can still reach BAR 2" in caplog.text
    assert rig.bars.placed == {}
    assert rig.areas.holders() == {"2": ["DMA"]}
    calls = len(rig.target.calls)
    rig.bars.add({2: 0x8_0000_0000})
    assert len(rig.target.calls) == calls, "it still has just that"
    rig.target.refuse = set()


def test_a_bar_over_ram_is_hidden_and_comes_back(rig: Rig) -> None:
    ram = rig.manager.add_region("RAM", AddressRange(0, 0x10_0000_0000))
    rig.manager.enable(ram)

    rig.bars.add({2: 0x8_0000_0000})
    assert rig.seen() == {}
    rig.manager.disable(ram)

    assert sorted(rig.seen()) == [0x8_0000_0000]
    rig.manager.remove_region(ram)


def test_a_file_that_is_gone_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BackendError(errno.EIO, "enable")

    monkeypatch.setattr(rig.manager, "enable", refuse)

    rig.bars.add({0: 0xFE00_0000})

    assert rig.bars.placed == {}
