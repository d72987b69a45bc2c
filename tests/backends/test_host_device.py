"""sysfs as it looks on a host, in a directory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from viommu.domain import ReservedRegion
from viommu.errors import BackendError, UsageError
from viommu.spec.virtio_iommu import ReservedKind
from viommu_backends.host_device import HostDevice

ADDRESS = "0000:04:00.0"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    device = tmp_path / "bus/pci/devices" / ADDRESS
    group = tmp_path / "kernel/iommu_groups/7"
    driver = tmp_path / "bus/pci/drivers/vfio-pci"
    for directory in (device / "vfio-dev/vfio3", group, driver):
        directory.mkdir(parents=True)
    (device / "vfio-dev/vfio3/dev").write_text("511:3\n")
    (device / "iommu_group").symlink_to(group)
    (device / "driver").symlink_to(driver)
    (group / "reserved_regions").write_text(
        "0x00000000000a0000 0x00000000000bffff direct-relaxable\n"
        "0x00000000fee00000 0x00000000feefffff msi\n"
        "0x000000fd00000000 0x000000ffffffffff reserved\n"
        "0x00000000bf800000 0x00000000bfffffff direct\n"
    )
    return tmp_path


@pytest.fixture
def device(sysfs: Path) -> HostDevice:
    return HostDevice.parse(ADDRESS, sysfs)


def test_what_sysfs_says(device: HostDevice) -> None:
    assert device.group == 7
    assert device.driver == "vfio-pci"
    assert device.cdev == Path("/dev/vfio/devices/vfio3")
    device.require_vfio()


def test_reserved_regions_are_half_open_and_without_what_nobody_enforces(
    device: HostDevice,
) -> None:
    assert device.reserved_regions() == [
        ReservedRegion(0xFEE00000, 0xFEF00000, ReservedKind.MSI),
        ReservedRegion(0xFD00000000, 0x10000000000, ReservedKind.RESERVED),
        ReservedRegion(0xBF800000, 0xC0000000, ReservedKind.RESERVED),
    ]


@pytest.mark.parametrize("text", ["04:00.0", "0000:04:00.8", "0000:04:20.0", "x", ""])
def test_what_is_no_address_is_refused(sysfs: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"0000:04:00\.0"):
        HostDevice.parse(text, sysfs)


def test_a_device_that_is_not_there_is_refused(sysfs: Path) -> None:
    with pytest.raises(UsageError, match=r"0000:05:00\.0"):
        HostDevice.parse("0000:05:00.0", sysfs)


def test_a_device_without_an_iommu_says_what_to_do(sysfs: Path, device: HostDevice) -> None:
    (device.path / "iommu_group").unlink()

    with pytest.raises(BackendError, match="intel_iommu=on") as caught:
        _ = device.group
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("driver", [None, "nvme"])
def test_a_device_that_another_driver_has_says_what_to_do(
    sysfs: Path, device: HostDevice, driver: str | None
) -> None:
    (device.path / "driver").unlink()
    if driver:
        (device.path / "driver").symlink_to(sysfs / "bus/pci/drivers" / driver)

    assert device.driver == driver
    with pytest.raises(BackendError, match="driver_override"):
        device.require_vfio()


def test_a_kernel_without_device_files(device: HostDevice) -> None:
    (device.path / "vfio-dev/vfio3/dev").unlink()
    assert device.cdev is None
    (device.path / "vfio-dev/vfio3").rmdir()
    assert device.cdev is None
    (device.path / "vfio-dev").rmdir()
    assert device.cdev is None


def test_reserved_regions_that_can_not_be_read(sysfs: Path, device: HostDevice) -> None:
    (sysfs / "kernel/iommu_groups/7/reserved_regions").unlink()

    with pytest.raises(BackendError, match="reserved_regions"):
        device.reserved_regions()
