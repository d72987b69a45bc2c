"""What IOVAs a guest must leave alone, from what the host says in two places (half-open ranges)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from viommu.domain import X86_MSI_WINDOW, ReservedRegion
from viommu.spec.virtio_iommu import ReservedKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["reserved_for_guest"]


def reserved_for_guest(
    regions: Iterable[ReservedRegion], ranges: Sequence[tuple[int, int]]
) -> tuple[ReservedRegion, ...]:
    """Return the regions for PROBE, which don't overlap, one of them for MSIs.

    ``regions`` are the host's for the device, ``ranges`` what its IOMMU can map: a gap
    between two of these is reserved, too, for whatever reason. The window for MSIs
    is the host's, or where x86 has it if the host names none.
    """
    found: list[ReservedRegion] = []
    msi = [region for region in regions if region.kind is ReservedKind.MSI][:1] or [X86_MSI_WINDOW]
    gaps = [ReservedRegion(end, start) for (_, end), (start, _) in pairwise(sorted(ranges))]
    for region in (*msi, *regions, *gaps):
        # The guest may only be told of one window; a second one is as forbidden.
        kind = region.kind if not found else ReservedKind.RESERVED
        found += [
            ReservedRegion(start, end, kind)
            for start, end in _uncovered(region.start, region.end, found)
        ]
    return tuple(sorted(found))


def _uncovered(start: int, end: int, covering: Iterable[ReservedRegion]) -> list[tuple[int, int]]:
    """Return the parts of ``[start, end)`` that are in none of ``covering``."""
    parts = []
    for region in sorted(covering):
        if region.end <= start or end <= region.start:
            continue
        if start < region.start:
            parts.append((start, region.start))
        start = region.end
    if start < end:
        parts.append((start, end))
    return parts
