"""A guest's virtio-iommu driver in Python (half-open ranges; inclusive in the requests).

Unlike a kernel's it looks at every status and can send what no kernel sends.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu.errors import Access, GuestMemoryError, UsageError
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import RequestType, Status
from viommu.testing.driver import DEFAULT_TIMEOUT, VirtioPciDriver
from viommu.testing.guest_ram import PAGE, DirectDma, DmaBuffer

if TYPE_CHECKING:
    from viommu.testing.guest_ram import GuestRam
    from viommu.vfio_user.client import Client
    from viommu.virtio.ring_memory import RingMemory

__all__ = [
    "FaultReport",
    "IommuDriver",
    "MappedDma",
    "Pending",
    "Reserved",
    "attach_request",
    "detach_request",
    "map_request",
    "probe_request",
    "unmap_request",
]

_SLOT: Final = 2048  # a request, and where its reply goes
_REPLY_AT: Final = 128
_SLOTS: Final = 32
_UNWRITTEN: Final = 0xFF
_PROBE_TYPE_MASK: Final = 0xFFF  # the upper bits of a property's type are reserved


class FaultReport(NamedTuple):
    """One report of the event queue; ``flags`` are ``VIRTIO_IOMMU_FAULT_F_*``."""

    reason: int
    flags: int
    endpoint: int
    address: int


class Reserved(NamedTuple):
    """A reserved region ``[start, end)`` from PROBE; ``kind`` is its subtype."""

    start: int
    end: int
    kind: int


class Pending(NamedTuple):
    """A request that the device has: its ticket, its slot and the room for its reply."""

    ticket: int
    slot: int
    room: int


class Reply(NamedTuple):
    """What came back: used length, and the status, ``None`` if it was not written."""

    length: int
    status: int | None
    data: bytes


def attach_request(domain: int, endpoint: int, flags: int = 0) -> bytes:
    """Return an ATTACH; ``flags`` are ``VIRTIO_IOMMU_ATTACH_F_*``."""
    return spec.ATTACH.pack(RequestType.ATTACH, domain, endpoint, flags, 0)


def detach_request(domain: int, endpoint: int) -> bytes:
    """Return a DETACH."""
    return spec.DETACH.pack(RequestType.DETACH, domain, endpoint)


def map_request(domain: int, iova: int, gpa: int, size: int, access: Access) -> bytes:
    """Return a MAP of ``[iova, iova + size)`` to ``gpa``."""
    flags = (spec.MAP_F_READ if Access.READ in access else 0) | (
        spec.MAP_F_WRITE if Access.WRITE in access else 0
    )
    return spec.MAP.pack(RequestType.MAP, domain, iova, iova + size - 1, gpa, flags)


def unmap_request(domain: int, iova: int, size: int) -> bytes:
    """Return an UNMAP of ``[iova, iova + size)``."""
    return spec.UNMAP.pack(RequestType.UNMAP, domain, iova, iova + size - 1)


def probe_request(endpoint: int) -> bytes:
    """Return a PROBE; its reply has room for the properties before the tail."""
    return spec.PROBE.pack(RequestType.PROBE, endpoint)


class IommuDriver:
    """Drives the virtio-iommu behind ``client``; both it and ``ram`` stay the caller's.

    Requests return their status byte, ``None`` if the device wrote nothing.
    :meth:`submit` and :meth:`wait` are for several at once, and for one whose
    reply is held back until exported memory is released.
    """

    def __init__(self, client: Client, ram: GuestRam, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.ram = ram
        self.virtio = VirtioPciDriver(client, DirectDma(ram), timeout=timeout)
        if self.virtio.device_type != spec.DEVICE_ID:
            raise UsageError(f"a virtio device of type {self.virtio.device_type} is no IOMMU")
        self.virtio.negotiate()
        self.requests = self.virtio.add_queue(spec.REQUEST_QUEUE)
        self.events = self.virtio.add_queue(spec.EVENT_QUEUE)
        self._slots_at = ram.pages.allocate(_SLOTS * _SLOT)
        self._free = [self._slots_at + _SLOT * number for number in range(_SLOTS)]
        self._reports: dict[int, int] = {}  # ticket of a chain to the address of its buffer
        self._reports_at = ram.pages.allocate(PAGE)
        self.virtio.start()
        for number in range(min(self.events.ring.size, PAGE // spec.FAULT.size)):
            self._offer_buffer(self._reports_at + spec.FAULT.size * number)
        self.events.kick()

    @property
    def config(self) -> spec.Config:
        """The device configuration."""
        size = spec.CONFIG.size
        return spec.Config.from_buffer_copy(self.virtio.device_config(0, size))

    @property
    def probe_size(self) -> int:
        """How many bytes of properties a PROBE needs room for."""
        return self.config.probe_size

    def attach(self, domain: int, endpoint: int, *, flags: int = 0) -> int | None:
        """Attach an endpoint to a domain and return the status."""
        return self.request(attach_request(domain, endpoint, flags)).status

    def detach(self, domain: int, endpoint: int) -> int | None:
        """Detach an endpoint and return the status."""
        return self.request(detach_request(domain, endpoint)).status

    def map(
        self,
        domain: int,
        iova: int,
        gpa: int,
        size: int,
        access: Access = Access.READ | Access.WRITE,
    ) -> int | None:
        """Map ``[iova, iova + size)`` to ``gpa`` and return the status."""
        return self.request(map_request(domain, iova, gpa, size, access)).status

    def unmap(self, domain: int, iova: int, size: int) -> int | None:
        """Unmap ``[iova, iova + size)`` and return the status."""
        return self.request(unmap_request(domain, iova, size)).status

    def probe(self, endpoint: int) -> tuple[int | None, list[Reserved]]:
        """Return the status, and the reserved regions of an endpoint."""
        size = self.probe_size
        reply = self.request(probe_request(endpoint), size + spec.TAIL_SIZE)
        return reply.status, _reserved(reply.data[:size]) if reply.status == Status.OK else []

    def request(self, request: bytes, room: int = spec.TAIL_SIZE) -> Reply:
        """Send one request, whatever it is, and wait for its reply of ``room`` bytes."""
        (pending,) = self.submit(request, room=room)
        return self.wait(pending)

    def submit(self, *requests: bytes, room: int = spec.TAIL_SIZE) -> list[Pending]:
        """Send requests with one kick, and don't wait.

        Raises:
            UsageError: More are in flight than there are slots, or one is too long.
        """
        if len(requests) > len(self._free):
            raise UsageError(f"{len(requests)} requests, room for {len(self._free)}")
        if room > _SLOT - _REPLY_AT or any(len(request) > _REPLY_AT for request in requests):
            raise UsageError(f"requests have up to {_REPLY_AT} bytes, replies {_SLOT - _REPLY_AT}")
        pending = []
        for request in requests:
            slot = self._free.pop()
            self.ram.memory.write(slot, request)
            self.ram.memory.write(slot + _REPLY_AT, bytes([_UNWRITTEN]) * room)
            readable = [(slot, len(request))] if request else []
            writable = [(slot + _REPLY_AT, room)] if room else []
            pending.append(Pending(self.requests.add(readable, writable), slot, room))
        self.requests.kick()
        return pending

    def wait(self, pending: Pending, timeout: float | None = None) -> Reply:
        """Wait for the reply to one submitted request.

        Raises:
            TimeoutError: It has not come within ``timeout`` seconds, by default the
                driver's; the request stays in flight.
        """
        length = self.requests.wait(pending.ticket, timeout)
        data = self.ram.memory.read(pending.slot + _REPLY_AT, pending.room)
        self._free.append(pending.slot)
        # The status is the first byte of the tail, which ends what was written.
        status = data[length - spec.TAIL_SIZE] if length >= spec.TAIL_SIZE else None
        return Reply(length, status, data)

    def is_done(self, pending: Pending) -> bool:
        """Return whether the reply is there; :meth:`wait` then returns at once."""
        return pending.ticket in self.requests.poll()

    def next_fault(self, timeout: float | None = None) -> FaultReport:
        """Return the oldest fault report that was not returned yet.

        Raises:
            TimeoutError: None has come within ``timeout`` seconds, by default the
                driver's.
        """
        ticket, length = self.events.wait_any(timeout)
        assert length == spec.FAULT.size, f"a fault report of {length} bytes"
        address = self._reports.pop(ticket)
        report = FaultReport(*spec.FAULT.unpack(self.ram.memory.read(address, length)))
        self._offer_buffer(address)
        self.events.kick()
        return report

    def faults(self) -> list[FaultReport]:
        """Return every fault report that is there now."""
        found = []
        while self.events.poll():
            found.append(self.next_fault())
        return found

    def close(self) -> None:
        """Stop the device's DMA and interrupts."""
        self.virtio.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _offer_buffer(self, address: int) -> None:
        ticket = self.events.add([], [(address, spec.FAULT.size)])
        self._reports[ticket] = address


class MappedDma:
    """Buffers of ``ram`` that are mapped for the endpoints of one domain.

    IOVAs are handed out from ``start`` upwards and are never used twice.
    """

    def __init__(self, iommu: IommuDriver, domain: int, start: int) -> None:
        self._iommu = iommu
        self._domain = domain
        self._next = start
        self._memory = _MappedMemory(iommu.ram.memory)

    @property
    def memory(self) -> RingMemory:
        """The buffers' contents, by IOVA."""
        return self._memory

    def allocate(self, size: int) -> DmaBuffer:
        """Return a buffer, mapped for reading and writing.

        Raises:
            UsageError: The IOMMU refuses the mapping, or memory is out.
        """
        gpa = self._iommu.ram.pages.allocate(size)
        length = -(-size // PAGE) * PAGE
        status = self._iommu.map(self._domain, self._next, gpa, length)
        if status != Status.OK:
            self._iommu.ram.pages.free(gpa)
            raise UsageError(f"MAP of {length:#x} bytes at {self._next:#x}: status {status}")
        buffer = DmaBuffer(gpa, self._next, size)
        self._next += length
        self._memory.add(buffer)
        return buffer

    def free(self, buffer: DmaBuffer) -> None:
        """Unmap a buffer and give its memory back.

        Raises:
            UsageError: The IOMMU refuses.
        """
        length = -(-buffer.size // PAGE) * PAGE
        status = self._iommu.unmap(self._domain, buffer.address, length)
        if status != Status.OK:
            raise UsageError(f"UNMAP of {length:#x} bytes at {buffer.address:#x}: status {status}")
        self._memory.remove(buffer)
        self._iommu.ram.pages.free(buffer.gpa)


class _MappedMemory:
    """Memory by IOVA, as the CPU reaches it: each range lies in one buffer."""

    def __init__(self, memory: RingMemory) -> None:
        self._memory = memory
        self._starts: list[int] = []  # rising, as IOVAs are handed out
        self._buffers: dict[int, DmaBuffer] = {}

    @property
    def generation(self) -> int:
        """Views stay valid: this driver frees nothing that it uses."""
        return self._memory.generation

    def add(self, buffer: DmaBuffer) -> None:
        self._starts.append(buffer.address)
        self._buffers[buffer.address] = buffer

    def remove(self, buffer: DmaBuffer) -> None:
        self._starts.remove(buffer.address)
        del self._buffers[buffer.address]

    def views(self, address: int, size: int, *, write: bool) -> list[memoryview]:
        return self._memory.views(self._gpa(address, size), size, write=write)

    def read(self, address: int, size: int) -> bytes:
        return self._memory.read(self._gpa(address, size), size)

    def write(self, address: int, data: bytes | memoryview) -> None:
        self._memory.write(self._gpa(address, len(data)), data)

    def _gpa(self, address: int, size: int) -> int:
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            buffer = self._buffers[self._starts[index]]
            if address + size <= buffer.address + buffer.size:
                return buffer.gpa + address - buffer.address
        raise GuestMemoryError(address, size, "is in no buffer of this driver")


def _reserved(properties: bytes) -> list[Reserved]:
    """Decode RESV_MEM properties; others are skipped, as the standard asks of a driver."""
    found = []
    at = 0
    while at + 4 <= len(properties):
        kind = int.from_bytes(properties[at : at + 2], "little") & _PROBE_TYPE_MASK
        length = int.from_bytes(properties[at + 2 : at + 4], "little")
        if kind == spec.PROBE_T_NONE:
            break
        if kind == spec.PROBE_T_RESV_MEM and at + spec.RESV_MEM.size <= len(properties):
            _, _, subtype, start, end = spec.RESV_MEM.unpack_from(properties, at)
            found.append(Reserved(start, end + 1, subtype))
        at += 4 + length
    return found
