"""What sysfs says of a device, on a kernel with a real IOMMU."""

from __future__ import annotations

import errno
import stat

import pytest

from guest_tests.guest import pci
from guest_tests.l1.function import host_device
from guest_tests.l1.layout import (
    EDU,
    GROUPED_EDU,
    MACHINES,
    MSI_WINDOW,
    NVME,
    OTHER_EDU,
    OTHER_GROUPED_EDU,
)
from viommu.domain import ReservedRegion
from viommu.errors import BackendError, UsageError
from viommu.spec.virtio_iommu import ReservedKind
from viommu_backends.host_device import HostDevice


def test_devices_that_the_iommu_can_tell_apart_have_groups_of_their_own() -> None:
    groups = {bdf: host_device(bdf).group for bdf in (EDU, OTHER_EDU, GROUPED_EDU)}

    assert len(set(groups.values())) == 3, groups
    assert host_device(OTHER_GROUPED_EDU).group == groups[GROUPED_EDU]


def test_the_reserved_region_is_where_interrupts_are_written() -> None:
    assert host_device(EDU).reserved_regions() == [ReservedRegion(*MSI_WINDOW, ReservedKind.MSI)]


def test_only_vfio_pci_will_do() -> None:
    pci.unbind(NVME)
    device = HostDevice.parse(f"0000:{NVME}")
    with pytest.raises(BackendError, match=f"0000:{NVME} is driven by no driver") as raised:
        device.require_vfio()
    assert raised.value.errno == errno.ENODEV

    pci.bind(NVME, "vfio-pci")

    assert device.driver == "vfio-pci"
    device.require_vfio()


def test_a_device_has_a_file_of_its_own_where_there_is_iommufd(machine: str) -> None:
    cdev = host_device(EDU).cdev

    if "iommufd" in MACHINES[machine].backends:
        assert cdev is not None
        assert cdev.name.startswith("vfio")
        assert stat.S_ISCHR(cdev.stat().st_mode)
    else:
        assert cdev is None


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"this host has no PCI device 0000:00:1d\.7"):
        HostDevice.parse("0000:00:1d.7")


def test_a_device_behind_no_iommu_has_no_group() -> None:
    device = HostDevice("0000:00:1d.7")
    with pytest.raises(BackendError, match="behind no IOMMU of the host") as raised:
        _ = device.group
    assert raised.value.errno == errno.ENODEV
