"""A memory mapper that remembers what it holds and can be told to fail."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.basic import DEFAULT_PAGE_SIZES, BasicMemoryMapper
from viommu.errors import BackendError
from viommu.iova import ADDRESS_SPACE_END
from viommu.mapper import AddMapResult, MappingInfo, RemoveMapResult

if TYPE_CHECKING:
    from viommu.events import Event

__all__ = ["FaultyMapper"]


class FaultyMapper(BasicMemoryMapper):
    """A BasicMemoryMapper with a host that refuses when told to, as VFIO may.

    It asserts what its caller owes it by contract, and keeps in ``held`` what it was
    told to hold, apart from the interval map under test.
    """

    def __init__(self, *, detachable: bool = True, page_sizes: int = DEFAULT_PAGE_SIZES) -> None:
        super().__init__(page_sizes=page_sizes)
        self.held: dict[int, MappingInfo] = {}
        self.adds = 0
        self.removes = 0
        self.refusals = 0
        self._granule = page_sizes & -page_sizes
        self._detachable = detachable
        self._reserved: list[tuple[int, int]] = []
        self._refuse: dict[str, tuple[int, int]] = {}

    def fail_add(self, nth: int = 1, number: int = errno.EIO) -> None:
        """Refuse the ``nth`` ``add_map`` from now, once, with errno ``number``."""
        self._refuse["add"] = self.adds + nth, number

    def fail_remove(self, nth: int = 1, number: int = errno.EIO) -> None:
        """Refuse the ``nth`` ``remove_map`` from now, once, with errno ``number``."""
        self._refuse["remove"] = self.removes + nth, number

    def fail_nothing(self) -> None:
        """Take back what is still to be refused."""
        self._refuse.clear()

    def reserve(self, iova: int, size: int) -> None:
        """Keep a range to the host, as a VFIO container does: mapping it is an overlap."""
        self._reserved.append((iova, iova + size))

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Add one mapping, or refuse as told."""
        self._check_range(mapping.iova, mapping.size)
        assert not mapping.gpa & (self._granule - 1)
        self.adds += 1
        self._refuse_if_told("add", self.adds)
        end = mapping.iova + mapping.size
        if any(mapping.iova < high and low < end for low, high in self._reserved):
            return AddMapResult.OVERLAP_FAILURE
        result = super().add_map(mapping)
        if result is AddMapResult.OK:
            self.held[mapping.iova] = mapping
        return result

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Remove mappings, or refuse as told."""
        self._check_range(iova_start, size)
        self.removes += 1
        self._refuse_if_told("remove", self.removes)
        result = super().remove_map(iova_start, size)
        if result.ok:
            end = iova_start + size
            self.held = {i: m for i, m in self.held.items() if not iova_start <= i < end}
        return result

    def supports_detach(self) -> bool:
        """Return what the constructor was told."""
        return self._detachable

    def reset_domain(self) -> Event | None:
        """Remove every mapping."""
        assert self._detachable
        self.held = {}
        return super().reset_domain()

    def _check_range(self, iova: int, size: int) -> None:
        assert size > 0
        assert iova + size <= ADDRESS_SPACE_END
        assert not (iova | size) & (self._granule - 1), f"unaligned: {iova:#x} (+{size:#x})"

    def _refuse_if_told(self, call: str, count: int) -> None:
        due, number = self._refuse.get(call, (0, 0))
        if due == count:
            self.refusals += 1
            raise BackendError(number, f"{call} number {count}")
