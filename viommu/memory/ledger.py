"""What one DMA target holds: the books that say what to unmap (half-open ranges of GPAs).

A target is never asked what it has. So that nothing is forgotten when it refuses
to unmap, such an entry stays in the books as *stuck*: devices may still reach
that memory, and it must stay where it is.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from sortedcontainers import SortedDict

from viommu.errors import BackendError, InternalError
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import AddressRange, DmaNeeds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from viommu.memory.backing import Backing
    from viommu.memory.dma_target import DmaTarget, MemoryKind

__all__ = ["Placement", "StuckEntry", "TargetLedger"]


class Placement:
    """A piece of guest memory in its place: one mapping of every target, with one protection.

    ``region`` is the name of the region that it was placed for. ``holders`` counts
    the targets that hold it; memory and ``host_va`` stay while there are any.
    """

    __slots__ = (
        "backing", "file_offset", "holders", "host_va", "kind", "region", "where", "writable",
    )  # fmt: skip

    def __init__(
        self,
        region: str,
        where: AddressRange,
        backing: Backing,
        file_offset: int,
        *,
        writable: bool,
        kind: MemoryKind,
    ) -> None:
        self.region = region
        self.where = where
        self.backing = backing
        self.file_offset = file_offset
        self.writable = writable
        self.kind = kind
        self.host_va: int | None = None
        self.holders = 0

    def is_same_as(self, other: Placement) -> bool:
        """Return whether a target that holds one of them need not be told of the other."""
        return (
            self.where == other.where
            and self.backing is other.backing
            and self.file_offset == other.file_offset
            and self.writable is other.writable
            and self.kind is other.kind
        )

    def __str__(self) -> str:
        return f"{self.where} of {self.region!r}"


class StuckEntry(NamedTuple):
    """A mapping that its target would not remove, and why."""

    placement: Placement
    error: Exception


class TargetLedger:
    """One target and its entries, by address.

    ``tolerated`` counts the device memory that it could not map, ``refused`` the
    unmaps that it failed.
    """

    def __init__(self, target: DmaTarget, name: str, needs: DmaNeeds) -> None:
        self.target = target
        self.name = name
        self.needs = needs
        self.tolerated = 0
        self.refused = 0
        self._held: SortedDict[int, Placement] = SortedDict()
        self._stuck: dict[int, Exception] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Placement]:
        """Yield everything that the target holds, lowest address first, stuck or not."""
        return iter(self._held.values())

    def stuck(self) -> list[StuckEntry]:
        """Return what the target would not unmap, lowest address first."""
        return [StuckEntry(self._held[start], self._stuck[start]) for start in sorted(self._stuck)]

    def map(self, placement: Placement) -> None:
        """Have the target map ``placement``, unless it is stuck with exactly that.

        Raises:
            BackendError: EBUSY, something else is stuck there.
            Exception: What the target raised; it holds nothing of it.
        """
        if self._held.get(placement.where.start) is placement:
            self._stuck.pop(placement.where.start, None)
            return
        if other := next(self._meeting(placement.where), None):
            raise BackendError(errno.EBUSY, f"{self.name} could not unmap {other}")
        backing = placement.backing
        self.target.map_dma(
            placement.where,
            # Only those that need addresses keep them in existence.
            host_va=placement.host_va if DmaNeeds.HOST_VA in self.needs else None,
            mappable=backing if isinstance(backing, FileBacking) else None,
            file_offset=placement.file_offset,
            writable=placement.writable,
            kind=placement.kind,
        )
        self._held[placement.where.start] = placement
        placement.holders += 1

    def unmap(self, placements: Iterable[Placement]) -> list[StuckEntry]:
        """Have the target unmap those of ``placements`` that it holds; return what is stuck now.

        It is asked once, for a range that covers them all: gaps are fine, and
        nothing that isn't stuck lies between them. When that fails each is asked for,
        to know what is left.
        """
        held = [p for p in placements if self._held.get(p.where.start) is p]
        if not held:
            return []
        span = AddressRange(min(p.where.start for p in held), max(p.where.end for p in held))
        error = self._ask(span)
        if error is None:
            for placement in list(self._meeting(span)):
                self._forget(placement)
            return []
        if len(held) == 1:
            return self._keep(held[0], error)
        return self._unmap_each(held)

    def unmap_all(self) -> list[StuckEntry]:
        """Have the target unmap everything, highest address first; return what is stuck."""
        return self._unmap_each(list(self._held.values())[::-1])

    def retry(self, within: AddressRange) -> list[StuckEntry]:
        """Ask again for what is stuck and touches ``within``; return what still is."""
        return self._unmap_each([p for p in self._meeting(within) if p.where.start in self._stuck])

    def _unmap_each(self, placements: list[Placement]) -> list[StuckEntry]:
        stuck = []
        for placement in placements:
            error = self._ask(placement.where)
            if error is None:
                self._forget(placement)
            else:
                stuck += self._keep(placement, error)
        return stuck

    def _ask(self, where: AddressRange) -> Exception | None:
        try:
            self.target.unmap_dma(where)
        except Exception as error:  # noqa: BLE001 - whatever it is, the memory may be in use
            self.refused += 1
            return error
        return None

    def _keep(self, placement: Placement, error: Exception) -> list[StuckEntry]:
        self._stuck[placement.where.start] = error
        return [StuckEntry(placement, error)]

    def _forget(self, placement: Placement) -> None:
        del self._held[placement.where.start]
        self._stuck.pop(placement.where.start, None)
        placement.holders -= 1

    def _meeting(self, where: AddressRange) -> Iterator[Placement]:
        """Yield what is held of ``where``. Runtime complexity: `O(log(n) + k)`, ``k`` entries."""
        first = next(self._held.irange(None, where.start, reverse=True), where.start)
        for start in self._held.irange(first, where.end, (True, False)):
            placement: Placement = self._held[start]
            if placement.where.meets(where):
                yield placement

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        before = 0
        for start, placement in self._held.items():
            if start != placement.where.start or start < before:
                raise InternalError(f"{self.name}: {placement} is filed under {start:#x}")
            if placement.holders < 1:
                raise InternalError(f"{self.name}: {placement} has no holder, but is held")
            before = placement.where.end
        if not self._stuck.keys() <= self._held.keys():
            raise InternalError(f"{self.name}: stuck with what it doesn't hold: {self._stuck}")
