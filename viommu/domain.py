"""Domains and endpoints: who is attached where, replay and rollback (half-open ranges).

Every endpoint is always in exactly one domain: the *blocked* domain, a *bypass*
domain (identity), or a *translating* one. Endpoints that the host can't tell
apart share one mapper and so form one :class:`EndpointGroup`, which is what a
domain really programs.
"""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import Access, BackendError, GuestError, InternalError, UsageError
from viommu.iova import ADDRESS_SPACE_END, AddressMap, IntervalMap
from viommu.mapper import AddMapResult, DeferredMapper, MappingInfo, SwitchingMapper
from viommu.spec.virtio_iommu import ReservedKind, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.events import Event
    from viommu.mapper import MemoryMapper

__all__ = [
    "IDENTITY",
    "X86_MSI_WINDOW",
    "Domain",
    "DomainKind",
    "Endpoint",
    "EndpointGroup",
    "ReservedRegion",
    "sorted_reserved",
]

IDENTITY = MappingInfo(0, 0, ADDRESS_SPACE_END, Access.READ | Access.WRITE)


class ReservedRegion(NamedTuple):
    """IOVAs ``[start, end)`` of an endpoint that can't be mapped."""

    start: int
    end: int
    kind: ReservedKind = ReservedKind.RESERVED


# Writes to this window are interrupts on x86 and are never translated.
X86_MSI_WINDOW = ReservedRegion(0xFEE00000, 0xFEF00000, ReservedKind.MSI)


class DomainKind(enum.Enum):
    """What a domain does with a DMA."""

    BLOCKED = "blocked"
    BYPASS = "bypass"
    TRANSLATING = "translating"


class EndpointGroup:
    """The endpoints behind one mapper, and the domain that the mapper is programmed with.

    ``reserved`` is the same for all of them: they share one address space.
    """

    def __init__(
        self, mapper: MemoryMapper, domain: Domain, reserved: tuple[ReservedRegion, ...] = ()
    ) -> None:
        self.mapper = mapper
        self.domain = domain
        self.reserved = reserved
        self.endpoints: list[Endpoint] = []
        #: The mapper again, if its host answers later.
        self.deferred = mapper if isinstance(mapper, DeferredMapper) else None
        # Why the mapper does not hold what its domain says. It was emptied then, so
        # that its endpoints reach nothing, unless the host refused even that.
        self.broken: str | None = None

    def identity(self) -> list[MappingInfo]:
        """Return what a bypass domain maps: everything but the reserved regions.

        A DMA to those must affect nobody but the endpoint (virtio 1.2, 5.13.6.8.1).
        """
        granule = self.mapper.get_mask() & -self.mapper.get_mask()
        pieces = []
        at = 0
        for region in self.reserved:
            end = region.start // granule * granule
            if at < end:
                pieces.append(IDENTITY._replace(iova=at, gpa=at, size=end - at))
            at = -(-region.end // granule) * granule
        if at < ADDRESS_SPACE_END:
            pieces.append(IDENTITY._replace(iova=at, gpa=at, size=ADDRESS_SPACE_END - at))
        return pieces

    def empty(self) -> Event | None:
        """Have the mapper forget everything; return a resolution event, if there is one.

        Raises:
            BackendError: The host refused.
        """
        if self.mapper.supports_detach():
            return self.mapper.reset_domain()
        return self.mapper.remove_map(0, ADDRESS_SPACE_END).resolution

    def quarantine(self, why: str) -> Event | None:
        """Empty a mapper that could not be put right, so that it gives access to nothing.

        Returns a resolution event, if there is one.
        """
        self.broken = why
        with contextlib.suppress(BackendError):
            return self.empty()
        return None

    def moves_alone(self, endpoint: Endpoint) -> bool:
        """Return whether no other endpoint of this group was attached by the guest."""
        return not any(mate.attached for mate in self.endpoints if mate is not endpoint)


class Endpoint:
    """A device that does DMA: its id on the wire, its group, and where it is attached.

    ``domain`` is the translating or bypass domain that an ATTACH put it in,
    ``None`` while the guest has not attached it.
    """

    def __init__(
        self, endpoint_id: int, group: EndpointGroup, reserved: Iterable[ReservedRegion]
    ) -> None:
        self.id = endpoint_id
        self.group = group
        self.reserved = tuple(reserved)
        self.domain: Domain | None = None

    @property
    def attached(self) -> bool:
        """Whether the guest has attached this endpoint."""
        return self.domain is not None

    @property
    def kind(self) -> DomainKind:
        """What happens to a DMA of this endpoint now."""
        return self.group.domain.kind


class Domain:
    """One address space and the groups that see it.

    ``id`` is the guest's number, ``None`` for the domains of unattached endpoints.
    """

    def __init__(self, kind: DomainKind, domain_id: int | None = None) -> None:
        self.id = domain_id
        self.kind = kind
        self.map: AddressMap = IntervalMap()
        self.groups: list[EndpointGroup] = []
        #: Those of ``groups`` whose mappers answer later.
        self.deferred: list[EndpointGroup] = []
        self.endpoints: dict[int, Endpoint] = {}

    def add_group(
        self, mapper: MemoryMapper, reserved: tuple[ReservedRegion, ...] = ()
    ) -> EndpointGroup:
        """Return a new group for ``mapper``, programmed with this domain.

        Raises:
            BackendError: The host refused this domain's mappings.
        """
        group = EndpointGroup(mapper, self, reserved)
        self._load(group)
        self._list(group)
        return group

    def take(self, group: EndpointGroup, *, forced: bool = False) -> Event | None:
        """Move ``group`` here from the domain it is in.

        Where the host can do that in one step, it does. Otherwise the
        mapper forgets the old domain and gets every mapping of this one. When
        the host refuses one of them the old domain is put back, unless the move is
        ``forced``: then the mapper stays empty and the group in its old domain.
        Returns the resolution event when the client of the mapper held exported
        memory. A group that is out of order is put in order by a move that succeeds.

        Raises:
            BackendError: The host refused; the group is where it was.
            GuestError: UNSUPP when the mapper can't leave a domain and is not forced
                to; INVAL when the host keeps an IOVA of this domain for itself.
            InternalError: The old domain could not be put back: the group is broken.
        """
        old = group.domain
        if old is self and not group.broken:
            return None
        if not forced and self._switch(group):
            self._adopt(group)
            return None
        resolution = None
        if old.holds_mappings or old.shares_space(group) or group.broken:
            if not forced and not group.mapper.supports_detach():
                raise GuestError(Status.UNSUPP, f"mapper {group.mapper.id()} can't be detached")
            resolution = group.empty()
        try:
            self._load(group)
        except (BackendError, GuestError):
            if not forced:
                old.restore(group)
            raise
        self._adopt(group)
        return resolution

    @property
    def holds_mappings(self) -> bool:
        """Whether a mapper in this domain has anything mapped."""
        return self.kind is DomainKind.BYPASS or len(self.map) > 0

    def shares_space(self, group: EndpointGroup) -> bool:
        """Whether the mapper of another group here has joined the space of this one."""
        number = group.mapper.id()
        return any(mate.mapper.id() == number for mate in self.groups if mate is not group)

    def restore(self, group: EndpointGroup) -> None:
        """Load this domain into ``group``'s emptied mapper again after a failed move."""
        try:
            if group.broken:
                group.empty()
            self._load(group)
        except (BackendError, GuestError) as error:
            group.quarantine(f"putting its domain back failed ({error})")
            raise InternalError(f"mapper {group.mapper.id()}: {group.broken}") from error
        group.broken = None

    def quarantine(self, group: EndpointGroup, why: str) -> Event | None:
        """Quarantine a group and those here whose mappers share its address space.

        Returns a resolution event, if the client of ``group`` must let go of something.
        """
        number = group.mapper.id()
        mates = [mate for mate in self.groups if mate is not group and mate.mapper.id() == number]
        resolution = group.quarantine(why)
        for mate in mates:
            mate.quarantine(why)
        return resolution

    def take_back(self, group: EndpointGroup) -> Event | None:
        """Take back a group whose mapper refused, after all, the domain that it went to.

        It is here afterwards in any case, broken if it can't be put right.
        Returns a resolution event as :meth:`take` does.
        """
        switched = self._switch(group)
        self._adopt(group)
        resolution = None
        if not switched:
            try:
                resolution = group.empty()
                self._load(group)
            except (BackendError, GuestError) as error:
                resolution = group.quarantine(f"putting its domain back failed ({error})")
        return resolution

    def map_range(self, mapping: MappingInfo) -> None:
        """Add ``mapping`` to the domain and to each of its mappers, or to none.

        Raises:
            GuestError: INVAL when it overlaps a mapping.
            BackendError: A host refused; the mappers before it were undone.
        """
        self._check_in_order()
        if not self.map.add(mapping):
            raise GuestError(Status.INVAL, f"{mapping} overlaps a mapping of domain {self.id}")
        spaces = self._spaces()
        for done, group in enumerate(spaces):
            try:
                _add(group.mapper, mapping)
            except (BackendError, GuestError):
                for earlier in spaces[:done]:
                    self._undo_add(earlier, mapping)
                self.map.remove(mapping.iova, mapping.iova + mapping.size)
                raise

    def take_out(self, mapping: MappingInfo) -> list[Event]:
        """Undo :meth:`map_range`, because a mapper refused the mapping after all.

        A mapper that can't undo it is broken. Clients may have exported the mapping
        already: returns the resolution events to wait for.
        """
        self.map.remove(mapping.iova, mapping.iova + mapping.size)
        waits = [self._undo_add(group, mapping) for group in self._spaces()]
        return [event for event in waits if event is not None]

    def unmap_range(self, start: int, end: int) -> list[Event]:
        """Remove every mapping inside ``[start, end)`` from the domain and its mappers.

        Returns the resolution events to wait for before the guest may be told.
        A mapper is told of whole mappings only: the edges of the range may be
        anywhere in a gap.

        Raises:
            GuestError: RANGE when a mapping would be split; nothing is removed.
            BackendError: A host refused; what was removed before is mapped again.
        """
        removed = self.map.remove(start, end)
        if removed is None:
            raise GuestError(Status.RANGE, f"[{start:#x}, {end:#x}) would split a mapping")
        if not removed:
            return []
        first, last = removed[0], removed[-1]
        waits: list[Event] = []
        done: list[EndpointGroup] = []
        for group in self._spaces():
            try:
                if group.broken:
                    # It must hold nothing, but its client may still have to let go.
                    resolution = group.empty()
                else:
                    resolution = _remove(group.mapper, first.iova, last.iova + last.size)
                    done.append(group)
            except (BackendError, InternalError):
                for mapping in removed:
                    self.map.add(mapping)
                for earlier in done:
                    self._undo_removal(earlier, removed)
                raise
            if resolution is not None:
                waits.append(resolution)
        return waits

    def _check_in_order(self) -> None:
        for group in self.groups:
            if group.broken:
                raise InternalError(f"mapper {group.mapper.id()} is out of order: {group.broken}")

    def _spaces(self) -> list[EndpointGroup]:
        """Return one group for each distinct address space: some mappers share theirs."""
        if len(self.groups) < 2:
            return self.groups
        spaces: dict[int, EndpointGroup] = {}
        for group in self.groups:
            spaces.setdefault(group.mapper.id(), group)
        return list(spaces.values())

    def _adopt(self, group: EndpointGroup) -> None:
        """List a group whose mapper holds this domain."""
        group.domain.groups.remove(group)
        if group.deferred is not None:
            group.domain.deferred.remove(group)
        self._list(group)
        group.domain = self
        group.broken = None

    def _list(self, group: EndpointGroup) -> None:
        self.groups.append(group)
        if group.deferred is not None:
            self.deferred.append(group)

    def _switch(self, group: EndpointGroup) -> bool:
        """Have a mapper go from its domain to this one in one step, if it can."""
        if DomainKind.BLOCKED in {self.kind, group.domain.kind} or group.broken:
            return False
        if not isinstance(group.mapper, SwitchingMapper):
            return False
        return group.mapper.switch(self._wanted(group), self._mates(group))

    def _wanted(self, group: EndpointGroup) -> Iterable[MappingInfo]:
        """Return what the mapper of a group here must hold."""
        return group.identity() if self.kind is DomainKind.BYPASS else self.map

    def _mates(self, group: EndpointGroup) -> list[MemoryMapper]:
        """Return the mappers here whose address space a group may share."""
        return [
            mate.mapper
            for mate in self.groups
            if mate is not group and not mate.broken and mate.reserved == group.reserved
        ]

    def _load(self, group: EndpointGroup) -> None:
        """Give an empty mapper this domain's mappings, or leave it empty (or broken)."""
        if self.kind is not DomainKind.BLOCKED and any(
            group.mapper.join(mate) for mate in self._mates(group)
        ):
            return
        done: list[MappingInfo] = []
        for mapping in self._wanted(group):
            try:
                _add(group.mapper, mapping)
            except (BackendError, GuestError):
                for earlier in reversed(done):
                    self._undo_add(group, earlier)
                raise
            done.append(mapping)

    def _undo_add(self, group: EndpointGroup, mapping: MappingInfo) -> Event | None:
        """Undo one add; a mapper that can't is emptied, and not to be trusted any more."""
        if group.broken:
            return None
        try:
            return group.mapper.remove_map(mapping.iova, mapping.size).resolution
        except BackendError as error:
            return self.quarantine(group, f"undoing {mapping} failed ({error})")

    def _undo_removal(self, group: EndpointGroup, mappings: Iterable[MappingInfo]) -> None:
        """Undo a removal; a mapper that can't is emptied, and not to be trusted any more."""
        try:
            for mapping in mappings:
                _add(group.mapper, mapping)
        except (BackendError, GuestError) as error:
            self.quarantine(group, f"restoring {mapping} failed ({error})")

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken."""
        if isinstance(self.map, IntervalMap):
            self.map._check()  # noqa: SLF001 - the invariants of our own part
        if self.kind is not DomainKind.TRANSLATING and len(self.map):
            raise InternalError(f"a {self.kind.value} domain has mappings: {list(self.map)}")
        for group in self.groups:
            if group.domain is not self:
                raise InternalError(f"mapper {group.mapper.id()} is listed in two domains")
        if self.deferred != [group for group in self.groups if group.deferred is not None]:
            raise InternalError(f"{len(self.deferred)} deferred mappers listed, others there")
        for endpoint in self.endpoints.values():
            if endpoint.domain is not self or endpoint.group not in self.groups:
                raise InternalError(f"endpoint {endpoint.id} is attached elsewhere")


def _add(mapper: MemoryMapper, mapping: MappingInfo) -> None:
    if mapper.add_map(mapping) is AddMapResult.OVERLAP_FAILURE:
        # The domain's own map is free here, so the host keeps this range for itself.
        raise GuestError(Status.INVAL, f"{mapping} overlaps what mapper {mapper.id()} holds")


def _remove(mapper: MemoryMapper, start: int, end: int) -> Event | None:
    ok, resolution = mapper.remove_map(start, end - start)
    if not ok:
        raise InternalError(f"mapper {mapper.id()} would split a mapping its domain doesn't have")
    return resolution


def sorted_reserved(regions: Iterable[ReservedRegion]) -> tuple[ReservedRegion, ...]:
    """Return ``regions`` by rising address.

    Raises:
        UsageError: PROBE must not say this: an empty or overlapping region, or a
            second MSI region (virtio 1.2, 5.13.6.8.1).
    """
    ordered = tuple(sorted(regions))
    at = 0
    for region in ordered:
        if not at <= region.start < region.end <= ADDRESS_SPACE_END:
            raise UsageError(f"reserved {region} is empty, overlaps another or passes 2**64")
        at = region.end
    if sum(region.kind is ReservedKind.MSI for region in ordered) > 1:
        raise UsageError(f"more than one MSI region in {ordered}")
    return ordered
