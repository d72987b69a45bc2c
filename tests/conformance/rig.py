"""A device under test, driven byte by byte (requests carry inclusive ends, as the wire does).

:meth:`Rig.send` is the one place through which requests go. Besides returning the
reply it asserts what holds for every reply: the used length, zeroes in the tail's
padding, the device's own invariants, that every mapper holds what its domain says,
and that a request which was not successful changed nothing at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.conformance.mappers import FaultyMapper
from viommu.device import IommuConfig, Parked, VirtioIommu
from viommu.domain import DomainKind
from viommu.errors import Access, TranslationFault
from viommu.spec import virtio_iommu as spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.domain import ReservedRegion
    from viommu.mapper import MappingInfo

__all__ = ["READABLE", "Reply", "Rig", "attach", "detach", "map_", "probe", "unmap"]

# The device-readable part of each request, in bytes: where the tail begins. PROBE
# has its properties there.
READABLE = {
    spec.RequestType.ATTACH: 20,
    spec.RequestType.DETACH: 20,
    spec.RequestType.MAP: 36,
    spec.RequestType.UNMAP: 28,
    spec.RequestType.PROBE: 72,
}
RW = spec.MAP_F_READ | spec.MAP_F_WRITE

_NO_BYTES = bytes(64)


def _head(kind: spec.RequestType, reserved: bytes) -> spec.ReqHead:
    return spec.ReqHead(kind, tuple(reserved.ljust(3, b"\0")))


def attach(
    domain: int, endpoint: int, *, flags: int = 0, reserved: bytes = b"", head: bytes = b""
) -> bytes:
    """Build the device-readable part of an ATTACH."""
    padding = tuple(reserved.ljust(4, b"\0"))
    kind = spec.RequestType.ATTACH
    return bytes(spec.AttachRequest(_head(kind, head), domain, endpoint, flags, padding))[:20]


def detach(domain: int, endpoint: int, *, reserved: bytes = b"", head: bytes = b"") -> bytes:
    """Build the device-readable part of a DETACH."""
    padding = tuple(reserved.ljust(8, b"\0"))
    kind = spec.RequestType.DETACH
    return bytes(spec.DetachRequest(_head(kind, head), domain, endpoint, padding))[:20]


def map_(
    domain: int, first: int, last: int, phys: int, *, flags: int = RW, head: bytes = b""
) -> bytes:
    """Build the device-readable part of a MAP of ``[first, last]``."""
    kind = spec.RequestType.MAP
    return bytes(spec.MapRequest(_head(kind, head), domain, first, last, phys, flags))[:36]


def unmap(domain: int, first: int, last: int, *, reserved: bytes = b"", head: bytes = b"") -> bytes:
    """Build the device-readable part of an UNMAP of ``[first, last]``."""
    padding = tuple(reserved.ljust(4, b"\0"))
    kind = spec.RequestType.UNMAP
    return bytes(spec.UnmapRequest(_head(kind, head), domain, first, last, padding))[:28]


def probe(endpoint: int, *, reserved: bytes = b"", head: bytes = b"") -> bytes:
    """Build the device-readable part of a PROBE."""
    padding = tuple(reserved.ljust(64, b"\0"))
    return bytes(spec.ProbeRequest(_head(spec.RequestType.PROBE, head), endpoint, padding))


class Reply(NamedTuple):
    """What came back: the bytes written (their number is the used length) and their status."""

    data: bytes
    status: int | None  # None when nothing was written

    @property
    def properties(self) -> bytes:
        """What precedes the tail."""
        return self.data[: -spec.TAIL_SIZE]


class Rig:
    """A :class:`VirtioIommu`, its endpoints' mappers, and a driver that can misbehave."""

    def __init__(self, config: IommuConfig) -> None:
        self.config = config
        self.iommu = VirtioIommu(config)
        self.mappers: dict[int, FaultyMapper] = {}

    def add(
        self,
        endpoint: int,
        reserved: Iterable[ReservedRegion] = (),
        *,
        mapper: FaultyMapper | None = None,
    ) -> FaultyMapper:
        """Add an endpoint with a mapper of its own, or with the one given."""
        mapper = mapper or FaultyMapper(page_sizes=self.config.page_size_mask)
        self.iommu.add_endpoint(endpoint, mapper, reserved=reserved)
        self.mappers[endpoint] = mapper
        return mapper

    def send(self, request: bytes, writable: int | None = None) -> Reply:
        """Send a request that is answered at once, and check all that can be checked."""
        if writable is None:
            writable = spec.TAIL_SIZE
            if request[:1] == bytes([spec.RequestType.PROBE]):
                writable += self.config.probe_size
        before = self.snapshot()
        data = self.iommu.handle(request, writable)
        assert isinstance(data, bytes), "the request was parked"
        return self.judge(request, writable, data, before)

    def send_parked(self, request: bytes) -> Parked:
        """Send a request that has to wait for exported memory."""
        parked = self.iommu.handle(request, spec.TAIL_SIZE)
        assert isinstance(parked, Parked)
        self.check()
        return parked

    def judge(self, request: bytes, writable: int, data: bytes, before: object) -> Reply:
        """Assert what holds for every reply, and return it taken apart."""
        self.check()
        known = request[:1] != b"" and request[0] in READABLE
        expected = 0
        if known and len(request) >= READABLE[spec.RequestType(request[0])] and writable >= 4:
            expected = spec.TAIL_SIZE
            if request[0] == spec.RequestType.PROBE:
                expected = min(writable, self.config.probe_size + spec.TAIL_SIZE)
        assert len(data) == expected
        status = data[-spec.TAIL_SIZE] if data else None
        assert data[-3:] == bytes(min(len(data), 3))
        if status != spec.Status.OK:
            assert self.snapshot() == before
        return Reply(data, status)

    # What the device and its mappers hold

    def snapshot(self) -> object:
        """Return everything that a rejected request must leave alone, to compare."""
        return (
            {
                number: (domain.kind, list(domain.map), sorted(domain.endpoints))
                for number, domain in self.iommu.domains.items()
            },
            {
                number: (endpoint.domain and endpoint.domain.id, endpoint.kind)
                for number, endpoint in self.iommu.endpoints.items()
            },
            {n: (mapper.mappings(), dict(mapper.held)) for n, mapper in self.mappers.items()},
            self.iommu.config_bytes(),
        )

    def check(self) -> None:
        """Assert the device's invariants, and that every mapper holds what its domain says."""
        self.iommu._check()
        for number, mapper in self.mappers.items():
            mapper._check()
            endpoint = self.iommu.endpoints[number]
            assert mapper.mappings() == sorted(mapper.held.values())
            if endpoint.group.broken:
                continue
            match endpoint.kind:
                case DomainKind.BLOCKED:
                    assert mapper.mappings() == []
                case DomainKind.BYPASS:
                    assert mapper.mappings()
                    for iova, gpa, _, prot in mapper.mappings():
                        assert (gpa, prot) == (iova, Access.READ | Access.WRITE)
                case DomainKind.TRANSLATING:
                    assert mapper.mappings() == list(endpoint.group.domain.map)

    def mappings(self, endpoint: int) -> list[MappingInfo]:
        """Return what an endpoint's mapper holds."""
        return self.mappers[endpoint].mappings()

    def reach(
        self, endpoint: int, iova: int, size: int = 1, access: Access = Access.READ
    ) -> list[tuple[int, int]]:
        """Let an endpoint access memory; return the (gpa, length) it touches.

        Raises:
            TranslationFault: It is stopped.
        """
        mapper = self.mappers[endpoint]
        with mapper.start_export_session():
            regions = mapper.export(iova, size)
            mapper.release(iova, size)
        at = iova
        for region in regions:
            if access & ~region.prot:
                raise TranslationFault(at, access)
            at += region.len
        return [(region.gpa, region.len) for region in regions]

    def is_blocked(
        self, endpoint: int, iova: int, size: int = 1, access: Access = Access.READ
    ) -> bool:
        """Return whether an access is stopped."""
        try:
            self.reach(endpoint, iova, size, access)
        except TranslationFault:
            return True
        return False

    def stray(self, endpoint: int, iova: int, access: Access = Access.READ) -> spec.Fault:
        """Let an endpoint access what it may not, and return what the guest is told."""
        with pytest.raises(TranslationFault) as caught:
            self.reach(endpoint, iova, 1, access)
        self.iommu.report_fault(
            endpoint, TranslationFault(caught.value.iova, access, caught.value.reason)
        )
        report = self.iommu.take_fault()
        assert report is not None
        assert self.iommu.take_fault() is None
        assert len(report) == 24
        return spec.Fault.from_buffer_copy(report)
