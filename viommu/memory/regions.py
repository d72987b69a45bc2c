"""Guest physical memory as regions, kept up to date in every DMA target.

Regions may overlap (a BAR that firmware has put over RAM, a window that hides
another one): priorities say which is seen. What is seen is mapped by every
registered :class:`~viommu.memory.dma_target.DmaTarget`, piece by piece, and at a
host virtual address where a target needs one. Ranges are half-open.

Source: OpenVMM's region manager, whose rules these are.
"""

from __future__ import annotations

import errno
from bisect import insort
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from viommu.deferred import all_done
from viommu.errors import InternalError, UsageError
from viommu.memory.activation import Activation
from viommu.memory.backing import PrivateBacking
from viommu.memory.dma_target import (
    EVERYWHERE,
    DeferredTarget,
    DmaNeeds,
    DmaRegistration,
    FileMissingError,
    MemoryKind,
)
from viommu.memory.fixed_mapping import page_size
from viommu.memory.incident import IncidentKind, IncompleteError, log_incident
from viommu.memory.ledger import TargetLedger
from viommu.memory.overlay import Overlay
from viommu.memory.placements import Placements
from viommu.memory.region import MapParameters, Region, RegionError, SubMapping
from viommu.memory.region_snapshot import snapshot
from viommu.memory.va_mapper import DEFAULT_RESERVATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.deferred import Deferred
    from viommu.memory.backing import Backing
    from viommu.memory.dma_target import AddressRange, DmaTarget
    from viommu.memory.incident import Incident

__all__ = ["RegionManager"]

_MAX_PRIORITY: Final = 255
_PRIORITIES: Final = {MemoryKind.RAM: _MAX_PRIORITY, MemoryKind.DEVICE: 0}
_MAX_REGIONS: Final = 65535  # what vfio-user lets a client assume ("max_dma_maps")


class RegionManager:
    """The regions of one guest and the DMA targets that follow them.

    Every change is made to its end before the next one: a target that calls back
    in the middle of one is refused. A change that raises has been undone, except
    those that take memory away: these are carried out whatever happens, and raise
    :exc:`IncompleteError` to tell what is left.

    A target that can't map RAM makes the change fail. One that can't map device
    memory does without, which ``report`` is told of.

    With ``L`` priorities in use, a change costs `O(L log(n) + k)` where ``k``
    regions and sub-mappings are at its place, and what targets and host take for
    those that change. :meth:`register`, :meth:`retry`, :meth:`snapshot` and the
    release of a target cost `O(n)`.

    Args:
        reservation: Bytes of host virtual addresses that are reserved while a
            target needs them; memory beyond can't be mapped by such a target.
        report: Told of every failure that is not raised, after the change; by
            default it goes to the log, less and less often.
        max_regions: The limit of regions, and of sub-mappings in all of them.
    """

    def __init__(
        self,
        *,
        reservation: int = DEFAULT_RESERVATION,
        report: Callable[[Incident], None] | None = None,
        max_regions: int = _MAX_REGIONS,
    ) -> None:
        self._report = report or log_incident
        self._max_regions = max_regions
        self._page = page_size()
        self._overlay = Overlay()
        self._regions: dict[str, Region] = {}
        self._mappings = 0
        self._placements = Placements(reservation)
        self._activation = Activation(self._overlay, self._placements)
        self._changing = False

    # Regions

    def add_region(
        self,
        name: str,
        where: AddressRange,
        kind: MemoryKind = MemoryKind.RAM,
        *,
        priority: int | None = None,
    ) -> Region:
        """Add a region, disabled and with nothing in it.

        Of regions that overlap, the one of higher priority must contain the
        other; of equal priority they must be in the same place, and the older one
        wins. RAM has the highest ``priority``, 255, devices the lowest, 0, unless said.

        Raises:
            RegionOverlapError: It overlaps another in another way.
            RegionError: EINVAL, an empty range or one that passes the end of the
                address space; EEXIST, the name is taken; ENOSPC, too many regions.
            UsageError: The priority is not in ``[0, 255]``.
        """
        with self._change():
            priority = _PRIORITIES[kind] if priority is None else priority
            if not 0 <= priority <= _MAX_PRIORITY:
                raise UsageError(f"region {name!r}: priority {priority} is not in [0, 255]")
            if where.start >= where.end or not EVERYWHERE.holds(where):
                raise RegionError(errno.EINVAL, f"region {name!r} can't be at {where}")
            if name in self._regions:
                raise RegionError(errno.EEXIST, f"there is a region {name!r} already")
            if len(self._regions) >= self._max_regions:
                raise RegionError(errno.ENOSPC, f"more than {self._max_regions} regions")
            region = Region(name, where, kind, priority)
            self._overlay.add(region)
            self._regions[name] = region
            return region

    def remove_region(self, region: Region) -> None:
        """Disable a region and remove it with all its sub-mappings.

        Raises:
            IncompleteError: As from :meth:`disable`; it is removed all the same.
        """
        with self._taking_away():
            self._must_know(region)
            region.parameters = None
            self._activation.settle(region.where)
            self._overlay.remove(region)
            del self._regions[region.name]
            self._mappings -= len(region.mappings)
            for mapping in region.mappings:
                mapping.backing.close()
            region.mappings.clear()

    def enable(self, region: Region, *, writable: bool = True) -> None:
        """Have a region seen, unless another one hides it, with these parameters.

        What it hides is disabled for the time being. A region that is enabled
        changes from ``writable`` to read-only, or back, one sub-mapping after the
        other: each is unmapped from all targets and mapped again at once. No IOMMU
        of the host can do that in one step, so a DMA that hits this moment is
        aborted. To enable again with the same parameters does nothing, unless the
        region failed to be active; then it tries again.

        Raises:
            BackendError: A target can't map RAM, or RAM can't have the address
                that one needs. All is as it was: regions, parameters, targets.
            PeerError: A file became too short.
        """
        with self._change():
            self._must_know(region)
            before, region.parameters = region.parameters, MapParameters(writable)
            try:
                self._activation.settle(region.where, region)
            except Exception:
                region.parameters = before
                self._activation.settle(region.where)
                raise

    def disable(self, region: Region) -> None:
        """Have a region seen no more, and in its place what it hid.

        Targets unmap it first, then it loses its host virtual addresses.

        Raises:
            IncompleteError: A target did not unmap it: that memory stays where it
                is, and what is the same can be enabled there, but nothing else
                until the target gives in. Or what was hidden can't be active.
        """
        with self._taking_away():
            self._must_know(region)
            region.parameters = None
            self._activation.settle(region.where)

    # Sub-mappings

    def add_mapping(
        self,
        region: Region,
        within: AddressRange,
        backing: Backing,
        file_offset: int = 0,
        *,
        writable: bool = True,
    ) -> None:
        """Put memory into a region, active or not, at ``within`` counted from its start.

        On success the caller's use of ``backing`` becomes the region's; on failure
        it stays the caller's. Devices may write if both this and the region are
        ``writable``.

        Raises:
            RegionError: EINVAL, ``within`` is not in the region, not a number of
                pages or not on one; EEXIST, some of it has memory; ENOSPC, too many.
            FileMissingError: It is private, and a target needs files.
            PeerError: The backing is too short, or may not be written.
            BackendError: As from :meth:`enable`; nothing was added.
        """
        with self._change():
            self._must_know(region)
            mapping = SubMapping(within, backing, file_offset, writable=writable)
            self._admit(region, mapping)
            if region.active:
                self._activation.place(region, mapping)
            insort(region.mappings, mapping, key=lambda m: m.within)
            self._mappings += 1

    def remove_mappings(self, region: Region, within: AddressRange) -> None:
        """Remove the sub-mappings inside ``within``, counted from the region's start.

        Raises:
            RegionError: EINVAL, it would split one; nothing was removed. That
                there is none is no error.
            IncompleteError: As from :meth:`disable`; they are removed all the same.
        """
        with self._taking_away():
            self._must_know(region)
            removed = [m for m in region.mappings if m.within.meets(within)]
            for mapping in removed:
                if not within.holds(mapping.within):
                    raise RegionError(
                        errno.EINVAL, f"{within} splits {mapping.within} of region {region.name!r}"
                    )
            for mapping in removed:
                # One by one: what lies between them stays.
                self._activation.unplace([mapping])
                region.mappings.remove(mapping)
                self._mappings -= 1
                mapping.backing.close()

    # Targets

    def register(
        self, target: DmaTarget, name: str, needs: DmaNeeds = DmaNeeds.NONE
    ) -> DmaRegistration:
        """Map all that is seen into a target, lowest address first, and keep it up to date.

        Raises:
            FileMissingError: The target needs files, and some region has private memory.
            BackendError: It can't map RAM, or RAM can't have the address that it
                needs. What it had mapped was unmapped again, latest first; if it
                refused that, it is shown by :meth:`snapshot` until :meth:`retry`
                succeeds, and its memory stays where it is.
        """
        with self._change():
            if DmaNeeds.FILE in needs:
                for region in self._regions.values():
                    for mapping in region.mappings:
                        if isinstance(mapping.backing, PrivateBacking):
                            raise FileMissingError(f"{mapping.within} of region {region.name!r}")
            ledger = TargetLedger(target, name, needs)
            self._placements.register(ledger)
        return DmaRegistration(name, lambda: self._unregister(ledger))

    def settled(self) -> Deferred[None] | None:
        """Return what is done when no device reaches what was taken away so far.

        ``None`` when that is so already: only a DeferredTarget takes its time.
        """
        targets = [ledger.target for ledger in self._placements.registered]
        waits = [
            wait
            for target in targets
            if isinstance(target, DeferredTarget) and (wait := target.settled()) is not None
        ]
        return all_done(waits) if waits else None

    def retry(self) -> None:
        """Try again to unmap what is stuck, and to make active what should be.

        Device memory that a target couldn't map isn't tried again: for that, disable
        and enable its region.

        Raises:
            IncompleteError: Some of it fails again.
        """
        with self._taking_away():
            self._placements.retry(EVERYWHERE)
            self._revive()

    def _unregister(self, ledger: TargetLedger) -> None:
        with self._taking_away():
            if ledger in self._placements.targets():
                self._placements.unregister(ledger)
                # What this target made impossible may work without it.
                self._revive()

    # Inspection

    def regions(self) -> list[Region]:
        """Return all regions: by address, then by falling priority, then by age."""
        return self._overlay.all()

    def snapshot(self) -> dict[str, object]:
        """Return regions, targets, what each holds and what failed, ready for JSON."""
        return snapshot(self.regions(), self._overlay, self._placements)

    # How a change is made

    @contextmanager
    def _change(self) -> Iterator[list[Incident]]:
        """Make one change at a time, and report afterwards what went wrong meanwhile."""
        if self._changing:
            raise UsageError("regions were changed from within a change of regions")
        self._changing = True
        incidents = self._placements.incidents = []
        try:
            yield incidents
        finally:
            self._changing = False
            for incident in incidents:
                self._report(incident)

    @contextmanager
    def _taking_away(self) -> Iterator[None]:
        """Make a change that is carried out in any case; raise at its end if it left something."""
        with self._change() as incidents:
            yield
        if left := [incident for incident in incidents if self._is_left(incident)]:
            raise IncompleteError(left)

    def _is_left(self, incident: Incident) -> bool:
        """Return whether an incident of this change still matters at its end."""
        match incident.kind:
            case IncidentKind.NOT_UNMAPPED:
                ledgers = self._placements.targets()
                stuck = [entry for ledger in ledgers for entry in ledger.stuck()]
                return any(entry.error is incident.error for entry in stuck)
            case IncidentKind.NOT_VACATED:
                return any(p.where == incident.where for p in self._placements.lingering)
            case IncidentKind.NOT_ACTIVE:
                return self._regions[incident.region].failure is not None
            case IncidentKind.NOT_MAPPED | IncidentKind.NO_ADDRESS:
                return False

    def _revive(self) -> None:
        """Try again to make active what should be and isn't."""
        for region in self.regions():
            if region.failure is not None:
                self._activation.settle(region.where)

    def _must_know(self, region: Region) -> None:
        if self._regions.get(region.name) is not region:
            raise UsageError(f"{region!r} is not one of these regions")

    def _admit(self, region: Region, mapping: SubMapping) -> None:
        """Raise unless a sub-mapping can be added."""
        region.admit(mapping, self._page)
        if self._mappings >= self._max_regions:
            raise RegionError(errno.ENOSPC, f"more than {self._max_regions} sub-mappings")
        if isinstance(mapping.backing, PrivateBacking):
            for ledger in self._placements.registered:
                if DmaNeeds.FILE in ledger.needs:
                    raise FileMissingError(f"region {region.name!r}, for {ledger.name}")
        size = mapping.within.size
        mapping.backing.check(mapping.file_offset, size, writable=mapping.writable)

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n^2)`."""
        self._activation._check()  # noqa: SLF001 - one check of the whole, part by part
        regions = self.regions()
        if len(regions) != len(self._regions) or set(regions) != set(self._regions.values()):
            raise InternalError(f"{len(self._regions)} regions by name, others by address")
        if self._mappings != sum(len(region.mappings) for region in regions):
            raise InternalError(f"{self._mappings} sub-mappings were counted")
