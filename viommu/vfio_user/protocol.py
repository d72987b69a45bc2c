"""The vfio-user protocol without I/O: bytes to messages, messages to bytes, negotiation.

Source: QEMU, ``docs/interop/vfio-user.rst``. Where peers are stricter than the
specification, or must be treated with care, the comment names them.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from viommu.errors import BackendError, GuestMemoryError, PeerError, UsageError, ViommuError
from viommu.spec import vfio_user as spec
from viommu.spec import vfio_user_iommufd as iommufd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Capabilities",
    "Message",
    "MessageReader",
    "MessageSizeError",
    "command_message",
    "decode_version",
    "encode_version",
    "errno_of",
    "error_reply",
    "negotiate",
    "reply_message",
]

# QEMU refuses a reply longer than its own request of 214 bytes, header and version included.
_MAX_REPLY_JSON: Final = 194
_MAX_REQUEST_JSON: Final = 4096
_MAX_FDS_LIMIT: Final = 1024
_MAX_MESSAGE_FDS: Final = 16  # QEMU never sends more, whatever it was told
_PAGE: Final = 4096
_MAX_ERRNO: Final = 4095


@dataclass(slots=True)
class Message:
    """One message; ``fds`` are open and whoever takes the message closes those that are left."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]
    #: File descriptors were lost on the way: too many, or no room for them here.
    truncated: bool = False

    @property
    def kind(self) -> int:
        """Return the type: ``F_TYPE_COMMAND``, ``F_TYPE_REPLY``, or neither."""
        return self.flags & spec.F_TYPE_MASK

    @property
    def no_reply(self) -> bool:
        """Return whether the sender must not be answered."""
        return bool(self.flags & spec.F_NO_REPLY) and self.kind == spec.F_TYPE_COMMAND


class MessageSizeError(PeerError):
    """A header with a size that can't be; the header is all of ``message``.

    ``lost`` says that a body is on its way that can't be skipped: nothing more
    can be read from this peer.
    """

    def __init__(self, message: Message, size: int, *, lost: bool) -> None:
        super().__init__(errno.EINVAL, f"a message of {size} bytes (command {message.command})")
        self.message = message
        self.lost = lost


class MessageReader:
    """Puts messages together from the pieces that a stream socket delivers.

    Read at most :attr:`wanted` bytes at a time, together with their ancillary
    data of at most :attr:`wanted_fds` file descriptors: then these always come with
    a byte of the message that they belong to. Memory is bounded by ``max_size``, the
    largest message accepted, and no message, sent byte by byte with file descriptors
    on each, takes all that this process may open.
    """

    def __init__(self, max_size: int = spec.MAX_MESSAGE) -> None:
        self._max_size = max_size
        self._data = bytearray()
        self._fds: list[int] = []
        self._truncated = False
        self._header: Message | None = None
        #: How many bytes are missing from the header, or then from the body.
        self.wanted = spec.HEADER_SIZE

    @property
    def wanted_fds(self) -> int:
        """Return how many more file descriptors the message may bring."""
        return max(0, _MAX_MESSAGE_FDS - len(self._fds))

    @property
    def empty(self) -> bool:
        """Return whether the stream is between two messages."""
        return self._header is None and not self._data

    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, truncated: bool = False
    ) -> Message | None:
        """Take the next bytes, and own ``fds``; return the message that they complete.

        Raises:
            MessageSizeError: The header has an impossible size.
            UsageError: More than :attr:`wanted` bytes.
        """
        self._fds += fds
        self._truncated |= truncated
        if len(data) > self.wanted:
            raise UsageError(f"{len(data)} bytes were fed where {self.wanted} were wanted")
        self._data += data
        self.wanted -= len(data)
        if self.wanted:
            return None
        message = self._header
        if message is None:
            ident, command, size, flags, error = spec.HEADER.unpack(self._data)
            message = Message(ident, command, flags, error, b"", [])
            self._data.clear()
            body = size - spec.HEADER_SIZE
            if body < 0 or size > self._max_size:
                self.wanted = spec.HEADER_SIZE
                message.fds, message.truncated = self._take()
                raise MessageSizeError(message, size, lost=body > 0)
            if body:
                self._header, self.wanted = message, body
                return None
        else:
            message.payload = bytes(self._data)
            self._data.clear()
        self._header, self.wanted = None, spec.HEADER_SIZE
        message.fds, message.truncated = self._take()
        return message

    def take_fds(self) -> list[int]:
        """Return, and no longer own, the file descriptors of a message that won't be completed."""
        return self._take()[0]

    def _take(self) -> tuple[list[int], bool]:
        taken = self._fds, self._truncated
        self._fds, self._truncated = [], False
        return taken


def command_message(ident: int, command: int, payload: bytes, *, no_reply: bool = False) -> bytes:
    """Return a command, header and all."""
    flags = spec.F_TYPE_COMMAND | (spec.F_NO_REPLY if no_reply else 0)
    size = spec.HEADER_SIZE + len(payload)
    return spec.HEADER.pack(ident & 0xFFFF, command, size, flags, 0) + payload


def reply_message(request: Message, payload: bytes = b"") -> bytes:
    """Return the successful reply to ``request``."""
    size = spec.HEADER_SIZE + len(payload)
    return spec.HEADER.pack(request.id, request.command, size, spec.F_TYPE_REPLY, 0) + payload


def error_reply(request: Message, number: int) -> bytes:
    """Return the reply that ``request`` failed: a header and nothing else, as specified."""
    flags = spec.F_TYPE_REPLY | spec.F_ERROR
    return spec.HEADER.pack(request.id, request.command, spec.HEADER_SIZE, flags, number)


def errno_of(error: ViommuError) -> int:
    """Return the errno that tells a peer of ``error``."""
    match error:
        case PeerError() | BackendError() if 0 < error.errno <= _MAX_ERRNO:
            return error.errno
        case GuestMemoryError():
            return errno.EFAULT
        case UsageError():
            return errno.EINVAL
        case _:
            return errno.EIO


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one side of a connection can take; defaults are those of the specification."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = spec.MAX_DATA_TRANSFER
    max_dma_maps: int | None = None
    pgsizes: int | None = None
    write_multiple: bool = False
    #: The iommufd commands, and there IOVAs that the client chooses (viommu's own).
    iommufd: bool = False
    fixed_iova: bool = False
    #: Answers DMA_READ and DMA_WRITE at any time, whatever it waits for (viommu's own).
    message_dma: bool = False
    #: Commands of the server go over a socket of their own: the file descriptor with this
    #: index that comes with its answer. libvfio-user needs that: where commands of both
    #: sides share a socket, it takes the client's for replies.
    twin_socket: bool = False
    twin_fd_index: int = 0

    @property
    def serves_dma(self) -> bool:
        """Return whether this client answers DMA_READ and DMA_WRITE.

        No capability of the specification says so. QEMU serves them and sends
        ``max_dma_maps`` and ``pgsizes``; Cloud Hypervisor doesn't, and sends neither.
        """
        return self._is_qemu or self.message_dma

    @property
    def forgets(self) -> bool:
        """Return whether this client forgets a request that is not answered in time.

        QEMU does: a late reply with a payload breaks the stream, one without is only
        logged. Cloud Hypervisor waits for ever, and doesn't understand an error. Our own
        client, which says what QEMU says to be asked for memory, waits or closes.
        """
        return self._is_qemu and not self.message_dma

    @property
    def _is_qemu(self) -> bool:
        return self.max_dma_maps is not None and self.pgsizes is not None

    def agreed(self, other: Capabilities) -> Capabilities:
        """Return these without the extensions that are not in ``other`` as well.

        A peer that was not offered an extension must not be told of it, and one that
        was not asked for it does not have it.
        """
        shared = self.iommufd and other.iommufd
        fixed = shared and self.fixed_iova and other.fixed_iova
        return replace(self, iommufd=shared, fixed_iova=fixed)

    def within(self, offered: Capabilities) -> Capabilities:
        """Return what of these, a server's answer, holds for a client that ``offered`` others.

        More data at a time than we take ourselves could not come back, and what was
        not offered is not agreed upon, whatever the server says.
        """
        return replace(
            self.agreed(offered),
            max_data_xfer_size=min(self.max_data_xfer_size, offered.max_data_xfer_size),
            write_multiple=self.write_multiple and offered.write_multiple,
            twin_socket=self.twin_socket and offered.twin_socket,
        )

    def encode(self) -> bytes:
        """Return the JSON text with its NUL, leaving out what isn't there."""
        values: dict[str, Any] = {
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_size,
        }
        if self.max_dma_maps is not None:
            values["max_dma_maps"] = self.max_dma_maps
        if self.pgsizes is not None:
            values["pgsizes"] = self.pgsizes
        if self.write_multiple:
            values["write_multiple"] = True
        if self.twin_socket:
            values["twin_socket"] = {"supported": True}
            if self.twin_fd_index:
                values["twin_socket"]["fd_index"] = self.twin_fd_index
        if self.iommufd:
            values[iommufd.CAPABILITY] = {"supported": True}
        ours = {"fixed_iova": self.fixed_iova, "message_dma": self.message_dma}
        if any(ours.values()):
            values[iommufd.CAPABILITY_OF_VIOMMU] = {key: True for key in ours if ours[key]}
        return json.dumps({"capabilities": values}, separators=(",", ":")).encode() + b"\0"

    @classmethod
    def decode(cls, text: bytes) -> Capabilities:
        """Decode JSON text that ends with a NUL; unknown capabilities are ignored.

        Raises:
            PeerError: EINVAL, not JSON, or a known capability with an impossible value.
        """
        if len(text) > _MAX_REQUEST_JSON:
            raise _invalid(f"{len(text)} bytes of JSON are more than {_MAX_REQUEST_JSON}")
        if text[-1:] != b"\0":
            raise _invalid(f"the JSON ends with {text[-1:]!r} instead of a NUL")
        try:
            # RecursionError: a few thousand brackets are enough for that.
            document = json.loads(text[:-1])
        except (ValueError, RecursionError) as error:
            raise _invalid(f"not JSON: {error}") from error
        if not isinstance(document, dict):
            raise _invalid(f"the JSON is {_shown(document)} instead of an object")
        known = _object(document, "capabilities")
        migration = _object(known, "migration")
        _number(migration, "pgsize", _PAGE, multiple=_PAGE)
        ours = _object(known, iommufd.CAPABILITY_OF_VIOMMU)
        twin = _object(known, "twin_socket")
        fds = _number(known, "max_msg_fds", 0, _MAX_FDS_LIMIT)
        data = _number(known, "max_data_xfer_size", 0)
        return cls(
            max_msg_fds=1 if fds is None else fds,
            max_data_xfer_size=spec.MAX_DATA_TRANSFER if data is None else data,
            max_dma_maps=_number(known, "max_dma_maps", 0),
            pgsizes=_number(known, "pgsizes", _PAGE, multiple=_PAGE),
            write_multiple=_boolean(known, "write_multiple"),
            iommufd=_boolean(_object(known, iommufd.CAPABILITY), "supported"),
            fixed_iova=_boolean(ours, "fixed_iova"),
            message_dma=_boolean(ours, "message_dma"),
            twin_socket=_boolean(twin, "supported"),
            twin_fd_index=_number(twin, "fd_index", 0, _MAX_FDS_LIMIT) or 0,
        )


def encode_version(minor: int, capabilities: Capabilities) -> bytes:
    """Return the payload of a VERSION command or reply."""
    return spec.VERSION.pack(spec.VERSION_MAJOR, minor) + capabilities.encode()


def decode_version(payload: bytes) -> tuple[int, Capabilities]:
    """Return the minor version and the capabilities of a VERSION command or reply.

    Raises:
        PeerError: EINVAL, another major version, or what :meth:`Capabilities.decode` refuses.
    """
    if len(payload) < spec.VERSION.size:
        raise _invalid(f"{len(payload)} bytes of payload are too few")
    major, minor = spec.VERSION.unpack_from(payload)
    if major != spec.VERSION_MAJOR:
        raise _invalid(f"version {major}.{minor} was asked for, {spec.VERSION_MAJOR}.x is spoken")
    text = payload[spec.VERSION.size :]
    return minor, Capabilities.decode(text) if text else Capabilities()


def negotiate(payload: bytes, ours: Capabilities) -> tuple[Capabilities, bytes]:
    """Return what a client that sent ``payload`` can do, and the payload of the reply.

    The reply has the lower of both minor versions and all of ``ours``, of which
    extensions that must be offered by both only if they were. What is returned has
    these only if they are in the reply.

    Raises:
        PeerError: EINVAL, as in :func:`decode_version`.
        UsageError: ``ours`` is more than QEMU accepts in a reply.
    """
    minor, theirs = decode_version(payload)
    if len(ours.encode()) > _MAX_REPLY_JSON:
        raise UsageError(f"QEMU takes {_MAX_REPLY_JSON} bytes of capabilities, not {ours}")
    reply = encode_version(min(minor, spec.VERSION_MINOR), ours.agreed(theirs))
    return theirs.agreed(ours), reply


def _object(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key, {})
    if not isinstance(value, dict):
        raise _invalid(f"{key} {_shown(value)} is not an object")
    return value


def _boolean(parent: Mapping[str, Any], key: str) -> bool:
    value = parent.get(key, False)
    if not isinstance(value, bool):
        raise _invalid(f"{key} {_shown(value)} is not a boolean")
    return value


def _number(
    parent: Mapping[str, Any],
    key: str,
    low: int,
    high: int | None = None,
    *,
    multiple: int = 1,
) -> int | None:
    value = parent.get(key)
    if value is None and key not in parent:
        return None
    # A boolean is an int to Python, but not to JSON.
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(f"{key} {_shown(value)} is not a whole number")
    if value < low or (high is not None and value > high) or value % multiple:
        raise _invalid(f"{key} {value} can't be")
    return value


def _shown(value: Any) -> str:
    # What contains other values may be nested deeper than repr() can go.
    return f"{type(value).__name__}" if isinstance(value, dict | list) else repr(value)


def _invalid(why: str) -> PeerError:
    return PeerError(errno.EINVAL, f"VERSION: {why}")
