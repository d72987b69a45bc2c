"""A host with VFIO devices, in memory: everything below the calls that make an ioctl."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from tests.backends.fake_kernel import FakeContainer, FakeIommufd
from tests.backends.passthrough.fake_device import FakeVfioDevice
from viommu.errors import BackendError
from viommu_backends.host_device import HostDevice
from viommu_backends.passthrough import devices, groups

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

__all__ = ["FakeHost"]


class _Container(FakeContainer):
    """One container with its group, as :class:`Type1Container` opens it."""

    def __init__(self, host: FakeHost, device: HostDevice) -> None:
        super().__init__()
        if device.group in host.busy_groups:
            raise BackendError(errno.EBUSY, f"group {device.group}")
        self._host = host
        self.group = device.group
        self.closed = False
        host.containers.append(self)

    def device_fd(self, device: HostDevice) -> int:
        """Return what stands for the fd; see :meth:`FakeHost.device_of_fd`."""
        self._host.log.append(f"device {device.address}")
        return 0

    def close(self) -> None:
        self.closed = True
        self._host.log.append(f"close container of group {self.group}")


class _Iommufd(FakeIommufd):
    def __init__(self, host: FakeHost) -> None:
        super().__init__(files=host.files)
        if host.no_iommufd:
            raise BackendError(host.no_iommufd, "can't open /dev/iommu")
        self._host = host
        host.contexts.append(self)

    def close(self) -> None:
        self._host.log.append("close iommufd")


class FakeHost:
    """sysfs in ``directory``, and the kernel behind it; :meth:`add` gives it a device."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sysfs = directory
        self.log: list[str] = []
        self.containers: list[_Container] = []
        self.contexts: list[_Iommufd] = []
        self.opened: dict[str, FakeVfioDevice] = {}
        self.busy_groups: set[int] = set()
        self.no_iommufd = 0
        self.files = True
        self.refuse_attach = 0
        monkeypatch.setattr(groups, "Type1Container", lambda device: _Container(self, device))
        monkeypatch.setattr(groups, "VfioDevice", lambda _, address: self._open(address, None))
        monkeypatch.setattr(groups, "open_cdev", self._open_cdev)
        monkeypatch.setattr(devices, "Iommufd", lambda: _Iommufd(self))

    def add(self, address: str, group: int, *, cdev: bool = True, driver: str = "vfio-pci") -> None:
        """Have a device in sysfs."""
        device = self.sysfs / "bus/pci/devices" / address
        iommu_group = self.sysfs / f"kernel/iommu_groups/{group}"
        bound = self.sysfs / "bus/pci/drivers" / driver
        for directory in (device, iommu_group, bound):
            directory.mkdir(parents=True, exist_ok=True)
        if cdev:
            (device / "vfio-dev/vfio0").mkdir(parents=True)
            (device / "vfio-dev/vfio0/dev").write_text("511:0\n")
        (device / "iommu_group").symlink_to(iommu_group)
        (device / "driver").symlink_to(bound)
        regions = "0x00000000fee00000 0x00000000feefffff msi\n"
        (iommu_group / "reserved_regions").write_text(regions)

    def context(self) -> FakeIommufd:
        """Open ``/dev/iommu``."""
        return _Iommufd(self)

    def device(self, address: str) -> HostDevice:
        """Return a device as the command line names it."""
        return HostDevice.parse(address, self.sysfs)

    def _open_cdev(self, device: HostDevice, context: _Iommufd) -> FakeVfioDevice:
        return self._open(device.address, context)

    def _open(self, address: str, context: _Iommufd | None) -> FakeVfioDevice:
        device = self.opened[address] = _Device(self, address, context)
        return device


class _Device(FakeVfioDevice):
    def __init__(self, host: FakeHost, address: str, context: _Iommufd | None) -> None:
        super().__init__(iommufd=context)
        self._host = host
        self.name = address

    def attach(self, number: int) -> int:
        if self._host.refuse_attach:
            raise BackendError(self._host.refuse_attach, "attach")
        return super().attach(number)

    def close(self) -> None:
        if self.fd >= 0:
            self._host.log.append(f"close {self.name}")
        super().close()
