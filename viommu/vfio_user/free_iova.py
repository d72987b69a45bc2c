"""Which addresses of an I/O address space are still to be had (half-open ranges of whole pages)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict, SortedList

from viommu.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["FreeIova"]


class FreeIova:
    """The parts of ``apertures`` that nothing occupies, ordered by address and by size.

    Apertures are where addresses may come from; they don't touch one another.

    An allocation gets the smallest part that it fits into, and of several the lowest:
    what has been freed is used again before untouched space is broken up, and no
    pattern of use makes the search slow.
    """

    def __init__(self, apertures: Iterable[tuple[int, int]]) -> None:
        self.apertures = tuple(apertures)
        self._ends: SortedDict[int, int] = SortedDict()  # start -> end
        self._sizes: SortedList[tuple[int, int]] = SortedList()  # (size, start)
        for start, end in self.apertures:
            self._add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the parts as (start, end), lowest first."""
        return iter(self._ends.items())

    def find(self, size: int) -> int | None:
        """Return where ``size`` bytes are free. Runtime complexity: `O(log(n))`."""
        index = self._sizes.bisect_left((size, 0))
        return self._sizes[index][1] if index < len(self._sizes) else None

    def take(self, start: int, end: int) -> None:
        """Occupy ``[start, end)``, all of which need not be free, nor in an aperture.

        Runtime complexity: `O(log(n))` for each part that it meets.
        """
        for low in [*self._before(start), *self._ends.irange(start, end, (True, False))]:
            high = self._ends[low]
            if high <= start:
                continue
            self._drop(low)
            self._add(low, start)
            self._add(end, high)

    def give(self, start: int, end: int) -> None:
        """Free ``[start, end)``, all of which is occupied, or in no aperture.

        Runtime complexity: `O(log(n))` for each aperture.
        """
        for lowest, highest in self.apertures:
            low, high = max(start, lowest), min(end, highest)
            if low >= high:
                continue
            for before in self._before(low):
                if self._ends[before] == low:
                    self._drop(before)
                    low = before
            if high in self._ends:
                high = self._drop(high)
            self._add(low, high)

    def _before(self, start: int) -> list[int]:
        """Return the start of the last part below ``start``, if there is one."""
        index = self._ends.bisect_left(start)
        return [self._ends.keys()[index - 1]] if index else []

    def _add(self, start: int, end: int) -> None:
        if start < end:
            self._ends[start] = end
            self._sizes.add((end - start, start))

    def _drop(self, start: int) -> int:
        end: int = self._ends.pop(start)
        self._sizes.remove((end - start, start))
        return end

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        if sorted((end - start, start) for start, end in self._ends.items()) != list(self._sizes):
            raise InternalError(f"addresses and sizes differ: {self._ends} {self._sizes}")
        before = -1
        for start, end in self._ends.items():
            if not before < start < end:
                raise InternalError(f"[{start:#x}, {end:#x}) is empty or meets what ends there")
            if not any(low <= start and end <= high for low, high in self.apertures):
                raise InternalError(f"[{start:#x}, {end:#x}) is in none of {self.apertures}")
            before = end
