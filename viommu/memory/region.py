"""A region of guest physical memory and the pieces it is made of (half-open ranges)."""

from __future__ import annotations

import errno
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import InternalError, PeerError
from viommu.memory.dma_target import AddressRange

if TYPE_CHECKING:
    from viommu.memory.backing import Backing
    from viommu.memory.dma_target import MemoryKind
    from viommu.memory.ledger import Placement

__all__ = ["MapParameters", "Region", "RegionError", "RegionOverlapError", "SubMapping"]


class RegionError(PeerError):
    """Guest memory can't be laid out like this; nothing has changed."""


class RegionOverlapError(RegionError):
    """Two regions overlap in a way that leaves open which one is seen."""

    def __init__(self, existing: Region, new: Region) -> None:
        super().__init__(
            errno.EEXIST,
            f"region {new.name!r} {new.where}, priority {new.priority}, and region"
            f" {existing.name!r} {existing.where}, priority {existing.priority}, overlap:"
            " the one of higher priority must contain the other, equals must be in the same place",
        )
        self.existing = existing.name
        self.new = new.name


class MapParameters(NamedTuple):
    """How an enabled region is mapped."""

    writable: bool = True


class SubMapping:
    """A piece of a region with memory behind it: ``within`` counts from the region's start."""

    __slots__ = ("backing", "file_offset", "placement", "within", "writable")

    def __init__(
        self, within: AddressRange, backing: Backing, file_offset: int, *, writable: bool
    ) -> None:
        self.within = within
        self.backing = backing
        self.file_offset = file_offset
        self.writable = writable
        #: Where it is now; ``None`` unless the region is active.
        self.placement: Placement | None = None


class Region:
    """A range of guest physical memory. To everyone but its manager it is read-only.

    *Enabled* is what its owner asked for, *active* what targets are told: at any
    address at most one enabled region is active. When it should be and can't,
    ``failure`` says why.
    """

    def __init__(self, name: str, where: AddressRange, kind: MemoryKind, priority: int) -> None:
        self.name = name
        self.where = where
        self.kind = kind
        self.priority = priority
        #: ``None`` unless enabled.
        self.parameters: MapParameters | None = None
        self.active = False
        self.failure: Exception | None = None
        #: By rising address.
        self.mappings: list[SubMapping] = []

    @property
    def enabled(self) -> bool:
        """Return whether its owner wants it to be seen."""
        return self.parameters is not None

    def address(self, within: AddressRange) -> AddressRange:
        """Return the guest physical addresses of a range counted from its start."""
        return AddressRange(self.where.start + within.start, self.where.start + within.end)

    def lets_write(self, mapping: SubMapping) -> bool:
        """Return whether devices may write to a sub-mapping as the region is mapped now."""
        return mapping.writable and self.parameters is not None and self.parameters.writable

    def admit(self, mapping: SubMapping, page: int) -> None:
        """Raise unless a sub-mapping of whole pages of ``page`` bytes can be added.

        Runtime complexity: `O(log(n))`.

        Raises:
            RegionError: EINVAL, it isn't in the region, or not whole pages; EEXIST,
                it overlaps another.
        """
        within, offset = mapping.within, mapping.file_offset
        where = self.address(within)
        what = f"sub-mapping {within} of region {self.name!r}"
        if within.start >= within.end or not self.where.holds(where):
            raise RegionError(errno.EINVAL, f"{what} is not in its {self.where.size:#x} bytes")
        if where.start % page or where.end % page or offset % page:
            raise RegionError(
                errno.EINVAL,
                f"{what}, at {where} and {offset:#x} in {mapping.backing}, is not on whole pages",
            )
        index = bisect_left(self.mappings, within, key=lambda m: m.within)
        for other in self.mappings[max(index - 1, 0) : index + 1]:
            if other.within.meets(within):
                raise RegionError(errno.EEXIST, f"{what} overlaps {other.within}")

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        if self.active and self.failure is not None:
            raise InternalError(f"{self!r} is active and failed: {self.failure}")
        end = 0
        for mapping in self.mappings:
            within, placement = mapping.within, mapping.placement
            if not end <= within.start < within.end <= self.where.size:
                raise InternalError(f"{self!r}: {within} is empty or begins before {end:#x}")
            end = within.end
            if (placement is not None) is not self.active:
                raise InternalError(f"{self!r}: {within} is in place: {placement}")
            if placement is None:
                continue
            expected = (self.address(within), self.lets_write(mapping))
            if (placement.where, placement.writable) != expected:
                raise InternalError(f"{self!r}: {placement} should be {expected}")

    def __repr__(self) -> str:
        return f"<region {self.name!r} {self.where} priority {self.priority}>"
