"""The wire of export sessions: what client and server say, as bytes. No I/O.

A UNIX socket of type SOCK_SEQPACKET keeps packets apart, so there are no lengths:
each packet is a header and what belongs to its kind, little-endian, no padding.
The client asks, the server answers in order; a request with id 0 is not answered, and
an answer with id 0 was not asked for: it says that guest memory has changed.
Addresses and sizes are in bytes, ranges are half-open. docs/export-sessions.md has
the tables.
"""

from __future__ import annotations

import enum
import errno
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import (
    Access,
    ExportError,
    PeerError,
    SessionFaulted,
    TranslationFault,
    UsageError,
    ViommuError,
)
from viommu.mapper import MemRegion
from viommu.spec.virtio_iommu import FaultReason

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CHANGED",
    "EXPORTED",
    "FAULT",
    "FILE_NONE",
    "FIRST",
    "HEADER",
    "HELLO",
    "LISTED",
    "MAX_FDS",
    "MAX_PACKET",
    "MAX_REQUEST",
    "MAX_TEXT",
    "RANGE",
    "REGION",
    "REGIONS_A_PACKET",
    "REPORT",
    "SPAN",
    "SPANS_A_PACKET",
    "TAG",
    "VERSION",
    "WELCOME",
    "Kind",
    "Packet",
    "Refusal",
    "Reply",
    "Request",
    "Span",
    "Welcome",
    "decode_access",
    "decode_regions",
    "decode_reply",
    "decode_request",
    "decode_spans",
    "decode_welcome",
    "encode_note",
    "encode_refusal",
    "encode_regions",
    "encode_reply",
    "encode_request",
    "encode_spans",
    "encode_text",
    "error_of",
]

TAG: Final = b"VIOX"
VERSION: Final = (1, 0)

MAX_REQUEST: Final = 512  # bytes of a packet to the server
MAX_PACKET: Final = 49152  # bytes of a packet to the client: a default socket buffer takes four
MAX_FDS: Final = 16  # file descriptors of a packet
MAX_TEXT: Final = 256  # bytes of a text

HEADER: Final = struct.Struct("<HHI")  # kind, error, id
HELLO: Final = struct.Struct("<4sHH")  # TAG, major, minor
WELCOME: Final = struct.Struct("<HHIQQ")  # major, minor, exports, bytes, memory generation
RANGE: Final = struct.Struct("<QQ")  # IOVA, size
EXPORTED: Final = struct.Struct("<QII")  # memory generation, regions here, regions to come
REGION: Final = struct.Struct("<QQII")  # GPA, length, access, 0
LISTED: Final = struct.Struct("<QII")  # memory generation, spans here, spans behind them
SPAN: Final = struct.Struct("<QQQII")  # GPA, size, offset, number of the file, access
CHANGED: Final = struct.Struct("<Q")  # memory generation
FIRST: Final = struct.Struct("<I")  # number of the first span wanted
REPORT: Final = struct.Struct("<QII")  # IOVA, access, 0
FAULT: Final = struct.Struct("<QII")  # IOVA, reason, 0

FILE_NONE: Final = 0xFFFF_FFFF
"""Instead of a file's number: the memory is not shared, there is nothing to map."""

REGIONS_A_PACKET: Final = (MAX_PACKET - HEADER.size - EXPORTED.size) // REGION.size
SPANS_A_PACKET: Final = 512

_REPLY: Final = 0x8000  # in the kind of every answer
_ACCESS: Final = (Access.READ | Access.WRITE).value


class Kind(enum.IntEnum):
    """What a packet is about."""

    HELLO = 1
    START = 2
    EXPORT = 3
    RELEASE = 4
    MEMORY = 5
    REPORT = 6
    LEAVE = 7


# What a request has behind its header; text is told by its own bound.
_BODIES: Final[dict[Kind, struct.Struct | None]] = {
    Kind.HELLO: HELLO,
    Kind.START: struct.Struct(""),
    Kind.EXPORT: RANGE,
    Kind.RELEASE: RANGE,
    Kind.MEMORY: FIRST,
    Kind.REPORT: REPORT,
    Kind.LEAVE: None,
}
# What may come with id 0, and what must.
_UNANSWERED: Final = {Kind.RELEASE, Kind.REPORT, Kind.LEAVE}
_NEVER_ANSWERED: Final = {Kind.REPORT, Kind.LEAVE}


class Refusal(enum.IntEnum):
    """The error of a refusal, an errno; FAULT has a :data:`FAULT` behind it, the others a text."""

    FAULT = errno.EFAULT
    STALE = errno.ESTALE
    BUSY = errno.EBUSY
    INVALID = errno.EINVAL


class Packet(NamedTuple):
    """One packet, and copies of file descriptors that whoever has the packet must close."""

    data: bytes
    fds: tuple[int, ...] = ()


class Request(NamedTuple):
    """A decoded packet of a client. ``values`` are the fields of its kind, LEAVE has a text."""

    kind: Kind
    ident: int
    values: tuple[int, ...] = ()
    text: str = ""


class Reply(NamedTuple):
    """A decoded answer; ``body`` is what follows the header."""

    kind: Kind
    ident: int
    error: int
    body: bytes

    @property
    def is_note(self) -> bool:
        """Whether it was not asked for: guest memory has changed."""
        return self.kind is Kind.MEMORY and not self.ident and not self.error


class Welcome(NamedTuple):
    """What the server says first: its version, and how much a client may hold."""

    major: int
    minor: int
    max_exports: int
    max_bytes: int
    generation: int


class Span(NamedTuple):
    """A piece of guest memory: ``[gpa, gpa + size)`` is file number ``file`` from ``offset`` on.

    Numbers count the file descriptors of the packet that the span is in.
    """

    gpa: int
    size: int
    offset: int
    file: int
    access: Access


def encode_request(kind: Kind, ident: int, body: bytes = b"") -> bytes:
    """Return the packet of a request; ``ident`` is 0 when no answer is wanted."""
    return HEADER.pack(kind, 0, ident) + body


def decode_request(data: bytes) -> Request:
    """Decode what a client has sent.

    Raises:
        PeerError: EPROTO, it is no packet of this protocol; the message says why.
    """
    if not HEADER.size <= len(data) <= MAX_REQUEST:
        raise _nonsense(f"a packet of {len(data)} bytes")
    number, error, ident = HEADER.unpack_from(data)
    if error or number not in _BODIES:
        raise _nonsense(f"a packet of kind {number:#x}, error {error}")
    kind = Kind(number)
    if (not ident and kind not in _UNANSWERED) or (ident and kind in _NEVER_ANSWERED):
        raise _nonsense(f"{kind.name} with id {ident}")
    body = data[HEADER.size :]
    layout = _BODIES[kind]
    if layout is None:
        return Request(kind, ident, text=_text(body))
    if len(body) != layout.size:
        raise _nonsense(f"{kind.name} with {len(body)} bytes instead of {layout.size}")
    values = layout.unpack(body)
    if kind is Kind.HELLO:
        if values[0] != TAG:
            raise _nonsense(f"HELLO with tag {values[0]!r}")
        values = values[1:]
    return Request(kind, ident, values)


def encode_reply(request: Request, body: bytes = b"") -> bytes:
    """Return the packet that answers ``request``."""
    return HEADER.pack(request.kind | _REPLY, 0, request.ident) + body


def encode_note(generation: int) -> bytes:
    """Return the packet that says that guest memory has changed since it was listed."""
    return HEADER.pack(Kind.MEMORY | _REPLY, 0, 0) + CHANGED.pack(generation)


def encode_refusal(request: Request, error: ViommuError) -> bytes:
    """Return the packet that says why ``request`` failed."""
    match error:
        case TranslationFault():
            number, body = Refusal.FAULT, FAULT.pack(error.iova, error.reason, 0)
        case SessionFaulted():
            number, body = Refusal.STALE, encode_text(str(error))
        case UsageError():
            number, body = Refusal.INVALID, encode_text(str(error))
        case _:
            number, body = Refusal.BUSY, encode_text(str(error))
    return HEADER.pack(request.kind | _REPLY, number, request.ident) + body


def decode_reply(data: bytes) -> Reply:
    """Decode what the server has sent.

    Raises:
        PeerError: EPROTO, it is no answer.
    """
    if not HEADER.size <= len(data) <= MAX_PACKET:
        raise _nonsense(f"an answer of {len(data)} bytes")
    number, error, ident = HEADER.unpack_from(data)
    if not number & _REPLY or number & ~_REPLY not in _BODIES:
        raise _nonsense(f"an answer of kind {number:#x}")
    return Reply(Kind(number & ~_REPLY), ident, error, data[HEADER.size :])


def error_of(reply: Reply, access: Access = Access.NONE) -> ViommuError:
    """Return the exception that a refusal stands for; ``access`` is what was wanted.

    Raises:
        PeerError: EPROTO, it is none.
    """
    if reply.error == Refusal.FAULT:
        if len(reply.body) != FAULT.size:
            raise _nonsense(f"a fault of {len(reply.body)} bytes")
        iova, reason, _ = FAULT.unpack(reply.body)
        if reason not in set(FaultReason):
            raise _nonsense(f"a fault of reason {reason}")
        return TranslationFault(iova, access, reason)
    text = _text(reply.body)
    if reply.error == Refusal.STALE:
        return SessionFaulted(text)
    if reply.error == Refusal.INVALID:
        return UsageError(text)
    return ExportError(text or f"refused with errno {reply.error}")


def encode_regions(regions: Sequence[MemRegion], generation: int, left: int) -> bytes:
    """Return the body of an EXPORTED with some regions, ``left`` being still to come."""
    parts = [EXPORTED.pack(generation, len(regions), left)]
    parts += [REGION.pack(gpa, size, prot.value, 0) for gpa, size, prot in regions]
    return b"".join(parts)


def decode_regions(body: bytes) -> tuple[list[MemRegion], int, int]:
    """Return the regions of an EXPORTED, the generation, and how many are still to come.

    Raises:
        PeerError: EPROTO, it is none.
    """
    generation, left, rows = _rows(body, EXPORTED, REGION)
    regions = [MemRegion(gpa, size, decode_access(access)) for gpa, size, access, _ in rows]
    return regions, generation, left


def encode_spans(spans: Sequence[Span], generation: int, left: int) -> bytes:
    """Return the body of a LISTED with some spans, ``left`` being behind them."""
    parts = [LISTED.pack(generation, len(spans), left)]
    parts += [SPAN.pack(*span[:4], span.access.value) for span in spans]
    return b"".join(parts)


def decode_spans(body: bytes, files: int) -> tuple[list[Span], int, int]:
    """Return the spans of a LISTED that came with so many ``files``, the generation, the rest.

    Raises:
        PeerError: EPROTO, it is none.
    """
    generation, left, rows = _rows(body, LISTED, SPAN)
    spans = []
    for gpa, size, offset, file, access in rows:
        if file != FILE_NONE and file >= files:
            raise _nonsense(f"file {file} of {files}")
        spans.append(Span(gpa, size, offset, file, decode_access(access)))
    return spans, generation, left


def decode_welcome(body: bytes) -> Welcome:
    """Return what the server said of itself.

    Raises:
        PeerError: EPROTO, nothing that can be understood; EPROTONOSUPPORT, another version.
    """
    if len(body) != WELCOME.size:
        raise _nonsense(f"a welcome of {len(body)} bytes")
    welcome = Welcome(*WELCOME.unpack(body))
    if welcome.major != VERSION[0]:
        raise PeerError(
            errno.EPROTONOSUPPORT, f"the server speaks version {welcome.major}.{welcome.minor}"
        )
    return welcome


def encode_text(text: str) -> bytes:
    """Return a text as bytes, cut to what is allowed."""
    return text.encode(errors="replace")[:MAX_TEXT]


def decode_access(value: int) -> Access:
    """Return the access that a number of the wire means.

    Raises:
        PeerError: EPROTO, no such access.
    """
    if value & ~_ACCESS:
        raise _nonsense(f"access {value:#x}")
    return Access(value)


def _rows(
    body: bytes, head: struct.Struct, row: struct.Struct
) -> tuple[int, int, list[tuple[int, ...]]]:
    if len(body) < head.size:
        raise _nonsense(f"a table of {len(body)} bytes")
    generation, count, left = head.unpack_from(body)
    if len(body) != head.size + count * row.size:
        raise _nonsense(f"a table of {len(body)} bytes with {count} rows")
    return generation, left, list(row.iter_unpack(body[head.size :]))


def _text(data: bytes) -> str:
    """Decode a text; what can't be printed is escaped, so that it may go into a log."""
    text = data[:MAX_TEXT].decode(errors="replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _nonsense(why: str) -> PeerError:
    return PeerError(errno.EPROTO, why)
