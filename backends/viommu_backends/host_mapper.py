"""What every mapper of a real device has in common: no exports, memory by subscription."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.errors import BackendError
from viommu.memory.dma_target import MemoryKind
from viommu_backends.host_map import HostMap, Piece

if TYPE_CHECKING:
    from viommu.errors import Access
    from viommu.events import Event
    from viommu.mapper import AddMapResult, MemRegion
    from viommu.memory.backing import FileBacking
    from viommu.memory.dma_target import AddressRange
    from viommu_backends.host_map import HostSpace

__all__ = ["HostTarget", "NoExports"]


class HostTarget:
    """A :class:`~viommu.memory.dma_target.DmaTarget` that feeds a :class:`HostMap`.

    It is told where guest memory is; what of it the host's IOMMU must hold then
    follows from the guest's mappings. A BAR that the host refuses is tolerated
    here, where it is known which mappings lead to it.
    """

    def __init__(self, space: HostSpace) -> None:
        self.host = HostMap(space)

    def map_dma(
        self,
        where: AddressRange,
        /,
        *,
        host_va: int | None,
        mappable: FileBacking | None,
        file_offset: int,
        writable: bool,
        kind: MemoryKind,
    ) -> None:
        """Let mappings that lead to ``where`` reach it; see the contract.

        Raises:
            BackendError: The host refused RAM.
        """
        device = kind is MemoryKind.DEVICE
        self.host.add_memory(
            Piece(where.start, where.size, host_va, mappable, file_offset, writable, device)
        )

    def unmap_dma(self, where: AddressRange, /) -> None:
        """Withdraw whatever leads to ``where``; see the contract.

        Raises:
            BackendError: The host refused; nothing has changed.
        """
        self.host.remove_memory(where.start, where.end)


class NoExports:
    """The part of a mapper that a real device has no use for: it exports nothing to clients."""

    def start_export_session(self) -> Event:
        """Refuse.

        Raises:
            BackendError: Always, with ENOTSUP.
        """
        raise BackendError(errno.ENOTSUP, "an export session with a device of the host")

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Refuse.

        Raises:
            BackendError: Always, with ENOTSUP.
        """
        raise BackendError(errno.ENOTSUP, f"export of {size:#x} bytes at IOVA {iova:#x}")

    def release(self, iova: int, size: int) -> None:
        """Refuse.

        Raises:
            BackendError: Always, with ENOTSUP.
        """
        raise BackendError(errno.ENOTSUP, f"release of {size:#x} bytes at IOVA {iova:#x}")

    def vfio_dma_map(self, iova: int, hva: int, size: int, prot: Access) -> AddMapResult:
        """Refuse: BARs are guest memory to these mappers, and come as pieces of it.

        Raises:
            BackendError: Always, with ENOTSUP.
        """
        raise BackendError(
            errno.ENOTSUP, f"map of host memory {hva:#x} (+{size:#x}, {prot}) at IOVA {iova:#x}"
        )
