"""A memory mapper too simple to be wrong: a dict from page to page."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from viommu.errors import Access, ExportError, SessionFaulted, TranslationFault
from viommu.mapper import MemRegion

if TYPE_CHECKING:
    from viommu.mapper import MappingInfo

__all__ = ["ModelMapper"]


class ModelMapper:
    """What any :class:`~viommu.mapper.MemoryMapper` must do, page by page and without events.

    Every page of every mapping is an entry, so it is for small ranges only.
    Instead of events it has ``faulted``; results are plain booleans.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        self.pages: dict[int, tuple[int, Access, int]] = {}  # IOVA: GPA, protection, mapping's IOVA
        self.sizes: dict[int, int] = {}
        self.held: Counter[tuple[int, int]] = Counter()
        self.session = False
        self.faulted = False

    def add_map(self, mapping: MappingInfo) -> bool:
        """Return whether the mapping was free and is now there."""
        pages = range(mapping.iova, mapping.iova + mapping.size, self.page)
        if any(iova in self.pages for iova in pages):
            return False
        for iova in pages:
            gpa = mapping.gpa + iova - mapping.iova
            self.pages[iova] = (gpa, mapping.prot, mapping.iova)
        self.sizes[mapping.iova] = mapping.size
        return True

    def remove_map(self, start: int, size: int) -> bool:
        """Return false, and remove nothing, when a mapping would be split."""
        end = start + size
        touched = {
            self.pages[iova][2] for iova in range(start, end, self.page) if iova in self.pages
        }
        if any(iova < start or iova + self.sizes[iova] > end for iova in touched):
            return False
        for first in touched:
            for iova in range(first, first + self.sizes.pop(first), self.page):
                del self.pages[iova]
        if any(iova < end and start < iova + length for iova, length in self.held.elements()):
            self.faulted = True
        return True

    def reset_domain(self) -> None:
        """Remove everything."""
        self.pages.clear()
        self.sizes.clear()
        self.faulted = self.faulted or bool(self.held)

    def start_export_session(self) -> None:
        """Start a session; raises ExportError while something is held."""
        if self.held:
            raise ExportError(f"held: {self.held}")
        self.session = True
        self.faulted = False

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Export byte by byte; raises as the contract says."""
        if not self.session:
            raise ExportError("no session")
        if self.faulted:
            raise SessionFaulted("faulted")
        regions: list[MemRegion] = []
        for address in range(iova, iova + size):
            entry = self.pages.get(address - address % self.page)
            if entry is None:
                raise TranslationFault(address, Access.NONE)
            gpa = entry[0] + address % self.page
            last = regions[-1] if regions else None
            if last and last.gpa + last.len == gpa and last.prot == entry[1]:
                regions[-1] = last._replace(len=last.len + 1)
            else:
                regions.append(MemRegion(gpa, 1, entry[1]))
        self.held[iova, size] += 1
        return regions

    def release(self, iova: int, size: int) -> None:
        """Release one export of exactly this range."""
        if not self.held[iova, size]:
            raise ExportError(f"not held: {iova:#x}, {size:#x}")
        self.held -= Counter({(iova, size): 1})
