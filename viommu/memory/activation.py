"""Which regions are active: what should be seen gets its place, everything else loses it.

Half-open ranges of guest physical addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.errors import InternalError
from viommu.memory.incident import IncidentKind
from viommu.memory.ledger import Placement

if TYPE_CHECKING:
    from viommu.memory.dma_target import AddressRange
    from viommu.memory.overlay import Overlay
    from viommu.memory.placements import Placements
    from viommu.memory.region import Region, SubMapping

__all__ = ["Activation"]


class Activation:
    """Makes the placements follow the regions of an overlay."""

    def __init__(self, overlay: Overlay, placements: Placements) -> None:
        self._overlay = overlay
        self._placements = placements

    def settle(self, where: AddressRange, needed: Region | None = None) -> None:
        """Make active what should be seen in ``where``, and nothing else.

        A region that can't be active gets a ``failure``, whatever failed before is
        tried again. Runtime complexity: `O(L log(n) + k)` for ``k`` regions and
        sub-mappings that touch ``where``, and what targets need for those that change.

        Raises:
            Exception: What made ``needed`` fail; it may be placed in part, until
                the caller has changed its parameters back and settles again.
        """
        regions = self._overlay.meeting(where)
        seen = {r for r in regions if r.enabled and self._overlay.shadow_of(r) is None}
        for region in regions:
            if region not in seen:
                self._deactivate(region)
        for region in regions:
            if region not in seen:
                continue
            try:
                self._activate(region)
            except Exception as error:
                if region is needed:
                    raise
                self._deactivate(region)
                region.failure = error
                self._placements.report(IncidentKind.NOT_ACTIVE, region.name, region.where, error)

    def place(self, region: Region, mapping: SubMapping) -> None:
        """Place one sub-mapping of an active region.

        Raises:
            Exception: As from :meth:`Placements.place`; it is not placed.
        """
        mapping.placement = self._placements.place(
            Placement(
                region.name,
                region.address(mapping.within),
                mapping.backing,
                mapping.file_offset,
                writable=region.lets_write(mapping),
                kind=region.kind,
            )
        )

    def unplace(self, mappings: list[SubMapping]) -> None:
        """Take away those sub-mappings of a region that are placed; nothing else lies between."""
        placed = [m.placement for m in mappings if m.placement is not None]
        if placed:
            self._placements.unplace(placed)
        for mapping in mappings:
            mapping.placement = None

    def _activate(self, region: Region) -> None:
        """Place what isn't placed, or not with these parameters."""
        for mapping in region.mappings:
            placement = mapping.placement
            if placement is not None and placement.writable is not region.lets_write(mapping):
                self.unplace([mapping])
            if mapping.placement is None:
                self.place(region, mapping)
        region.active = True
        region.failure = None

    def _deactivate(self, region: Region) -> None:
        region.active = False
        region.failure = None
        self.unplace(region.mappings)

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n^2)`."""
        self._overlay._check()  # noqa: SLF001 - one check of the whole, part by part
        self._placements._check()  # noqa: SLF001 - as above
        placed = 0
        for region in self._overlay.all():
            region._check()  # noqa: SLF001 - as above
            seen = region.enabled and self._overlay.shadow_of(region) is None
            if seen is not (region.active or region.failure is not None):
                raise InternalError(f"{region!r}: {seen=}, but active={region.active}")
            placed += sum(mapping.placement is not None for mapping in region.mappings)
        if placed != len(self._placements):
            raise InternalError(f"{len(self._placements)} placements, {placed} are in regions")
