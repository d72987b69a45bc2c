"""The mapper of a group whose devices the host may take back while a guest uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.mapper import AddMapResult, RemoveMapResult, SwitchingMapper, next_mapper_id
from viommu_backends.host_mapper import NoExports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.events import Event
    from viommu.mapper import MappingInfo, MemoryMapper

__all__ = ["GroupMapper"]


class GroupMapper(NoExports):
    """Passes everything to ``inner``; after :meth:`retire` there is nothing behind it.

    The guest knows of no device that has gone, so its requests go on succeeding, and
    other endpoints of the domain are not disturbed.
    """

    def __init__(self, inner: MemoryMapper) -> None:
        self.inner: MemoryMapper | None = inner
        self._mask = inner.get_mask()
        self._id = next_mapper_id()

    def retire(self) -> None:
        """Have no device any more; what is mapped has been, or will be, removed by the owner."""
        self.inner = None

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Map; see the contract."""
        return AddMapResult.OK if self.inner is None else self.inner.add_map(mapping)

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Unmap; see the contract."""
        if self.inner is None:
            return RemoveMapResult(ok=True)
        return self.inner.remove_map(iova_start, size)

    def get_mask(self) -> int:
        """Return the host IOMMU's page sizes."""
        return self._mask

    def supports_detach(self) -> bool:
        """Return whether the group can leave a domain."""
        return self.inner is None or self.inner.supports_detach()

    def id(self) -> int:
        """Return the number of the address space that the group is in."""
        return self._id if self.inner is None else self.inner.id()

    def join(self, other: MemoryMapper) -> bool:
        """Share the address space of another group; see the contract."""
        if not isinstance(other, GroupMapper) or self.inner is None or other.inner is None:
            return False
        return self.inner.join(other.inner)

    def switch(self, mappings: Iterable[MappingInfo], mates: Iterable[MemoryMapper]) -> bool:
        """Go to another address space in one step, if the host can; see the contract."""
        if self.inner is None:
            return True
        if not isinstance(self.inner, SwitchingMapper):
            return False
        inner = [mate.inner for mate in mates if isinstance(mate, GroupMapper) and mate.inner]
        return self.inner.switch(mappings, inner)

    def reset_domain(self) -> Event | None:
        """Unmap everything, or leave what is shared; see the contract."""
        return None if self.inner is None else self.inner.reset_domain()
