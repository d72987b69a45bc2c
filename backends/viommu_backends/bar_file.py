"""The file that a device's BARs are in: mapped by address for type1, as dma-buf for iommufd."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.errors import BackendError
from viommu.memory.backing import FileBacking
from viommu.spec import vfio

if TYPE_CHECKING:
    from viommu_backends.vfio_device import VfioDevice

__all__ = ["BarFile"]


class BarFile(FileBacking):
    """A VFIO device's fd as memory; the BARs begin at their regions' offsets.

    The device must stay open until the last use is given back.

    Raises:
        PeerError: The fd can't be duplicated.
    """

    def __init__(self, device: VfioDevice) -> None:
        super().__init__(device.fd)
        self._device = device

    def dma_buf(self, offset: int, size: int) -> int:
        """Return a dma-buf fd, the caller's, for ``[offset, offset + size)`` of the file.

        The kernel revokes what is imported from it, for good, when the device's
        memory is switched off or the device is reset.

        Raises:
            BackendError: EINVAL, that is not inside one BAR; ENOTTY, a kernel before
                6.19.
        """
        for index, region in enumerate(self._device.regions[: vfio.PCI_NUM_BARS]):
            if region.offset <= offset and offset + size <= region.offset + region.size:
                return self._device.export_dma_buf(index, offset - region.offset, size)
        raise BackendError(errno.EINVAL, f"{self._device.name}: no BAR at {offset:#x} (+{size:#x})")
