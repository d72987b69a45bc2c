"""Domains and endpoints: who is attached where, replay and rollback (half-open ranges).

Every endpoint is always in exactly one domain: the *blocked* domain, a *bypass*
domain (identity), or a *translating* one. Endpoints that the host can't tell
apart share one mapper and so form one :class:`EndpointGroup`, which is what a
domain really programs.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import Access, BackendError, GuestError, InternalError, UsageError
from viommu.iova import ADDRESS_SPACE_END, AddressMap, IntervalMap
from viommu.mapper import AddMapResult, MappingInfo
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
    """The endpoints behind one mapper, and the domain that the mapper is programmed with."""

    def __init__(self, mapper: MemoryMapper, domain: Domain) -> None:
        self.mapper = mapper
        self.domain = domain
        self.endpoints: list[Endpoint] = []
        # Why the mapper can no longer be trusted to hold what its domain says.
        self.broken: str | None = None

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
        self.endpoints: dict[int, Endpoint] = {}

    def add_group(self, mapper: MemoryMapper) -> EndpointGroup:
        """Return a new group for ``mapper``, programmed with this domain.

        Raises:
            BackendError: The host refused this domain's mappings.
        """
        group = EndpointGroup(mapper, self)
        self._load(mapper)
        self.groups.append(group)
        return group

    def take(self, group: EndpointGroup) -> Event | None:
        """Move ``group`` here from the domain it is in.

        Its mapper forgets the old domain and gets every mapping of this one; when
        the host refuses one of them the old domain is put back. Returns the
        resolution event when the client of the mapper held exported memory.

        Raises:
            BackendError: The host refused; the group is where it was.
            GuestError: UNSUPP when the mapper can't leave a domain.
            InternalError: The old domain could not be put back: the group is broken.
        """
        old = group.domain
        if old is self:
            return None
        if group.broken:
            raise InternalError(f"mapper {group.mapper.id()} is out of order: {group.broken}")
        resolution = None
        if old.holds_mappings or old.shares_space(group):
            if not group.mapper.supports_detach():
                raise GuestError(Status.UNSUPP, f"mapper {group.mapper.id()} can't be detached")
            resolution = group.mapper.reset_domain()
        try:
            self._load(group.mapper)
        except (BackendError, GuestError):
            old.restore(group)
            raise
        old.groups.remove(group)
        self.groups.append(group)
        group.domain = self
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
            self._load(group.mapper)
        except (BackendError, GuestError) as error:
            group.broken = f"putting its domain back failed ({error})"
            raise InternalError(f"mapper {group.mapper.id()}: {group.broken}") from error

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
                    _remove_or_break(earlier, mapping)
                self.map.remove(mapping.iova, mapping.iova + mapping.size)
                raise

    def unmap_range(self, start: int, end: int) -> list[Event]:
        """Remove every mapping inside ``[start, end)`` from the domain and its mappers.

        Returns the resolution events to wait for before the guest may be told.

        Raises:
            GuestError: RANGE when a mapping would be split; nothing is removed.
            BackendError: A host refused; what was removed before is mapped again.
        """
        self._check_in_order()
        removed = self.map.remove(start, end)
        if removed is None:
            raise GuestError(Status.RANGE, f"[{start:#x}, {end:#x}) would split a mapping")
        if not removed:
            return []
        waits: list[Event] = []
        spaces = self._spaces()
        for done, group in enumerate(spaces):
            try:
                resolution = _remove(group.mapper, start, end)
            except (BackendError, InternalError):
                for mapping in removed:
                    self.map.add(mapping)
                    for earlier in spaces[:done]:
                        _add_or_break(earlier, mapping)
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

    def _load(self, mapper: MemoryMapper) -> None:
        """Give an empty mapper this domain's mappings, or leave it empty."""
        if self.kind is not DomainKind.BLOCKED and any(
            mapper.join(mate.mapper) for mate in self.groups if mate.mapper is not mapper
        ):
            return
        if self.kind is DomainKind.BYPASS:
            _add(mapper, IDENTITY)
            return
        done: list[MappingInfo] = []
        for mapping in self.map:
            try:
                _add(mapper, mapping)
            except (BackendError, GuestError):
                for earlier in reversed(done):
                    mapper.remove_map(earlier.iova, earlier.size)
                raise
            done.append(mapping)

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken."""
        if isinstance(self.map, IntervalMap):
            self.map._check()  # noqa: SLF001 - the invariants of our own part
        if self.kind is not DomainKind.TRANSLATING and len(self.map):
            raise InternalError(f"a {self.kind.value} domain has mappings: {list(self.map)}")
        for group in self.groups:
            if group.domain is not self:
                raise InternalError(f"mapper {group.mapper.id()} is listed in two domains")
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


def _remove_or_break(group: EndpointGroup, mapping: MappingInfo) -> None:
    """Undo one add; a mapper that can't is not to be trusted any more."""
    try:
        group.mapper.remove_map(mapping.iova, mapping.size)
    except BackendError as error:
        group.broken = f"undoing {mapping} failed ({error})"


def _add_or_break(group: EndpointGroup, mapping: MappingInfo) -> None:
    """Undo one removal; a mapper that can't is not to be trusted any more."""
    try:
        _add(group.mapper, mapping)
    except (BackendError, GuestError) as error:
        group.broken = f"restoring {mapping} failed ({error})"


def sorted_reserved(regions: Iterable[ReservedRegion]) -> tuple[ReservedRegion, ...]:
    """Return ``regions`` by rising address.

    Raises:
        UsageError: PROBE must not say this: an empty or overlapping region, or a
            second MSI region (virtio 1.2, 5.13.6.7.1).
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
