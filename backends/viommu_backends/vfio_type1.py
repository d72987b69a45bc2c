"""The memory mapper of devices behind VFIO type1: one container, one group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.mapper import AddMapResult, MappingInfo, RemoveMapResult, next_mapper_id
from viommu.memory.dma_target import AddressRange, DmaNeeds, require_host_va
from viommu_backends.host_mapper import HostTarget, NoExports

if TYPE_CHECKING:
    from viommu.errors import Access
    from viommu.events import Event
    from viommu.mapper import MemoryMapper
    from viommu_backends.host_map import Piece
    from viommu_backends.type1_container import Type1Container

__all__ = ["Type1Mapper"]


class Type1Mapper(NoExports, HostTarget):
    """Maps guest memory into a container; satisfies :class:`viommu.mapper.MemoryMapper`.

    Register it with a region manager, which must give it host addresses
    (:attr:`needs`): before that, nothing that a guest maps leads anywhere. All
    devices of the group share it. Leaving a domain means unmapping everything,
    so a detached group is blocked.
    """

    needs = DmaNeeds.HOST_VA

    def __init__(self, container: Type1Container) -> None:
        super().__init__(_Type1Space(container))
        self.container = container
        self._id = next_mapper_id()

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Map; see the contract. All pieces of memory that it leads to, or none."""
        return AddMapResult.OK if self.host.add(mapping) else AddMapResult.OVERLAP_FAILURE

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Unmap; see the contract. When it returns no device reaches the memory any more."""
        return RemoveMapResult(ok=self.host.remove(iova_start, iova_start + size) is not None)

    def get_mask(self) -> int:
        """Return the host IOMMU's page sizes."""
        return self.container.info.page_sizes

    def supports_detach(self) -> bool:
        """Return true: unmapping everything is as good."""
        return True

    def id(self) -> int:
        """Return a number no other mapper ever had."""
        return self._id

    def join(self, other: MemoryMapper) -> bool:
        """Return false: a container of its own is what keeps a group apart."""
        del other
        return False

    def reset_domain(self) -> Event | None:
        """Unmap everything; there is never anything to wait for."""
        self.host.clear()
        return None


class _Type1Space:
    """A container as :class:`~viommu_backends.host_map.HostSpace`."""

    def __init__(self, container: Type1Container) -> None:
        self._container = container

    @property
    def page_size(self) -> int:
        """The smallest page."""
        sizes = self._container.info.page_sizes
        return sizes & -sizes

    def map(self, iova: int, piece: Piece, prot: Access) -> None:
        """Map and pin a piece."""
        where = AddressRange(piece.gpa, piece.gpa + piece.size)
        self._container.map(iova, require_host_va(where, piece.va), piece.size, prot)

    def unmap(self, iova: int, size: int) -> None:
        """Remove one entry."""
        self._container.unmap(iova, size)
