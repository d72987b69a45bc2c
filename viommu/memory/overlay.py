"""Which region is seen where: regions in layers (half-open ranges of GPAs).

Regions of one priority are disjoint or in exactly the same place; a region of a
higher priority contains every lower one that it overlaps. So a region is seen as
a whole or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from viommu.errors import InternalError
from viommu.memory.dma_target import EVERYWHERE, AddressRange
from viommu.memory.region import RegionOverlapError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.memory.region import Region

__all__ = ["Overlay"]


class _Layer:
    """The regions of one priority: places that don't overlap, each with one region or more."""

    def __init__(self) -> None:
        self.places: SortedDict[int, list[Region]] = SortedDict()

    def meeting(self, where: AddressRange) -> Iterator[list[Region]]:
        """Yield the places that touch ``where``, in order. Runtime: `O(log(n) + k)`."""
        first = next(self.places.irange(None, where.start, reverse=True), where.start)
        for start in self.places.irange(first, where.end, (True, False)):
            place: list[Region] = self.places[start]
            if place[0].where.meets(where):
                yield place


class Overlay:
    """All regions, and which of the enabled ones win.

    With ``L`` priorities in use, to add, remove or look at one costs
    `O(L log(n))`, and `O(L log(n) + k)` where ``k`` regions overlap it.
    """

    def __init__(self) -> None:
        self._layers: SortedDict[int, _Layer] = SortedDict()

    def add(self, region: Region) -> None:
        """Add a region; of several in the same place the first one that is enabled wins.

        Raises:
            RegionOverlapError: It overlaps another and may not.
        """
        for priority, layer in self._layers.items():
            for place in layer.meeting(region.where):
                other = place[0]
                if priority > region.priority:
                    fits = other.where.holds(region.where)
                elif priority < region.priority:
                    fits = region.where.holds(other.where)
                else:
                    fits = other.where == region.where
                if not fits:
                    raise RegionOverlapError(other, region)
        layer = self._layers.setdefault(region.priority, _Layer())
        layer.places.setdefault(region.where.start, []).append(region)

    def remove(self, region: Region) -> None:
        """Remove a region."""
        layer = self._layers[region.priority]
        place = layer.places[region.where.start]
        place.remove(region)
        if not place:
            del layer.places[region.where.start]
        if not layer.places:
            del self._layers[region.priority]

    def all(self) -> list[Region]:
        """Return every region, in the order of :meth:`meeting`."""
        return self.meeting(EVERYWHERE)

    def meeting(self, where: AddressRange) -> list[Region]:
        """Return the regions that touch ``where``: by address, then the higher, then the older."""
        found = [
            region
            for layer in reversed(self._layers.values())
            for place in layer.meeting(where)
            for region in place
        ]
        # The sort is stable: regions that start together stay in the order of layers.
        return sorted(found, key=lambda region: region.where.start)

    def shadow_of(self, region: Region) -> Region | None:
        """Return the enabled region that is seen in place of ``region``, if there is one.

        A region that should be active and can't be casts a shadow as well: the
        guest sees it there, so what lies under it would be the wrong memory.
        """
        point = AddressRange(region.where.start, region.where.start + 1)
        # What overlaps it from above contains it, so its first byte speaks for all of it.
        for priority in self._layers.irange(region.priority, reverse=True):
            for place in self._layers[priority].meeting(point):
                for other in place:
                    if other is region:
                        break
                    if other.enabled:
                        return other
        return None

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n^2)`."""
        regions: list[Region] = []
        for priority, layer in self._layers.items():
            if not layer.places:
                raise InternalError(f"layer {priority} is empty")
            for start, place in layer.places.items():
                if {(r.priority, r.where) for r in place} != {(priority, place[0].where)}:
                    raise InternalError(f"{place} are not alike, or not of priority {priority}")
                if start != place[0].where.start:
                    raise InternalError(f"{place} are filed under {start:#x}")
                regions += place
        for low in regions:
            for high in regions:
                if low.priority < high.priority and low.where.meets(high.where):
                    fits = high.where.holds(low.where)
                elif low.priority == high.priority and low.where.meets(high.where):
                    fits = low.where == high.where
                else:
                    fits = True
                if not fits:
                    raise InternalError(f"{low} and {high} overlap")
