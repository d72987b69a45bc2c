"""A PCI device of the host as sysfs shows it: its group, its driver, what it must not use."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Final, NamedTuple

from viommu.domain import ReservedRegion
from viommu.errors import BackendError, UsageError
from viommu.spec.virtio_iommu import ReservedKind

__all__ = ["HostDevice"]

_SYSFS: Final = Path("/sys")
_ADDRESS: Final = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")

# Not enforced by the kernel either: a device may be given other mappings there.
_RELAXABLE: Final = "direct-relaxable"


class HostDevice(NamedTuple):
    """A device by its address, such as ``0000:04:00.0``; ``sysfs`` is another root for tests."""

    address: str
    sysfs: Path = _SYSFS

    @classmethod
    def parse(cls, text: str, sysfs: Path = _SYSFS) -> HostDevice:
        """Return the device written ``0000:04:00.0``.

        Raises:
            UsageError: It is no such address, or this host has no such device.
        """
        if not _ADDRESS.fullmatch(text):
            raise UsageError(f"{text!r} is not a host PCI address: write 0000:04:00.0")
        device = cls(text, sysfs)
        if not device.path.is_dir():
            raise UsageError(f"this host has no PCI device {text}: lspci -D lists them")
        return device

    @property
    def path(self) -> Path:
        """The device's directory in sysfs."""
        return self.sysfs / "bus/pci/devices" / self.address

    @property
    def group(self) -> int:
        """The number of the IOMMU group.

        Raises:
            BackendError: ENODEV, the host's IOMMU is off or doesn't cover the device.
        """
        try:
            return int((self.path / "iommu_group").readlink().name)
        except OSError as error:
            raise BackendError(
                errno.ENODEV,
                f"{self.address} is behind no IOMMU of the host (boot it with intel_iommu=on, "
                "or switch the IOMMU on in the firmware)",
            ) from error

    @property
    def driver(self) -> str | None:
        """The driver that has the device, ``None`` if none has."""
        try:
            return (self.path / "driver").readlink().name
        except OSError:
            return None

    def require_vfio(self) -> None:
        """Check that vfio-pci has the device.

        Raises:
            BackendError: ENODEV, with what to do about it.
        """
        if self.driver != "vfio-pci":
            raise BackendError(
                errno.ENODEV,
                f"{self.address} is driven by {self.driver or 'no driver'}, not by vfio-pci: "
                f"echo vfio-pci > {self.path}/driver_override, unbind it and "
                f"echo {self.address} > {self.sysfs}/bus/pci/drivers_probe",
            )

    @property
    def cdev(self) -> Path | None:
        """The device's own file below ``/dev/vfio/devices``, ``None`` on kernels without."""
        try:
            (entry,) = (self.path / "vfio-dev").iterdir()
        except (OSError, ValueError):
            return None
        # Every kernel has the entry; a number, and so a file, only with VFIO_DEVICE_CDEV.
        return Path("/dev/vfio/devices") / entry.name if (entry / "dev").exists() else None

    def reserved_regions(self) -> list[ReservedRegion]:
        """Return what DMA addresses of this device must not be, for PROBE.

        Raises:
            BackendError: See :attr:`group`, or the list can't be read.
        """
        path = self.sysfs / f"kernel/iommu_groups/{self.group}/reserved_regions"
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise BackendError(error.errno or 0, f"can't read {path}") from error
        regions = []
        for line in lines:
            start, last, kind = line.split()
            if kind != _RELAXABLE:
                regions.append(
                    ReservedRegion(
                        int(start, 16),
                        int(last, 16) + 1,
                        ReservedKind.MSI if kind == "msi" else ReservedKind.RESERVED,
                    )
                )
        return regions
