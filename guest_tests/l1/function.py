"""A PCI function in our hands, through :class:`viommu_backends.vfio_device.VfioDevice`."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from guest_tests.guest import pci
from viommu.spec import vfio
from viommu_backends.host_device import HostDevice

if TYPE_CHECKING:
    from viommu_backends.vfio_device import VfioDevice

__all__ = ["Function", "host_device"]

_COMMAND: Final = 4  # in configuration space
_COMMAND_MEMORY: Final = 2
_COMMAND_MASTER: Final = 4


def host_device(bdf: str) -> HostDevice:
    """Return the function at ``bdf`` (``00:03.0``), given to vfio-pci."""
    pci.bind(bdf, "vfio-pci")
    return HostDevice.parse(f"0000:{bdf}")


class Function:
    """A function that decodes its BARs, and one of them mapped: what a driver needs.

    It must be closed before its device. Registers are touched by one load or store
    of the width of their view.
    """

    def __init__(self, device: VfioDevice, bar: int = 0) -> None:
        self.device = device
        region = device.regions[bar]
        self._bar = mmap.mmap(device.fd, region.size, offset=region.offset)
        self.bytes = memoryview(self._bar)
        self.registers32 = self.bytes.cast("I")
        self.registers64 = self.bytes.cast("Q")

    def enable(self, *, memory: bool = True, master: bool = True) -> None:
        """Have it decode its BARs if ``memory``, and do DMA if ``master``."""
        command = (_COMMAND_MEMORY if memory else 0) | (_COMMAND_MASTER if master else 0)
        self.device.write(vfio.PCI_CONFIG_REGION_INDEX, _COMMAND, command.to_bytes(2, "little"))

    def config(self, offset: int, size: int) -> int:
        """Read its configuration space."""
        data = self.device.read(vfio.PCI_CONFIG_REGION_INDEX, offset, size)
        return int.from_bytes(data, "little")

    def close(self) -> None:
        """Unmap the BAR; the device stays as it is."""
        self.registers32.release()
        self.registers64.release()
        self.bytes.release()
        self._bar.close()
