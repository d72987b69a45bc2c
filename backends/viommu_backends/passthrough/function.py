"""A device of the host, served to a VMM as it is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.errors import BackendError
from viommu.spec import pci, vfio
from viommu.vfio_user import RegionInfo
from viommu_backends.passthrough.areas import BarAreas
from viommu_backends.passthrough.bars import BarRegions
from viommu_backends.passthrough.config import HostConfig
from viommu_backends.passthrough.irqs import KernelIrqs
from viommu_backends.passthrough.reset import HostReset

if TYPE_CHECKING:
    from viommu.loop import Loop
    from viommu.memory import GuestMemory
    from viommu.memory.regions import RegionManager
    from viommu.vfio_user import IrqInfo, IrqLines
    from viommu_backends.vfio_device import VfioDevice

__all__ = ["PassthroughFunction"]

_log: Final = logging.getLogger(__name__)

_READ_WRITE: Final = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
_DMA_AND_DECODING: Final = pci.COMMAND_IO | pci.COMMAND_MEMORY | pci.COMMAND_MASTER


class PassthroughFunction:
    """Implements :class:`~viommu.vfio_user.served.ServedDevice` over ``device``.

    BARs that can be mapped are handed to the VMM as the device's own file; where the
    guest places them they become regions of ``regions``. They leave it before the
    device stops decoding, moves or is reset, and come back after it has: a host
    IOMMU's entries for them go stale (type1) or are revoked for good (iommufd).

    The device stays the caller's, and is closed after :meth:`close`.

    Raises:
        BackendError: The device can't be read.
    """

    num_regions: Final = vfio.PCI_NUM_REGIONS
    num_irqs: Final = vfio.PCI_NUM_IRQS

    def __init__(
        self, name: str, memory: GuestMemory, device: VfioDevice, regions: RegionManager, loop: Loop
    ) -> None:
        self.name = name
        self.memory = memory
        self._device = device
        self._config = HostConfig(device)
        self._irqs = KernelIrqs(device)
        self.resetting = HostReset(device, loop, self._follow)
        self.areas = BarAreas(device, self._config.msix)
        self.bars = BarRegions(device.name, device.regions, self.areas, regions)
        self._open = True
        self._quiesce()

    def close(self) -> None:
        """Stop the device and let go of it; closing twice is harmless."""
        if not self._open:
            return
        self._open = False
        self.resetting.give_up("it is given back to the host, which resets it")
        self._irqs.leave()
        self._quiesce()
        self.areas.close()

    # ServedDevice.

    def region_info(self, index: int) -> RegionInfo:
        """Describe a BAR or configuration space; there is no ROM and no VGA."""
        if index == vfio.PCI_CONFIG_REGION_INDEX:
            return RegionInfo(self._config.size, _READ_WRITE)
        if index >= vfio.PCI_NUM_BARS or not self._device.regions[index].size:
            return RegionInfo(0, 0)
        host = self._device.regions[index]
        areas = tuple((area.base, area.length) for area in self.areas.of(index))
        if not areas:
            return RegionInfo(host.size, _READ_WRITE)
        whole = areas == ((0, host.size),)
        return RegionInfo(
            host.size,
            _READ_WRITE | vfio.REGION_INFO_FLAG_MMAP,
            self._device.fd,
            host.offset,
            () if whole else areas,
        )

    def irq_info(self, index: int) -> IrqInfo:
        """Describe one kind of interrupt."""
        return self._irqs.info(index)

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read a BAR or configuration space; what the device doesn't answer is all ones."""
        if index == vfio.PCI_CONFIG_REGION_INDEX:
            return self._config.read(offset, count)
        try:
            return self._device.read(index, offset, count)
        except BackendError:  # it doesn't decode, or sleeps: a bus has no errors
            return b"\xff" * count

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write a BAR or configuration space; what the device doesn't take is dropped."""
        if index == vfio.PCI_CONFIG_REGION_INDEX:
            self._write_config(offset, data)
            return
        try:
            self._device.write(index, offset, data)
        except BackendError:  # as in region_read
            return

    def connect(self, irqs: IrqLines) -> None:
        """Serve a VMM that has just come; the kernel signals its eventfds."""
        self.areas.connect()
        self._irqs.follow(irqs)

    def disconnect(self) -> None:
        """Be as after power-on: the VMM has gone."""
        self.areas.disconnect()
        if self._open:
            self._irqs.leave()
            self._quiesce()
            self.resetting.start()

    def reset(self) -> None:
        """Perform a system reset; memory and interrupts stay."""
        self._stop(_DMA_AND_DECODING)
        self.resetting.start()

    # Inside.

    def _write_config(self, offset: int, data: bytes) -> None:
        data, reset = self._config.filter(offset, data)
        if self._config.places_bars(offset, len(data)):
            if self._config.starts_dma(offset, data):
                self.resetting.give_up("its driver does not wait for the host")
            self.bars.keep(self._config.bars(offset, data))
            self._config.write(offset, data)
            self._follow()
        else:
            self._config.write(offset, data)
        if reset:
            self._reset_function()

    def _reset_function(self) -> None:
        """Perform a function level reset.

        It goes on decoding, as the kernel lets it, though PCI says otherwise: a VMM
        that has mapped a BAR doesn't know of this reset, and an access to a BAR that
        isn't decoded would end it (SIGBUS).
        """
        self._stop(pci.COMMAND_MASTER)
        self.resetting.start()

    def _quiesce(self) -> None:
        """Stop the device and forget where its BARs were."""
        self._stop(_DMA_AND_DECODING)
        try:
            self._config.forget_bars()
        except BackendError as error:
            _log.warning("%s", error)

    def _stop(self, forbidden: int) -> None:
        """Take the BARs out of others' reach, and forbid some of what COMMAND allows."""
        self.bars.keep({})
        try:
            self._config.command &= ~forbidden
        except BackendError as error:  # a device that is gone does no DMA either
            _log.warning("%s", error)

    def _follow(self) -> None:
        """Put the BARs where they are now."""
        if self._open and not self.resetting.pending:
            wanted = self._config.bars()
            self.bars.keep(wanted)
            self.bars.add(wanted)
