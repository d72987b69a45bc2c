"""The interval map of one address space (half-open ranges in the whole of ``[0, 2**64)``).

:class:`IntervalMap` keeps disjoint mappings ordered by their start: a
``SortedList`` of starts beside a dict from start to mapping, which measured
faster than a ``SortedDict``. Users depend on :class:`AddressMap` only, so that
a faster structure can take its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from sortedcontainers import SortedList

from viommu.errors import Access, InternalError, TranslationFault, UsageError
from viommu.mapper import MappingInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ADDRESS_SPACE_END", "AddressMap", "IntervalMap"]

ADDRESS_SPACE_END: Final = 1 << 64


class AddressMap(Protocol):
    """What a domain and a mapper need of an interval map."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[MappingInfo]: ...
    def add(self, mapping: MappingInfo) -> bool:
        """Add a mapping; false, and no change, when it overlaps another."""

    def find(self, iova: int) -> MappingInfo | None:
        """Return the mapping that holds ``iova``."""

    def overlapping(self, start: int, end: int) -> list[MappingInfo]:
        """Return the mappings that touch ``[start, end)``, in order."""

    def count(self, start: int, end: int) -> int:
        """Return how many mappings touch ``[start, end)``."""

    def remove(self, start: int, end: int) -> list[MappingInfo] | None:
        """Remove and return the mappings inside ``[start, end)``; ``None``: it would split one."""

    def pieces(self, start: int, end: int) -> Iterator[MappingInfo]:
        """Yield ``[start, end)`` piece by piece as it is mapped."""

    def clear(self) -> None:
        """Remove everything."""


class IntervalMap:
    """Disjoint mappings ordered by IOVA.

    >>> space = IntervalMap()
    >>> space.add(MappingInfo(0x1000, 0x8000, 0x1000, Access.READ))
    True
    >>> space.find(0x1fff).gpa == 0x8000
    True
    >>> space.add(MappingInfo(0x1800, 0, 0x1000, Access.READ))
    False
    """

    def __init__(self) -> None:
        self._starts: SortedList[int] = SortedList()
        self._mappings: dict[int, MappingInfo] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def __iter__(self) -> Iterator[MappingInfo]:
        """Yield every mapping by rising IOVA; the map must not change meanwhile."""
        mappings = self._mappings
        return (mappings[start] for start in self._starts)

    def add(self, mapping: MappingInfo) -> bool:
        """Add a mapping; return false, and change nothing, when it overlaps another.

        Runtime complexity: `O(log(n))`.

        Raises:
            UsageError: It is empty, or passes the end of the IOVA or GPA space.
        """
        iova, gpa, size, _ = mapping
        end = iova + size
        if (
            size <= 0
            or iova < 0
            or gpa < 0
            or end > ADDRESS_SPACE_END
            or gpa + size > ADDRESS_SPACE_END
        ):
            raise UsageError(f"mapping outside the address space: {mapping}")
        # Of all mappings that start before our end only the last can reach us.
        for start in self._starts.irange(None, end, (True, False), reverse=True):
            if start + self._mappings[start].size > iova:
                return False
            break
        self._starts.add(iova)
        self._mappings[iova] = mapping
        return True

    def find(self, iova: int) -> MappingInfo | None:
        """Return the mapping that holds ``iova``, or ``None``.

        Runtime complexity: `O(log(n))`.
        """
        for start in self._starts.irange(None, iova, reverse=True):
            mapping = self._mappings[start]
            return mapping if iova < start + mapping.size else None
        return None

    def overlapping(self, start: int, end: int) -> list[MappingInfo]:
        """Return the mappings that touch ``[start, end)``, in order.

        Runtime complexity: `O(log(n) + k)`, ``k`` mappings returned.
        """
        first = self.find(start)
        low = start if first is None else first.iova
        mappings = self._mappings
        return [mappings[s] for s in self._starts.irange(low, end, (True, False))]

    def count(self, start: int, end: int) -> int:
        """Return how many mappings touch ``[start, end)``. Runtime complexity: `O(log(n))`."""
        first = self.find(start)
        low = start if first is None else first.iova
        return self._starts.bisect_left(end) - self._starts.bisect_left(low)

    def remove(self, start: int, end: int) -> list[MappingInfo] | None:
        """Remove the mappings inside ``[start, end)`` and return them, in order.

        Gaps are fine. ``None``, and no change, when an edge of the range lies
        strictly inside a mapping. Runtime complexity: `O(log(n) + k)`, ``k``
        mappings removed.
        """
        mappings = self._mappings
        exact = mappings.get(start)
        if exact is not None and start + exact.size == end:
            # What a driver nearly always does.
            self._starts.remove(start)
            del mappings[start]
            return [exact]
        removed = self.overlapping(start, end)
        if removed and (removed[0].iova < start or removed[-1].iova + removed[-1].size > end):
            return None
        if removed:
            # All of them at once: a slice costs far less than as many lookups.
            first = self._starts.bisect_left(removed[0].iova)
            del self._starts[first : first + len(removed)]
        for mapping in removed:
            del mappings[mapping.iova]
        return removed

    def pieces(self, start: int, end: int) -> Iterator[MappingInfo]:
        """Yield ``[start, end)`` clipped to the mappings that hold it, in order.

        Runtime complexity: `O(log(n) + k)`, ``k`` pieces.

        Raises:
            TranslationFault: At the first address that is not mapped.
        """
        at = start
        for mapping in self.overlapping(start, end):
            if mapping.iova > at:
                break
            skip = at - mapping.iova
            size = min(mapping.size - skip, end - at)
            yield MappingInfo(at, mapping.gpa + skip, size, mapping.prot)
            at += size
        if at < end:
            raise TranslationFault(at, Access.NONE)

    def clear(self) -> None:
        """Remove everything. Runtime complexity: `O(n)`."""
        self._starts.clear()
        self._mappings.clear()

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        if list(self._starts) != sorted(self._mappings):
            raise InternalError(f"starts and mappings differ: {self._starts} {self._mappings}")
        before = 0
        for mapping in self:
            if mapping.iova < before:
                raise InternalError(f"{mapping} begins before {before:#x}, the end of the last")
            if mapping.size <= 0 or self._mappings[mapping.iova] is not mapping:
                raise InternalError(f"{mapping} is empty or filed under another start")
            before = mapping.iova + mapping.size
        if before > ADDRESS_SPACE_END:
            raise InternalError(f"the last mapping ends at {before:#x}, past 2**64")
