"""The memory mapper of endpoints that are emulated in software (half-open ranges)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from viommu.errors import BackendError, UsageError
from viommu.export import DEFAULT_MAX_EXPORTS, ExportLedger
from viommu.iova import ADDRESS_SPACE_END, AddressMap, IntervalMap
from viommu.mapper import (
    AddMapResult,
    MappingInfo,
    MemRegion,
    RemoveMapResult,
    next_mapper_id,
)

if TYPE_CHECKING:
    from viommu.errors import Access
    from viommu.events import Event
    from viommu.mapper import MemoryMapper

__all__ = ["DEFAULT_PAGE_SIZES", "BasicMemoryMapper"]

# 4 KiB, 2 MiB and 1 GiB. With ~0xfff Linux cuts a run that is no power of two into
# several MAPs; with these three it sends one.
DEFAULT_PAGE_SIZES: Final = 0x40201000


class BasicMemoryMapper:
    """Translations kept in this process; satisfies :class:`viommu.mapper.MemoryMapper`.

    ``page_sizes`` has one bit for each page size. ``max_exports`` bounds how many
    ranges a client may hold.

    Raises:
        UsageError: ``page_sizes`` has no bit set.
    """

    def __init__(
        self, *, page_sizes: int = DEFAULT_PAGE_SIZES, max_exports: int = DEFAULT_MAX_EXPORTS
    ) -> None:
        if page_sizes <= 0:
            raise UsageError(f"page_sizes must have a bit set, not {page_sizes:#x}")
        self.exports = ExportLedger(max_exports)
        self._page_sizes = page_sizes
        self._map: AddressMap = IntervalMap()
        self._id = next_mapper_id()

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Add one mapping; see :meth:`viommu.mapper.MemoryMapper.add_map`."""
        return AddMapResult.OK if self._map.add(mapping) else AddMapResult.OVERLAP_FAILURE

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Remove mappings; see :meth:`viommu.mapper.MemoryMapper.remove_map`."""
        end = iova_start + size
        if self._map.remove(iova_start, end) is None:
            return RemoveMapResult(ok=False)
        return RemoveMapResult(ok=True, resolution=self.exports.revoke(iova_start, end))

    def get_mask(self) -> int:
        """Return the page sizes."""
        return self._page_sizes

    def supports_detach(self) -> bool:
        """Return true: software lets go of anything."""
        return True

    def id(self) -> int:
        """Return a number no other mapper ever had."""
        return self._id

    def join(self, other: MemoryMapper) -> bool:
        """Return false: each endpoint has export sessions, and so a map, of its own."""
        del other
        return False

    def reset_domain(self) -> Event | None:
        """Remove every mapping; see :meth:`viommu.mapper.MemoryMapper.reset_domain`."""
        self._map.clear()
        return self.exports.revoke(0, ADDRESS_SPACE_END)

    def start_export_session(self) -> Event:
        """Start a session; see :meth:`viommu.mapper.MemoryMapper.start_export_session`."""
        return self.exports.start()

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Export a range; see :meth:`viommu.mapper.MemoryMapper.export`."""
        self.exports.check_export()
        if size <= 0 or iova < 0:
            raise UsageError(f"export of {size} bytes at {iova:#x}")
        regions: list[MemRegion] = []
        for _, gpa, length, prot in self._map.pieces(iova, iova + size):
            if regions:
                last = regions[-1]
                if last.gpa + last.len == gpa and last.prot == prot:
                    regions[-1] = MemRegion(last.gpa, last.len + length, prot)
                    continue
            regions.append(MemRegion(gpa, length, prot))
        self.exports.add(iova, size)
        return regions

    def release(self, iova: int, size: int) -> None:
        """Release one export; see :meth:`viommu.mapper.MemoryMapper.release`."""
        self.exports.release(iova, size)

    def vfio_dma_map(self, iova: int, hva: int, size: int, prot: Access) -> AddMapResult:
        """Refuse: this mapper deals in guest memory only.

        Raises:
            BackendError: Always, with ENOTSUP.
        """
        raise BackendError(
            errno.ENOTSUP, f"map of host memory {hva:#x} (+{size:#x}, {prot}) at IOVA {iova:#x}"
        )

    def find(self, iova: int) -> MappingInfo | None:
        """Return the mapping that holds ``iova``, or ``None``."""
        return self._map.find(iova)

    def count(self, iova: int, size: int) -> int:
        """Return how many mappings an export of this range would look at."""
        return self._map.count(iova, iova + size)

    def mappings(self) -> list[MappingInfo]:
        """Return every mapping by rising IOVA (for inspection)."""
        return list(self._map)

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken."""
        if isinstance(self._map, IntervalMap):
            self._map._check()  # noqa: SLF001 - the invariants of our own part
        self.exports._check()  # noqa: SLF001 - likewise
