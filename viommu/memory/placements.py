"""Guest memory put in its place: first at a host virtual address, then in every DMA target.

And taken away in the opposite order, so that no device reaches memory that has
no place any more. This module knows nothing of regions and which of them wins.
Ranges are half-open ranges of guest physical addresses.
"""

from __future__ import annotations

import errno
from collections import Counter
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from viommu.errors import BackendError, InternalError, ViommuError
from viommu.memory.dma_target import DmaNeeds, MemoryKind
from viommu.memory.incident import Incident, IncidentKind
from viommu.memory.va_mapper import VaMapper

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from viommu.memory.dma_target import AddressRange
    from viommu.memory.ledger import Placement, StuckEntry, TargetLedger

__all__ = ["Placements"]


class Placements:
    """What is placed, the targets that are told of it, and the addresses that they may need.

    ``reservation`` is the size of the reserved virtual addresses, which exist as
    long as a target that needs them does. ``incidents`` collects what went wrong
    without an exception; the owner empties it.

    Memory that a target would not unmap *lingers*: it keeps its file and its
    address until an unmap succeeds. It is tried again when something else is to be
    placed there, and by :meth:`retry`.
    """

    def __init__(self, reservation: int) -> None:
        self.incidents: list[Incident] = []
        self._reservation = reservation
        self._addresses: VaMapper | None = None
        self._placed: SortedDict[int, Placement] = SortedDict()
        self._lingering: list[Placement] = []
        self._targets: list[TargetLedger] = []
        self._leaving: list[TargetLedger] = []  # released, but stuck with something
        #: How many incidents there were in all.
        self.counts: Counter[IncidentKind] = Counter()

    def __len__(self) -> int:
        """Return how many pieces are placed."""
        return len(self._placed)

    @property
    def addresses(self) -> VaMapper | None:
        """Return the reserved addresses, ``None`` while no target needs them."""
        return self._addresses

    @property
    def lingering(self) -> Sequence[Placement]:
        """Return what is in no place, but can't be let go of."""
        return self._lingering

    @property
    def registered(self) -> Sequence[TargetLedger]:
        """Return the books of targets that are told of changes, in the order of registration."""
        return self._targets

    @property
    def leaving(self) -> Sequence[TargetLedger]:
        """Return the books of targets that are told of nothing more, but hold something."""
        return self._leaving

    def targets(self) -> list[TargetLedger]:
        """Return the books of every target: as registered, then the leaving ones."""
        return [*self._targets, *self._leaving]

    def place(self, wanted: Placement) -> Placement:
        """Place a piece of memory and return it, or one like it that lingered there.

        Takes a use of its backing. Targets are told in the order of registration.

        Raises:
            Exception: For RAM: a target failed to map it, or it can't have an
                address; nothing is placed.
        """
        placement = self._take(wanted)
        mapped: list[TargetLedger] = []
        try:
            self._give_address(placement)
            for ledger in self._targets:
                self._map(ledger, placement)
                mapped.append(ledger)
        except Exception:
            for ledger in reversed(mapped):
                self._note_stuck(ledger, ledger.unmap([placement]))
            self._lingering.append(placement)
            self._collect()
            raise
        self._placed[placement.where.start] = placement
        return placement

    def unplace(self, placements: Sequence[Placement]) -> None:
        """Take pieces of one region away: from every target first, then from their addresses."""
        for ledger in self._targets:
            self._note_stuck(ledger, ledger.unmap(placements))
        for placement in placements:
            for ledger in self._leaving:
                self._note_stuck(ledger, ledger.retry(placement.where))
            del self._placed[placement.where.start]
            self._lingering.append(placement)
        for ledger in list(self._leaving):
            self._let_go(ledger)
        self._collect()

    def register(self, ledger: TargetLedger) -> None:
        """Tell a target of everything that is placed, lowest address first, and of all changes.

        Raises:
            Exception: RAM can't be mapped. The target was made to unmap what it
                had mapped so far, and is told of nothing.
        """
        if DmaNeeds.HOST_VA in ledger.needs:
            self._use_addresses()
        try:
            for placement in self._placed.values():
                self._map(ledger, placement)
        except Exception:
            self.unregister(ledger)
            raise
        self._targets.append(ledger)

    def unregister(self, ledger: TargetLedger) -> list[StuckEntry]:
        """Unmap everything from a target, highest address first, and return what is stuck."""
        if ledger in self._targets:
            self._targets.remove(ledger)
        stuck = ledger.unmap_all()
        self._note_stuck(ledger, stuck)
        self._let_go(ledger)
        return stuck

    def retry(self, within: AddressRange) -> None:
        """Try again to unmap what is stuck and touches ``within``."""
        for ledger in self._targets:
            self._note_stuck(ledger, ledger.retry(within))
        for ledger in list(self._leaving):
            self._note_stuck(ledger, ledger.retry(within))
            self._let_go(ledger)
        self._collect()

    def report(
        self, kind: IncidentKind, region: str, where: AddressRange, error: Exception
    ) -> None:
        """Record an incident that is no target's."""
        self.counts[kind] += 1
        self.incidents.append(Incident(kind, region, where, None, error, self.counts[kind]))

    def _take(self, wanted: Placement) -> Placement:
        """Return ``wanted``, or what lingers there and is the same, with a use of its backing."""
        for placement in self._lingering:
            if placement.is_same_as(wanted):
                self._lingering.remove(placement)
                placement.region = wanted.region
                return placement
        if self._lingers_at(wanted.where):
            self.retry(wanted.where)
        wanted.backing.retain()
        return wanted

    def _lingers_at(self, where: AddressRange) -> Placement | None:
        return next((p for p in self._lingering if p.where.meets(where)), None)

    def _give_address(self, placement: Placement) -> None:
        if self._addresses is None or placement.host_va is not None:
            return
        try:
            other = self._lingers_at(placement.where)
            if other is not None and other.host_va is not None:
                raise BackendError(errno.EBUSY, f"{placement}: {other} could not be taken away")
            placement.host_va = self._addresses.map(
                placement.where,
                placement.backing,
                placement.file_offset,
                writable=placement.writable,
            )
        except ViommuError as error:
            if placement.kind is MemoryKind.RAM:
                error.add_note(f"while placing {placement}")
                raise
            self.report(IncidentKind.NO_ADDRESS, placement.region, placement.where, error)

    def _map(self, ledger: TargetLedger, placement: Placement) -> None:
        try:
            ledger.map(placement)
        except (ViommuError, OSError) as error:
            if placement.kind is MemoryKind.RAM:
                error.add_note(f"while {ledger.name} mapped {placement}")
                raise
            ledger.tolerated += 1
            self._blame(ledger, IncidentKind.NOT_MAPPED, placement, error, ledger.tolerated)

    def _note_stuck(self, ledger: TargetLedger, stuck: Iterable[StuckEntry]) -> None:
        for placement, error in stuck:
            self._blame(ledger, IncidentKind.NOT_UNMAPPED, placement, error, ledger.refused)

    def _blame(
        self,
        ledger: TargetLedger,
        kind: IncidentKind,
        placement: Placement,
        error: Exception,
        times: int,
    ) -> None:
        """Record an incident of one target."""
        self.counts[kind] += 1
        self.incidents.append(
            Incident(kind, placement.region, placement.where, ledger.name, error, times)
        )

    def _collect(self) -> None:
        """Let go of what lingers and is held by nobody."""
        for placement in list(self._lingering):
            if placement.holders:
                continue
            if placement.host_va is not None and self._addresses is not None:
                try:
                    self._addresses.unmap(placement.where)
                except BackendError as error:
                    self.report(IncidentKind.NOT_VACATED, placement.region, placement.where, error)
                    continue
                placement.host_va = None
            self._lingering.remove(placement)
            placement.backing.close()

    def _use_addresses(self) -> None:
        if self._addresses is not None:
            self._addresses.retain()
            return
        self._addresses = VaMapper(self._reservation)
        try:
            for placement in self._placed.values():
                self._give_address(placement)
        except Exception:
            self._disuse_addresses(self._addresses)
            raise

    def _disuse_addresses(self, addresses: VaMapper) -> None:
        addresses.close()
        if addresses.uses:
            return
        self._addresses = None
        for placement in (*self._placed.values(), *self._lingering):
            placement.host_va = None

    def _let_go(self, ledger: TargetLedger) -> None:
        """Forget a target that holds nothing any more; one that does keeps its memory in place."""
        if len(ledger):
            if ledger not in self._leaving:
                self._leaving.append(ledger)
            return
        if ledger in self._leaving:
            self._leaving.remove(ledger)
        self._collect()
        if DmaNeeds.HOST_VA in ledger.needs and self._addresses is not None:
            self._disuse_addresses(self._addresses)
            self._collect()

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        known = [*self._placed.values(), *self._lingering]
        holders = Counter(id(placement) for ledger in self.targets() for placement in ledger)
        for placement in known:
            if holders.pop(id(placement), 0) != placement.holders:
                raise InternalError(f"{placement} is not held {placement.holders} times")
            if not placement.backing.uses:
                raise InternalError(f"{placement} is placed without its memory")
        if holders:
            raise InternalError(f"{len(holders)} placements are held and not known")
        for ledger in self.targets():
            ledger._check()  # noqa: SLF001 - one check of the whole, part by part
        for ledger in self._targets:
            stuck = {id(entry.placement) for entry in ledger.stuck()}
            placed = {id(p): p for p in self._placed.values()}
            if stuck & placed.keys():
                raise InternalError(f"{ledger.name} is stuck with what is placed")
            held = {id(p) for p in ledger} - stuck
            missing = [p for i, p in placed.items() if i not in held and p.kind is MemoryKind.RAM]
            if missing or not held <= placed.keys():
                raise InternalError(f"{ledger.name} does not hold what is placed: {missing}")
        users = sum(DmaNeeds.HOST_VA in ledger.needs for ledger in self.targets())
        if users != (self._addresses.uses if self._addresses else 0):
            raise InternalError(f"{users} targets use the reserved addresses, not counted so")
        mapped = sorted(p.where for p in known if p.host_va is not None)
        if mapped != (list(self._addresses) if self._addresses else []):
            raise InternalError(f"other addresses are mapped than {mapped}")
        if self._addresses:
            self._addresses._check()  # noqa: SLF001 - as above
