"""The virtio-iommu device without any I/O: one request in, one reply out.

Inclusive ends on the wire become half-open ranges in :meth:`VirtioIommu._map`
and :meth:`VirtioIommu._unmap`, nowhere else.

Source: virtio 1.2, 5.13 "IOMMU device".
"""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from viommu.config import IommuConfig, Limits
from viommu.domain import (
    X86_MSI_WINDOW,
    Domain,
    DomainKind,
    Endpoint,
    EndpointGroup,
    sorted_reserved,
)
from viommu.errors import Access, GuestError, InternalError, UsageError, ViommuError, status_of
from viommu.iova import ADDRESS_SPACE_END
from viommu.mapper import MappingInfo
from viommu.settlement import REPLIES, Parked, Refusal, break_groups, refusals_of, settle, unsettled
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from viommu.domain import ReservedRegion
    from viommu.errors import TranslationFault
    from viommu.events import Event
    from viommu.mapper import MemoryMapper

__all__ = ["IommuConfig", "Limits", "Parked", "VirtioIommu"]

_log: Final = logging.getLogger(__name__)

# One bit each: every feature of the standard but the old F_BYPASS, which a device
# must not offer beside BYPASS_CONFIG.
FEATURES: Final = sum(
    1 << feature
    for feature in (
        Feature.INPUT_RANGE,
        Feature.DOMAIN_RANGE,
        Feature.MAP_UNMAP,
        Feature.PROBE,
        Feature.MMIO,
        Feature.BYPASS_CONFIG,
    )
)

_CONFIG_BYPASS: Final = spec.Config.bypass.offset  # type: ignore[attr-defined]

_OK: Final = REPLIES[Status.OK]

# A MAP's flags are two bits of protection; the MMIO bit says what is mapped.
_PROT: Final = {
    0: Access.NONE,
    spec.MAP_F_READ: Access.READ,
    spec.MAP_F_WRITE: Access.WRITE,
    spec.MAP_F_READ | spec.MAP_F_WRITE: Access.READ | Access.WRITE,
}


class VirtioIommu:
    """Endpoints, domains and requests of one virtio-iommu.

    :meth:`handle` takes the bytes of one request and returns those of its reply.
    The owner moves them from and to a virtqueue, waits for what is
    :class:`Parked`, and carries faults to the event queue (:meth:`take_fault`).
    No method but those that configure the device raises for what a guest sends.
    """

    def __init__(self, config: IommuConfig | None = None) -> None:
        self.config = config or IommuConfig()
        self.features = FEATURES
        self.bypass = self.config.boot_bypass
        self.endpoints: dict[int, Endpoint] = {}
        self.domains: dict[int, Domain] = {}
        self.mappings = 0
        self.requests = 0
        self.refused = 0
        self.faults = 0
        self.faults_dropped = 0
        self._blocked = Domain(DomainKind.BLOCKED)
        self._bypassed = Domain(DomainKind.BYPASS)
        self._groups: list[EndpointGroup] = []
        # Moved by no request, and their mappers have not told us how that ended.
        self._unheard: list[EndpointGroup] = []
        self._pending: deque[bytes] = deque()
        self._listening = False
        self._granule_mask = (self.config.page_size_mask & -self.config.page_size_mask) - 1
        self._handlers: dict[int, Callable[[bytes], bytes | Parked]] = {
            RequestType.ATTACH: self._attach,
            RequestType.DETACH: self._detach,
            RequestType.MAP: self._map,
            RequestType.UNMAP: self._unmap,
        }
        self._on_fault: Callable[[], None] | None = None

    # -- configuration ------------------------------------------------------

    def add_endpoint(
        self,
        endpoint_id: int,
        mapper: MemoryMapper,
        *,
        reserved: Iterable[ReservedRegion] = (X86_MSI_WINDOW,),
    ) -> Endpoint:
        """Put an endpoint behind this device, unattached.

        ``reserved`` is what PROBE reports and MAP refuses. Endpoints given the same
        mapper are those that the host can't tell apart.

        Raises:
            UsageError: The id is taken or no 32-bit number, the mapper can't map the
                granule, or the regions don't fit into ``probe_size``.
            BackendError: The host refused the identity map of an endpoint in bypass.
        """
        if not 0 <= endpoint_id < 1 << 32 or endpoint_id in self.endpoints:
            raise UsageError(f"endpoint id {endpoint_id:#x} is taken or not a 32-bit number")
        granule = self._granule_mask + 1
        if not mapper.get_mask() & granule:
            raise UsageError(
                f"mapper {mapper.id()} maps pages {mapper.get_mask():#x}, not the granule "
                f"{granule:#x}"
            )
        regions = sorted_reserved(reserved)
        if len(regions) * spec.RESV_MEM.size > self.config.probe_size:
            raise UsageError(
                f"{len(regions)} reserved regions don't fit into probe_size "
                f"{self.config.probe_size}"
            )
        group = next((group for group in self._groups if group.mapper is mapper), None)
        if group is None:
            group = self._unattached.add_group(mapper, regions)
            self._groups.append(group)
            self._hear_of(group)
        elif group.reserved != regions:
            raise UsageError(f"endpoints of mapper {mapper.id()} differ in reserved regions")
        endpoint = Endpoint(endpoint_id, group, regions)
        endpoint.group.endpoints.append(endpoint)
        self.endpoints[endpoint_id] = endpoint
        return endpoint

    def on_fault(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever :meth:`take_fault` may have something new."""
        self._on_fault = callback

    def accept_features(self, features: int) -> None:
        """Take note of the features the driver accepted (a mask)."""
        self.features = features & FEATURES

    def config_bytes(self) -> bytes:
        """Return the 40 bytes of ``struct virtio_iommu_config``."""
        start, end = self.config.input_range
        first, last = self.config.domain_range
        return spec.CONFIG.pack(
            self.config.page_size_mask,
            start,
            end - 1,
            first,
            last - 1,
            self.config.probe_size,
            self.bypass,
        )

    def write_config(self, offset: int, data: bytes) -> list[Event]:
        """Take a write of the driver to the configuration; only ``bypass`` can be written.

        A value other than 0 and 1 is ignored, so that the field never shows one.

        Returns events: of exports that this revoked, and of mappers that answer later.
        A register write has no reply that could wait for them: the next request should
        not be taken before they fire and :meth:`settle` returns no more, so that at
        least its reply says that memory is free.
        """
        at = _CONFIG_BYPASS - offset
        if not 0 <= at < len(data) or not self.features >> Feature.BYPASS_CONFIG & 1:
            return []
        if data[at] > 1 or data[at] == self.bypass:
            return []
        return self._set_bypass(bool(data[at])) + self.settle()

    # -- resets -------------------------------------------------------------

    def reset(self) -> list[Event]:
        """Reset the device: no endpoint is attached, no domain exists; ``bypass`` stays.

        Returns events: of exports that this revoked, and of mappers that answer later.
        Until they have fired and :meth:`settle` returns no more, endpoints may still be
        using memory that the guest thinks is its own. A request that is parked is not
        to be concluded.
        """
        return self._reset() + self.settle()

    def _reset(self) -> list[Event]:
        waits: list[Event] = []
        for domain in list(self.domains.values()):
            for endpoint in list(domain.endpoints.values()):
                del domain.endpoints[endpoint.id]
                endpoint.domain = None
            for group in list(domain.groups):
                self._release_group(group, waits)
        # A DETACH may have been parked: its mapper is to be heard as well.
        for group in self._groups:
            self._hear_of(group)
        self.domains.clear()
        self.mappings = 0
        self.features = FEATURES
        self._pending.clear()
        self._listening = False
        return waits

    def system_reset(self) -> list[Event]:
        """Reset the device and restore ``bypass`` to what it is at boot."""
        waits = self._reset()
        if self.bypass != self.config.boot_bypass:
            waits += self._set_bypass(self.config.boot_bypass)
        return waits + self.settle()

    def settle(self) -> list[Event]:
        """Hear what became of resets, of writes of ``bypass``, and of adding endpoints.

        Their mappers may answer later. An endpoint whose mapper refuses bypass is
        blocked. To be called when the events of those calls have fired, and before the
        first request. Returns further events: call it again when they have fired.
        """
        waits: list[Event] = []
        unheard, self._unheard = self._unheard, []
        for group in unheard:
            events = unsettled([group])
            if not events and (refusals := refusals_of([group])):
                _log.warning("mapper %d refuses bypass: %s", group.mapper.id(), refusals[0].error)
                if group.domain is self._bypassed:
                    self._force(group, self._blocked, waits)
                events = unsettled([group])
            if events:
                self._unheard.append(group)
                waits += events
        return waits

    def _hear_of(self, group: EndpointGroup) -> None:
        if group.deferred is not None and group not in self._unheard:
            self._unheard.append(group)

    # -- requests -----------------------------------------------------------

    def handle(self, request: bytes, writable: int) -> bytes | Parked:
        """Carry out one request.

        Args:
            request: The device-readable bytes of the buffer.
            writable: How many device-writable bytes the buffer has.

        Returns:
            What to write from the start of the writable part; its length is the
            used length. Empty for what can't be understood or answered (virtio
            1.2, 5.13.6: unknown types). A :class:`Parked` request is answered later.
        """
        self.requests += 1
        self._listening = True
        if not request or writable < spec.TAIL_SIZE:
            self.refused += 1
            return b""
        kind = request[0]
        handler = self._handlers.get(kind)
        if handler is None:
            if kind == RequestType.PROBE:
                return self._probe(request, writable)
            self.refused += 1
            return b""
        try:
            return handler(request)
        except ViommuError as error:
            self.refused += 1
            return REPLIES[status_of(error)]

    def _attach(self, request: bytes) -> bytes | Parked:
        if len(request) < spec.ATTACH.size:
            return self._unparsable()
        _, domain_id, endpoint_id, flags, reserved = spec.ATTACH.unpack_from(request)
        if reserved:
            raise GuestError(Status.INVAL, f"ATTACH with reserved bits {reserved:#x}")
        known = spec.ATTACH_F_BYPASS if self.features >> Feature.BYPASS_CONFIG & 1 else 0
        if flags & ~known:
            raise GuestError(Status.INVAL, f"ATTACH with unknown flags {flags:#x}")
        endpoint = self._endpoint(endpoint_id)
        first, end = self.config.domain_range
        if not first <= domain_id < end:
            raise GuestError(Status.RANGE, f"domain {domain_id} is outside [{first}, {end})")
        kind = DomainKind.BYPASS if flags & spec.ATTACH_F_BYPASS else DomainKind.TRANSLATING
        domain = self.domains.get(domain_id)
        if domain is None:
            return self._attach_to_new(endpoint, domain_id, kind)
        if domain.kind is not kind:
            raise GuestError(Status.INVAL, f"domain {domain_id} is {domain.kind.value}")
        if endpoint.domain is domain and not endpoint.group.broken:
            return _OK
        self._check_compatible(endpoint, domain)
        return self._move(endpoint, domain)

    def _attach_to_new(
        self, endpoint: Endpoint, domain_id: int, kind: DomainKind
    ) -> bytes | Parked:
        # A domain that nobody is left behind in is destroyed: it makes room.
        if len(self.domains) >= self.config.limits.domains and not _leaves_none(endpoint):
            raise GuestError(Status.NOMEM, f"limit of {self.config.limits.domains} domains")
        return self._move(endpoint, Domain(kind, domain_id))

    def _check_compatible(self, endpoint: Endpoint, domain: Domain) -> None:
        """Refuse an endpoint whose PROBE says other things than those of its new mates."""
        if domain.kind is DomainKind.BYPASS:
            return
        for mate in domain.endpoints.values():
            if mate is not endpoint and mate.reserved != endpoint.reserved:
                raise GuestError(
                    Status.UNSUPP,
                    f"endpoint {endpoint.id:#x} has other reserved regions than {mate.id:#x}",
                )

    def _move(self, endpoint: Endpoint, domain: Domain) -> bytes | Parked:
        """Attach an endpoint to a domain that is not its own.

        Endpoints that the host can't tell apart move together once they are in
        one domain; one that is in none can only join its mates.
        """
        group = endpoint.group
        mates = [mate for mate in group.endpoints if mate.attached and mate is not endpoint]
        if mates and group.domain is not domain and endpoint.domain is None:
            raise GuestError(
                Status.UNSUPP,
                f"endpoint {endpoint.id:#x} shares an address space with {mates[0].id:#x}, "
                "which is in another domain",
            )
        moving = [endpoint] if group.domain is domain else [endpoint, *mates]
        return self._change(
            [group] if group.deferred else [],
            partial(self._enter, group, moving, domain),
            partial(self._go_back, group, group.domain, [(each, each.domain) for each in moving]),
        )

    def _detach(self, request: bytes) -> bytes | Parked:
        if len(request) < spec.DETACH.size:
            return self._unparsable()
        _, domain_id, endpoint_id = spec.DETACH.unpack_from(request)
        endpoint = self._endpoint(endpoint_id)
        group, domain = endpoint.group, endpoint.domain
        if domain is None or domain.id != domain_id:
            raise GuestError(
                Status.INVAL, f"endpoint {endpoint_id:#x} is not attached to domain {domain_id}"
            )
        if not group.moves_alone(endpoint):
            raise GuestError(
                Status.UNSUPP, f"endpoint {endpoint_id:#x} shares an address space with others"
            )
        return self._change(
            [group] if group.deferred else [],
            partial(self._enter, group, [endpoint], self._unattached),
            partial(self._go_back, group, group.domain, [(endpoint, domain)]),
        )

    def _map(self, request: bytes) -> bytes | Parked:
        if len(request) < spec.MAP.size:
            return self._unparsable()
        _, domain_id, start, last, gpa, flags = spec.MAP.unpack_from(request)
        prot = _PROT.get(flags)
        if prot is None:
            known = spec.MAP_F_READ | spec.MAP_F_WRITE
            if self.features >> Feature.MMIO & 1:
                known |= spec.MAP_F_MMIO
            if flags & ~known:
                raise GuestError(Status.INVAL, f"MAP with unknown flags {flags:#x}")
            prot = _PROT[flags & ~spec.MAP_F_MMIO]
        domain = self._translating(domain_id)
        if last < start:
            raise GuestError(Status.INVAL, f"MAP of [{start:#x}, {last:#x}] ends before it begins")
        end = last + 1
        if (start | end | gpa) & self._granule_mask:
            raise GuestError(
                Status.RANGE,
                f"MAP of [{start:#x}, {last:#x}] to {gpa:#x}: granule {self._granule_mask + 1:#x}",
            )
        self._check_input_range(start, end)
        size = end - start
        if gpa + size > ADDRESS_SPACE_END:
            raise GuestError(Status.RANGE, f"MAP of {size:#x} bytes to {gpa:#x} passes 2**64")
        for endpoint in domain.endpoints.values():
            for region in endpoint.reserved:
                if start < region.end and region.start < end:
                    raise GuestError(Status.INVAL, f"MAP of [{start:#x}, {end:#x}) over {region}")
        limits = self.config.limits
        if len(domain.map) >= limits.mappings_per_domain or self.mappings >= limits.mappings:
            raise GuestError(Status.NOMEM, f"limit of mappings reached, {self.mappings} in all")
        mapping = MappingInfo(start, gpa, size, prot)
        if domain.deferred:
            return self._change(
                [*domain.deferred],
                partial(self._add, domain, mapping),
                partial(self._take_out, domain, mapping),
            )
        domain.map_range(mapping)
        self.mappings += 1
        return _OK

    def _unmap(self, request: bytes) -> bytes | Parked:
        if len(request) < spec.UNMAP.size:
            return self._unparsable()
        _, domain_id, start, last = spec.UNMAP.unpack_from(request)
        domain = self._translating(domain_id)
        if last < start:
            raise GuestError(
                Status.INVAL, f"UNMAP of [{start:#x}, {last:#x}] ends before it begins"
            )
        self._check_input_range(start, last + 1)
        if domain.deferred:
            return self._change([*domain.deferred], partial(self._remove, domain, start, last + 1))
        waits = self._remove(domain, start, last + 1)
        return Parked(waits, _OK) if waits else _OK

    def _probe(self, request: bytes, writable: int) -> bytes:
        """Answer PROBE: ``probe_size`` bytes of properties, then the tail."""
        size = self.config.probe_size
        if len(request) < spec.PROBE.size:
            return self._unparsable()
        if writable < size + spec.TAIL_SIZE:
            self.refused += 1
            return bytes(writable - spec.TAIL_SIZE) + REPLIES[Status.INVAL]
        _, endpoint_id = spec.PROBE.unpack_from(request)
        endpoint = self.endpoints.get(endpoint_id)
        if endpoint is None:
            self.refused += 1
            return bytes(size) + REPLIES[Status.NOENT]
        length = spec.RESV_MEM.size - 4
        properties = b"".join(
            [
                spec.RESV_MEM.pack(spec.PROBE_T_RESV_MEM, length, kind, start, end - 1)
                for start, end, kind in endpoint.reserved
            ]
        )
        return properties.ljust(size, b"\0") + _OK

    def _unparsable(self) -> bytes:
        self.refused += 1
        return b""

    def _endpoint(self, endpoint_id: int) -> Endpoint:
        endpoint = self.endpoints.get(endpoint_id)
        if endpoint is None:
            raise GuestError(Status.NOENT, f"no endpoint {endpoint_id:#x}")
        return endpoint

    def _translating(self, domain_id: int) -> Domain:
        domain = self.domains.get(domain_id)
        if domain is None:
            raise GuestError(Status.NOENT, f"no domain {domain_id}")
        if domain.kind is not DomainKind.TRANSLATING:
            raise GuestError(Status.INVAL, f"domain {domain_id} is {domain.kind.value}")
        return domain

    def _check_input_range(self, start: int, end: int) -> None:
        low, high = self.config.input_range
        if start < low or end > high:
            raise GuestError(
                Status.RANGE,
                f"[{start:#x}, {end:#x}) is outside the input range [{low:#x}, {high:#x})",
            )

    # -- changes, and taking them back ----------------------------------------

    def _change(
        self,
        groups: list[EndpointGroup],
        do: Callable[[], list[Event]],
        undo: Callable[[list[Refusal]], list[Event]] | None = None,
    ) -> bytes | Parked:
        """Carry out what changes mappers; ``groups`` are those that answer later, if any.

        Failing, too, may have changed them and changed them back.
        """
        reply = _OK
        for group in groups:  # what they say from now on is about this request
            if group in self._unheard:
                self._unheard.remove(group)
        try:
            waits = do()
        except ViommuError as error:
            if not groups:
                raise
            self.refused += 1
            waits, reply, undo = [], REPLIES[status_of(error)], break_groups
        return settle(groups, waits, reply, undo)

    def _add(self, domain: Domain, mapping: MappingInfo) -> list[Event]:
        domain.map_range(mapping)
        self.mappings += 1
        return []

    def _take_out(
        self, domain: Domain, mapping: MappingInfo, refusals: list[Refusal]
    ) -> list[Event]:
        del refusals
        self.refused += 1
        self.mappings -= 1
        return domain.take_out(mapping)

    def _remove(self, domain: Domain, start: int, end: int) -> list[Event]:
        before = len(domain.map)
        waits = domain.unmap_range(start, end)
        self.mappings -= before - len(domain.map)
        return waits

    def _enter(
        self, group: EndpointGroup, moving: Iterable[Endpoint], domain: Domain
    ) -> list[Event]:
        """Put a group into a domain, and some of its endpoints; or into that of unattached ones."""
        resolution = domain.take(group)
        for endpoint in moving:
            self._file(endpoint, domain)
        return [] if resolution is None else [resolution]

    def _go_back(
        self,
        group: EndpointGroup,
        home: Domain,
        homes: Iterable[tuple[Endpoint, Domain | None]],
        refusals: list[Refusal],
    ) -> list[Event]:
        """Put a group back into its ``home``, and endpoints where they were."""
        self.refused += 1
        waits: list[Event] = []
        for endpoint, domain in homes:
            self._file(endpoint, domain)
        if home is group.domain:
            return break_groups(refusals)
        if home.id is None:
            # It may have been the other of the two: bypass may have been written meanwhile.
            self._release_group(group, waits)
            return waits
        resolution = home.take_back(group)
        return [] if resolution is None else [resolution]

    # -- endpoints between domains -------------------------------------------

    @property
    def _unattached(self) -> Domain:
        """The domain of endpoints that the guest has not attached."""
        return self._bypassed if self.bypass else self._blocked

    def _file(self, endpoint: Endpoint, domain: Domain | None) -> None:
        """List an endpoint in a domain of the guest's, which may be new, or in none."""
        self._forget(endpoint)
        if domain is None or domain.id is None:
            return
        endpoint.domain = domain
        domain.endpoints[endpoint.id] = endpoint
        if domain.id not in self.domains:
            self.domains[domain.id] = domain
            self.mappings += len(domain.map)

    def _forget(self, endpoint: Endpoint) -> None:
        """Take an endpoint off its domain's list; the last one takes the domain with it."""
        domain, endpoint.domain = endpoint.domain, None
        if domain is None or domain.id is None:
            return
        del domain.endpoints[endpoint.id]
        if not domain.endpoints:
            del self.domains[domain.id]
            self.mappings -= len(domain.map)

    def _release_group(self, group: EndpointGroup, waits: list[Event]) -> None:
        """Give a group back to the unattached endpoints' domain; it can't stay where it is.

        A host that refuses bypass leaves the endpoints blocked.
        """
        if not self._force(group, self._unattached, waits):
            self._force(group, self._blocked, waits)

    def _force(self, group: EndpointGroup, domain: Domain, waits: list[Event]) -> bool:
        """Move a group whether it can leave or not; return whether it is there."""
        try:
            resolution = domain.take(group, forced=True)
        except ViommuError as error:
            resolution = group.quarantine(f"leaving its domain failed ({error})")
            moved = False
        else:
            moved = True
        if resolution is not None:
            waits.append(resolution)
        return moved

    def _set_bypass(self, bypass: bool) -> list[Event]:  # noqa: FBT001 - it is the register's value
        waits: list[Event] = []
        leaving = self._unattached
        self.bypass = bypass
        for group in list(leaving.groups):
            self._release_group(group, waits)
            self._hear_of(group)
        return waits

    # -- faults -------------------------------------------------------------

    def report_fault(self, endpoint_id: int, fault: TranslationFault) -> None:
        """Queue a fault report for the event queue.

        The oldest reports are kept when the guest doesn't take them: what broke
        first explains most.
        """
        self.faults += 1
        if len(self._pending) >= self.config.limits.pending_faults:
            self.faults_dropped += 1
            return
        endpoint = self.endpoints.get(endpoint_id)
        reason = fault.reason
        if endpoint is None:
            reason = FaultReason.UNKNOWN
        elif endpoint.kind is DomainKind.BLOCKED:
            reason = FaultReason.DOMAIN
        # A transfer that passes the end of the address space has no such address.
        flags, address = spec.FAULT_F_ADDRESS, fault.iova
        if address >= ADDRESS_SPACE_END:
            flags = address = 0
        if Access.READ in fault.access:
            flags |= spec.FAULT_F_READ
        if Access.WRITE in fault.access:
            flags |= spec.FAULT_F_WRITE
        self._pending.append(spec.FAULT.pack(reason, flags, endpoint_id, address))
        if self._on_fault:
            self._on_fault()

    def take_fault(self) -> bytes | None:
        """Return the next fault report (24 bytes) and forget it, or ``None``.

        None is given out before the first request of a driver: Linux before 6.16
        follows a null pointer when a fault arrives while it still probes.
        """
        return self._pending.popleft() if self.fault_pending else None

    @property
    def fault_pending(self) -> bool:
        """Whether :meth:`take_fault` has a report to give."""
        return self._listening and bool(self._pending)

    # -- invariants ---------------------------------------------------------

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken."""
        for domain in (self._blocked, self._bypassed, *self.domains.values()):
            domain._check()  # noqa: SLF001 - the invariants of our own part
        for group in self._groups:
            if group not in group.domain.groups:
                raise InternalError(f"mapper {group.mapper.id()} is in no domain")
        for endpoint in self.endpoints.values():
            domain = endpoint.domain or self._unattached
            if endpoint.group.domain is not domain and endpoint.attached:
                raise InternalError(f"endpoint {endpoint.id:#x} is programmed elsewhere")
        total = sum(len(domain.map) for domain in self.domains.values())
        if total != self.mappings:
            raise InternalError(f"{self.mappings} mappings counted, {total} there")
        for number, domain in self.domains.items():
            if domain.id != number or not domain.endpoints:
                raise InternalError(f"domain {number} is empty or misfiled")


def _leaves_none(endpoint: Endpoint) -> bool:
    """Return whether the domain of ``endpoint`` is empty once its group has left it."""
    domain = endpoint.domain
    return domain is not None and len(domain.groups) == 1
