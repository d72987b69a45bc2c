"""The virtio-iommu device without any I/O: one request in, one reply out.

Inclusive ends on the wire become half-open ranges in :meth:`VirtioIommu._map`
and :meth:`VirtioIommu._unmap`, nowhere else.

Source: virtio 1.2, 5.13 "IOMMU device".
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from viommu.basic import DEFAULT_PAGE_SIZES
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
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from viommu.domain import ReservedRegion
    from viommu.errors import TranslationFault
    from viommu.events import Event
    from viommu.mapper import MemoryMapper

__all__ = ["IommuConfig", "Limits", "Parked", "VirtioIommu"]


@dataclass(frozen=True)
class Limits:
    """What a guest can make the device remember; beyond it requests get NOMEM.

    Linux uses a domain for each group and a mapping for each DMA in flight.
    Precedents: Cloud Hypervisor allows 2**16 domains and 2**20 mappings each.
    """

    domains: int = 4096
    mappings_per_domain: int = 1 << 20
    mappings: int = 1 << 21
    pending_faults: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"limit {name} must be positive, not {value}")


@dataclass(frozen=True)
class IommuConfig:
    """What the device offers. Ranges are half-open.

    ``page_size_mask`` has a bit for each page size, the lowest is the granule.
    ``input_range`` is the IOVAs that can be mapped, ``domain_range`` the domain
    numbers. ``boot_bypass``: unattached endpoints reach all of guest memory.
    """

    page_size_mask: int = DEFAULT_PAGE_SIZES
    input_range: tuple[int, int] = (0, 1 << 48)
    domain_range: tuple[int, int] = (0, 1 << 32)
    probe_size: int = 512
    boot_bypass: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 < self.page_size_mask < ADDRESS_SPACE_END:
            raise UsageError(
                f"page_size_mask needs a bit below 2**64, not {self.page_size_mask:#x}"
            )
        for name, (start, end), top in (
            ("input_range", self.input_range, ADDRESS_SPACE_END),
            ("domain_range", self.domain_range, 1 << 32),
        ):
            if not 0 <= start < end <= top:
                raise UsageError(f"{name} [{start:#x}, {end:#x}) is empty or passes {top:#x}")
        if not spec.RESV_MEM.size <= self.probe_size <= 1 << 16 or self.probe_size % 4:
            raise UsageError(f"probe_size {self.probe_size} is not a multiple of 4 in 24 to 65536")


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

_REPLIES: Final = [bytes((status, 0, 0, 0)) for status in range(len(Status))]
_OK: Final = _REPLIES[Status.OK]

# A MAP's flags are two bits of protection; the MMIO bit says what is mapped.
_PROT: Final = {
    0: Access.NONE,
    spec.MAP_F_READ: Access.READ,
    spec.MAP_F_WRITE: Access.WRITE,
    spec.MAP_F_READ | spec.MAP_F_WRITE: Access.READ | Access.WRITE,
}


class Parked:
    """A request whose reply waits until exported memory has been released.

    Wait until each of ``events`` is readable, then put ``reply`` on the used
    ring. Take no further request meanwhile.
    """

    __slots__ = ("events", "reply")

    def __init__(self, events: Sequence[Event], reply: bytes) -> None:
        self.events = tuple(events)
        self.reply = reply


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

        Returns the resolution events of exports that this revoked. A register write
        has no reply that could wait for them: the next request should not be taken
        before they fire, so that at least its reply says that memory is free.
        """
        at = _CONFIG_BYPASS - offset
        if not 0 <= at < len(data) or not self.features >> Feature.BYPASS_CONFIG & 1:
            return []
        if data[at] > 1 or data[at] == self.bypass:
            return []
        return self._set_bypass(bool(data[at]))

    # -- resets -------------------------------------------------------------

    def reset(self) -> list[Event]:
        """Reset the device: no endpoint is attached, no domain exists; ``bypass`` stays.

        Returns the resolution events of exports that this revoked: until they
        fire, endpoints may still be using memory that the guest thinks is its own.
        """
        waits: list[Event] = []
        for domain in list(self.domains.values()):
            for endpoint in list(domain.endpoints.values()):
                del domain.endpoints[endpoint.id]
                endpoint.domain = None
            for group in list(domain.groups):
                self._release_group(group, waits)
        self.domains.clear()
        self.mappings = 0
        self.features = FEATURES
        self._pending.clear()
        self._listening = False
        return waits

    def system_reset(self) -> list[Event]:
        """Reset the device and restore ``bypass`` to what it is at boot."""
        waits = self.reset()
        if self.bypass != self.config.boot_bypass:
            waits += self._set_bypass(self.config.boot_bypass)
        return waits

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
            return _REPLIES[status_of(error)]

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
        domain = Domain(kind, domain_id)
        reply = self._move(endpoint, domain)
        self.domains[domain_id] = domain
        return reply

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
        resolution = domain.take(group)
        for each in moving:
            self._forget(each)
            each.domain = domain
            domain.endpoints[each.id] = each
        return _OK if resolution is None else Parked([resolution], _OK)

    def _detach(self, request: bytes) -> bytes | Parked:
        if len(request) < spec.DETACH.size:
            return self._unparsable()
        _, domain_id, endpoint_id = spec.DETACH.unpack_from(request)
        endpoint = self._endpoint(endpoint_id)
        if endpoint.domain is None or endpoint.domain.id != domain_id:
            raise GuestError(
                Status.INVAL, f"endpoint {endpoint_id:#x} is not attached to domain {domain_id}"
            )
        if not endpoint.group.moves_alone(endpoint):
            raise GuestError(
                Status.UNSUPP, f"endpoint {endpoint_id:#x} shares an address space with others"
            )
        resolution = self._unattached.take(endpoint.group)
        self._forget(endpoint)
        return _OK if resolution is None else Parked([resolution], _OK)

    def _map(self, request: bytes) -> bytes:
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
        domain.map_range(MappingInfo(start, gpa, size, prot))
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
        before = len(domain.map)
        waits = domain.unmap_range(start, last + 1)
        self.mappings -= before - len(domain.map)
        return Parked(waits, _OK) if waits else _OK

    def _probe(self, request: bytes, writable: int) -> bytes:
        """Answer PROBE: ``probe_size`` bytes of properties, then the tail."""
        size = self.config.probe_size
        if len(request) < spec.PROBE.size:
            return self._unparsable()
        if writable < size + spec.TAIL_SIZE:
            self.refused += 1
            return bytes(writable - spec.TAIL_SIZE) + _REPLIES[Status.INVAL]
        _, endpoint_id = spec.PROBE.unpack_from(request)
        endpoint = self.endpoints.get(endpoint_id)
        if endpoint is None:
            self.refused += 1
            return bytes(size) + _REPLIES[Status.NOENT]
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

    # -- endpoints between domains -------------------------------------------

    @property
    def _unattached(self) -> Domain:
        """The domain of endpoints that the guest has not attached."""
        return self._bypassed if self.bypass else self._blocked

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
        for domain in (self._unattached, self._blocked):
            try:
                resolution = domain.take(group, forced=True)
            except ViommuError as error:
                group.quarantine(f"leaving its domain failed ({error})")
            else:
                if resolution is not None:
                    waits.append(resolution)
                return

    def _set_bypass(self, bypass: bool) -> list[Event]:  # noqa: FBT001 - it is the register's value
        waits: list[Event] = []
        leaving = self._unattached
        self.bypass = bypass
        for group in list(leaving.groups):
            self._release_group(group, waits)
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
