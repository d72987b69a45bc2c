"""A device that knows nothing of IOMMUs, and a driver that must be told of one."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.harness import EchoDevice
from viommu.memory import GuestMemory
from viommu.spec import pci, vfio
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.virtio.behind_iommu import BehindIommu
from viommu.virtio.pci import VirtioPciFunction

LAYOUT: Any = spec.CommonCfg
CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
DISK: Final = (0x1042).to_bytes(2, "little")
VERSION_1, PLATFORM, PACKED = (
    1 << feature for feature in (Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.RING_PACKED)
)


class Device:
    """A device with any features, and the filter between it and a driver."""

    def __init__(self, offered: int, *, disk: bool = False) -> None:
        function = VirtioPciFunction("echo", GuestMemory(), EchoDevice())
        config = function.region_read(CONFIG, 0, 256)
        if disk:
            config = config[: pci.DEVICE_ID] + DISK + config[pci.DEVICE_ID + 2 :]
        self.offered = offered
        self.accepted = 0
        self.select = 0
        self.filter = BehindIommu()
        self.filter.follow(config)

    def write(self, name: str, value: int) -> int:
        """Write a register; return what arrives."""
        field = getattr(LAYOUT, name)
        data = self.filter.passed(0, field.offset, value.to_bytes(field.size, "little"))
        assert len(data) == field.size
        return int.from_bytes(data, "little")

    def read_offered(self) -> int:
        """What the driver takes for the features that are offered."""
        found = 0
        for word in range(2):
            self.write("device_feature_select", word)
            told = (self.offered >> 32 * word & 0xFFFFFFFF).to_bytes(4, "little")
            seen = self.filter.seen(0, LAYOUT.device_feature.offset, told)
            found |= int.from_bytes(seen, "little") << 32 * word
        return found

    def accept(self, features: int) -> int:
        """What the device takes for the features that the driver accepts."""
        found = 0
        for word in range(2):
            self.write("driver_feature_select", word)
            found |= self.write("driver_feature", features >> 32 * word & 0xFFFFFFFF) << 32 * word
        return found


@pytest.mark.parametrize("own", [0b101, 0xFFFFFFFF])
def test_it_is_offered_for_a_device_that_does_not(own: int) -> None:
    device = Device(VERSION_1 | own)

    assert device.read_offered() == VERSION_1 | PLATFORM | own
    assert device.accept(VERSION_1 | PLATFORM | own) == VERSION_1 | own
    assert device.accept(VERSION_1) == VERSION_1


def test_a_device_that_does_is_left_alone() -> None:
    device = Device(VERSION_1 | PLATFORM)

    assert device.read_offered() == VERSION_1 | PLATFORM
    assert device.accept(VERSION_1 | PLATFORM) == VERSION_1 | PLATFORM


def test_what_was_never_asked_is_passed_on() -> None:
    assert Device(VERSION_1).accept(VERSION_1 | PLATFORM) == VERSION_1 | PLATFORM


@pytest.mark.parametrize(("disk", "seen"), [(True, 0), (False, PACKED)])
def test_a_disk_has_no_packed_rings(disk: bool, seen: int) -> None:
    device = Device(VERSION_1 | PACKED, disk=disk)

    assert device.read_offered() == VERSION_1 | PLATFORM | seen


def test_only_whole_words_of_features_are_looked_at() -> None:
    device = Device(VERSION_1)
    device.read_offered()
    device.write("driver_feature_select", 1)

    assert device.filter.passed(0, LAYOUT.driver_feature.offset, b"\x03") == b"\x03"
    assert device.filter.seen(0, LAYOUT.device_feature.offset + 1, bytes(2)) == bytes(2)
    assert device.filter.seen(1, LAYOUT.device_feature.offset, bytes(4)) == bytes(4)
    assert device.filter.seen(0, 0x2000, bytes(4)) == bytes(4)


def test_one_access_may_cover_several_registers() -> None:
    device = Device(VERSION_1)
    select = (1).to_bytes(4, "little")
    device.filter.passed(0, LAYOUT.device_feature_select.offset, select + bytes(4) + select)

    seen = device.filter.seen(0, 0, select + (1).to_bytes(4, "little") + select)
    passed = device.filter.passed(0, 8, select + (3).to_bytes(4, "little"))

    assert seen == select + (3).to_bytes(4, "little") + select
    assert passed == select + (1).to_bytes(4, "little")


def test_words_beyond_the_last_have_no_features() -> None:
    device = Device(VERSION_1)
    device.write("device_feature_select", 0xFFFFFFFF)

    assert device.filter.seen(0, LAYOUT.device_feature.offset, bytes(4)) == bytes(4)


def test_another_device_is_left_alone() -> None:
    between = BehindIommu()
    between.follow(bytes(256))

    assert between.seen(0, 4, bytes(4)) == bytes(4)
    assert between.passed(0, 12, b"\xff" * 4) == b"\xff" * 4


@given(st.lists(st.tuples(st.integers(0, 80), st.binary(min_size=1, max_size=64), st.booleans())))
def test_any_access_comes_out_as_long_as_it_was(
    accesses: list[tuple[int, bytes, bool]],
) -> None:
    between = Device(VERSION_1 | PACKED, disk=True).filter
    for offset, data, written in accesses:
        out = between.passed(0, offset, data) if written else between.seen(0, offset, data)
        assert len(out) == len(data)
