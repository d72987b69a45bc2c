"""What can be seen of regions and DMA targets from outside: plain data, ready for JSON.

Ranges are ``[start, end)`` in guest physical addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.memory.dma_target import DmaNeeds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.memory.ledger import Placement, TargetLedger
    from viommu.memory.overlay import Overlay
    from viommu.memory.placements import Placements
    from viommu.memory.region import Region

__all__ = ["snapshot"]


def snapshot(
    regions: Iterable[Region], overlay: Overlay, placements: Placements
) -> dict[str, object]:
    """Return the state of everything. Runtime complexity: `O(n)`."""
    addresses = placements.addresses
    return {
        "regions": [_region(region, overlay) for region in regions],
        "targets": [
            _target(ledger, registered=ledger not in placements.leaving)
            for ledger in placements.targets()
        ],
        # Kept in place because of what a target is stuck with.
        "lingering": [_placement(placement) for placement in placements.lingering],
        "addresses": addresses
        and {
            "reserved": addresses.size,
            "mapped": sum(piece.size for piece in addresses),
            "targets": addresses.uses,
        },
        "incidents": {kind.value: count for kind, count in placements.counts.items()},
    }


def _region(region: Region, overlay: Overlay) -> dict[str, object]:
    shadow = overlay.shadow_of(region) if region.enabled else None
    return {
        "name": region.name,
        "start": region.where.start,
        "end": region.where.end,
        "kind": region.kind.value,
        "priority": region.priority,
        "enabled": region.enabled,
        "writable": region.parameters is not None and region.parameters.writable,
        "active": region.active,
        "shadowed by": shadow and shadow.name,
        "failure": region.failure and str(region.failure),
        "mappings": [
            {
                "start": region.where.start + mapping.within.start,
                "end": region.where.start + mapping.within.end,
                "backing": str(mapping.backing),
                "file offset": mapping.file_offset,
                "writable": mapping.writable,
            }
            for mapping in region.mappings
        ],
    }


def _target(ledger: TargetLedger, *, registered: bool) -> dict[str, object]:
    stuck = {entry.placement.where.start: str(entry.error) for entry in ledger.stuck()}
    return {
        "name": ledger.name,
        "needs": [need.name for need in DmaNeeds if need in ledger.needs],
        "registered": registered,
        "device memory not mapped": ledger.tolerated,
        "unmaps refused": ledger.refused,
        "held": [
            {**_placement(placement), "stuck": stuck.get(placement.where.start)}
            for placement in ledger
        ],
    }


def _placement(placement: Placement) -> dict[str, object]:
    return {
        "region": placement.region,
        "start": placement.where.start,
        "end": placement.where.end,
        "writable": placement.writable,
        "has host address": placement.host_va is not None,
    }
