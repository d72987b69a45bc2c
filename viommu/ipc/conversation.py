"""What the server does for one client: a request in, packets out. No sockets.

A client sees and changes nothing but its own session: what it says of addresses is
looked up in the mapper of its endpoint, and how much it may ask for is bounded.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import ExportError, PeerError, TranslationFault, UsageError, ViommuError
from viommu.ipc.fault_line import FaultLine
from viommu.ipc.memory_table import memory_page
from viommu.ipc.protocol import (
    REGIONS_A_PACKET,
    VERSION,
    WELCOME,
    Kind,
    Packet,
    Request,
    decode_access,
    decode_request,
    encode_note,
    encode_refusal,
    encode_regions,
    encode_reply,
)
from viommu.ipc.rate import RateLimit

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.basic import BasicMemoryMapper
    from viommu.events import Event
    from viommu.memory import GuestMemory

__all__ = ["Conversation", "ConversationCounters", "ConversationSetup", "ExportLimits"]


@dataclass(frozen=True, slots=True)
class ExportLimits:
    """What one client can make a server hold or do; sizes in bytes, times in seconds."""

    #: Exports held at a time, and how much memory they may be together.
    exports: int = 1 << 14
    bytes: int = 1 << 44
    #: How many mappings one export may touch: it is looked up in one go.
    mappings: int = 1 << 14
    #: How many requests are handled before others have their turn.
    messages_per_turn: int = 64
    #: Fault reports a second that go to the guest, and how many may come at once.
    reports: int = 32
    #: A client that has not said its version by then is dropped.
    hello_time: float = 10.0


@dataclass(slots=True)
class ConversationCounters:
    """What has happened on one door; the counts go on across clients."""

    exports: int = 0
    releases: int = 0
    refused: int = 0
    #: Reports that went to the guest, and those that did not: untrue, or too many.
    reports: int = 0
    reports_dropped: int = 0


class ConversationSetup(NamedTuple):
    """What all clients of a door have in common.

    They use ``mapper``, and ``memory`` is where its guest physical addresses lead.
    ``report`` takes faults to the guest's event queue.
    """

    mapper: BasicMemoryMapper
    memory: GuestMemory
    report: Callable[[TranslationFault], None]
    limits: ExportLimits
    counters: ConversationCounters


class _Holding(NamedTuple):
    """How often a range is exported, and when it was first."""

    times: int
    since: float


class Conversation:
    """Serves one client. ``clock`` is monotonic seconds.

    ``on_session`` is told of the fault event of each session that starts, ``None`` when
    one ends, before the event of the one before is closed. When that event is readable
    :meth:`end_session` is due, and :meth:`close` when the client is gone.
    """

    def __init__(
        self,
        setup: ConversationSetup,
        clock: Callable[[], float],
        on_session: Callable[[Event | None], None],
    ) -> None:
        self.greeted = False
        #: Why the client left, in its own words.
        self.farewell = ""
        #: How many exports the client holds, and how much memory that is.
        self.holds = 0
        self.held_bytes = 0
        self._held: dict[tuple[int, int], _Holding] = {}  # by IOVA and size
        self._mapper, self._memory, self._report_to_guest, self._limits, self._counters = setup
        self._clock = clock
        self._on_session = on_session
        self._reports = RateLimit(self._limits.reports, clock)
        #: Whether the client has listed memory, and not been told since that it changed.
        self._knows_memory = False
        self._fault: Event | None = None
        self._line: FaultLine | None = None
        self._handlers: Final[dict[Kind, Callable[[Request], list[Packet]]]] = {
            Kind.HELLO: self._hello,
            Kind.START: self._start,
            Kind.EXPORT: self._export,
            Kind.RELEASE: self._release,
            Kind.MEMORY: self._list_memory,
            Kind.REPORT: self._report,
            Kind.LEAVE: self._leave,
        }

    @property
    def state(self) -> str:
        """In a word, for people: ``none``, ``active``, or ``faulted`` while it must let go."""
        if self._fault is not None:
            return "active"
        return "faulted" if self.holds else "none"

    def oldest(self, count: int) -> list[tuple[tuple[int, int], _Holding]]:
        """Return what has been held longest: (IOVA, size), and (how often, since when)."""
        return list(islice(self._held.items(), count))

    def handle(self, data: bytes) -> list[Packet]:
        """Do what a packet asks and return the answer, whose files are the caller's to close.

        Raises:
            PeerError: It breaks the protocol: nothing more is to be read from this client.
        """
        request = decode_request(data)
        if (request.kind is Kind.HELLO) is self.greeted:
            raise PeerError(errno.EPROTO, f"{request.kind.name} at the wrong time")
        try:
            return self._handlers[request.kind](request)
        except PeerError:
            raise
        except ViommuError as error:
            self._counters.refused += 1
            if not request.ident:
                # A client that does not want to be told can't go on from this.
                raise PeerError(errno.EPROTO, f"{request.kind.name}: {error}") from error
            return [Packet(encode_refusal(request, error))]

    def memory_changed(self) -> list[Packet]:
        """Return what tells the client that its list of memory is old, once for each list."""
        if not self._knows_memory:
            return []
        self._knows_memory = False
        return [Packet(encode_note(self._memory.generation))]

    def end_session(self) -> None:
        """Have the client let go: its fault event is signalled, and it can't export any more."""
        if self._line is not None:
            self._line.signal()
        self._enter(None, None)

    def close(self) -> None:
        """End the session and release all that the client holds."""
        self.end_session()
        for (iova, size), holding in self._held.items():
            for _ in range(holding.times):
                self._mapper.release(iova, size)
        self._held.clear()
        self.holds = self.held_bytes = 0

    def _enter(self, event: Event | None, line: FaultLine | None) -> None:
        """Make a session the present one, and forget the one before."""
        self._on_session(event)
        if self._fault is not None:
            self._fault.close()
        if self._line is not None:
            self._line.close()
        self._fault, self._line = event, line

    def _hello(self, request: Request) -> list[Packet]:
        major, minor = request.values
        if major != VERSION[0]:
            raise PeerError(errno.EPROTONOSUPPORT, f"version {major}.{minor} of the protocol")
        self.greeted = True
        welcome = WELCOME.pack(
            VERSION[0],
            min(minor, VERSION[1]),
            self._limits.exports,
            self._limits.bytes,
            self._memory.generation,
        )
        return [Packet(encode_reply(request, welcome))]

    def _start(self, request: Request) -> list[Packet]:
        event = self._mapper.start_export_session()
        try:
            line = FaultLine()
        except ExportError:
            event.close()
            raise
        self._enter(event, line)
        return [Packet(encode_reply(request), (line.take_other_end(),))]

    def _export(self, request: Request) -> list[Packet]:
        iova, size = request.values
        if self.holds >= self._limits.exports:
            raise ExportError(f"limit of {self._limits.exports} exports reached")
        if self.held_bytes + size > self._limits.bytes:
            raise ExportError(f"limit of {self._limits.bytes} exported bytes reached")
        if (mappings := self._mapper.count(iova, size)) > self._limits.mappings:
            raise UsageError(f"{size:#x} bytes at {iova:#x} are {mappings} mappings: export less")
        regions = self._mapper.export(iova, size)
        times, since = self._held.get((iova, size)) or (0, self._clock())
        self._held[iova, size] = _Holding(times + 1, since)
        self.holds += 1
        self.held_bytes += size
        self._counters.exports += 1
        packets = []
        for first in range(0, len(regions), REGIONS_A_PACKET):
            some = regions[first : first + REGIONS_A_PACKET]
            left = len(regions) - first - len(some)
            body = encode_regions(some, self._memory.generation, left)
            packets.append(Packet(encode_reply(request, body)))
        return packets

    def _release(self, request: Request) -> list[Packet]:
        iova, size = request.values
        holding = self._held.get((iova, size))
        if holding is None:
            raise ExportError(f"[{iova:#x}, {iova + size:#x}) is not exported")
        self._mapper.release(iova, size)
        if holding.times > 1:
            self._held[iova, size] = holding._replace(times=holding.times - 1)
        else:
            del self._held[iova, size]
        self.holds -= 1
        self.held_bytes -= size
        self._counters.releases += 1
        return [Packet(encode_reply(request))] if request.ident else []

    def _list_memory(self, request: Request) -> list[Packet]:
        body, fds = memory_page(self._memory, *request.values)
        self._knows_memory = True
        return [Packet(encode_reply(request, body), fds)]

    def _report(self, request: Request) -> list[Packet]:
        """Tell the guest of a fault, if there really is one at that address now."""
        iova, wanted, _ = request.values
        access = decode_access(wanted)
        mapping = self._mapper.find(iova)
        blocked = access and (mapping is None or access & ~mapping.prot)
        if blocked and self._reports.allows():
            self._counters.reports += 1
            self._report_to_guest(TranslationFault(iova, access))
        else:
            self._counters.reports_dropped += 1
        return []

    def _leave(self, request: Request) -> list[Packet]:
        self.farewell = request.text
        return []
