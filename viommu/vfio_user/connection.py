"""Messages over a UNIX stream socket that never blocks, file descriptors included."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.vfio_user.protocol import MessageReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from viommu.vfio_user.protocol import Message

__all__ = ["Connection", "Received", "close_fds", "copy_fds", "peer_process", "receive", "send"]

_MAX_FDS: Final = 16
_FD_SIZE: Final = array.array("i").itemsize
_CHUNK: Final = 1 << 16  # recvmsg allocates what it is asked for, not what has arrived
_TRUNCATED: Final = int(socket.MSG_CTRUNC)  # to test an enumeration costs as much as to receive
_RECEIVING: Final = int(socket.MSG_CMSG_CLOEXEC)
_SENDING: Final = int(socket.MSG_NOSIGNAL)
_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred


class Received(NamedTuple):
    """What one read brought: ``data`` (empty at the end), and open ``fds`` that came with it."""

    data: bytes
    fds: list[int]
    truncated: bool


def receive(sock: socket.socket, size: int, max_fds: int = _MAX_FDS) -> Received:
    """Read at most ``size`` bytes, with the file descriptors that were sent with them.

    More than ``max_fds`` are closed by the kernel; the rest is ``truncated``.

    Raises:
        OSError: As recvmsg; BlockingIOError when a non-blocking socket has nothing.
    """
    # CMSG_SPACE pads, and the kernel would fill the padding with one more.
    room = socket.CMSG_LEN(max_fds * _FD_SIZE)
    data, ancillary, flags, _ = sock.recvmsg(min(size, _CHUNK), room, _RECEIVING | _waiting(sock))
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return Received(data, fds.tolist(), bool(flags & _TRUNCATED))


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> int:
    """Send what fits, ``fds`` with its first byte; return how many bytes went.

    Raises:
        OSError: As sendmsg; BlockingIOError when nothing fits.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], rights, _SENDING | _waiting(sock))


def _waiting(sock: socket.socket) -> int:
    """Return the flag without which a call may wait in the kernel.

    O_NONBLOCK is of the open file, which belongs to the peer as well if it was the peer
    who sent us the socket: it can be cleared at any time.
    """
    return 0 if sock.gettimeout() is None else _AT_ONCE


def close_fds(fds: list[int]) -> None:
    """Close and forget ``fds``, which a peer sent, whatever the files behind them say to it."""
    for fd in fds:
        with contextlib.suppress(OSError):  # it is closed all the same, see close(2)
            os.close(fd)
    fds.clear()


def copy_fds(fds: Iterable[int]) -> list[int]:
    """Duplicate ``fds``, all of them or none.

    Raises:
        OSError: EMFILE or ENFILE, there is no file descriptor left; EBADF.
    """
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for fd in fds)
    except OSError:
        close_fds(copies)
        raise
    return copies


def peer_process(sock: socket.socket) -> int:
    """Return the id of the process that connected, 0 if it isn't known in our namespace."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[0])


class Connection:
    """One peer's socket; owned, and made non-blocking.

    A message is handed to the kernel whole, so its header is never split (QEMU
    gives up on a connection that does so); what doesn't fit follows later, and
    meanwhile :attr:`backlog` says that nothing more should be read.
    """

    def __init__(self, sock: socket.socket, max_message: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = MessageReader(max_message)
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        #: How many bytes wait until the peer reads.
        self.queued_bytes = 0

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed."""
        return self._sock.fileno()

    @property
    def backlog(self) -> bool:
        """Return whether something waits until the peer reads."""
        return bool(self._queue)

    @property
    def hung_up(self) -> bool:
        """Return whether the peer has closed its end; what it sent may still be unread."""
        return self._polled(select.POLLRDHUP)

    @property
    def unread(self) -> bool:
        """Return whether something has arrived that :meth:`receive` has not taken."""
        return self._polled(select.POLLIN)

    def receive(self) -> Message | None:
        """Return the next complete message, ``None`` when it hasn't arrived yet.

        Raises:
            EOFError: The peer has closed the connection, or it broke.
            MessageSizeError: A header with an impossible size.
        """
        while True:
            try:
                data, fds, truncated = receive(
                    self._sock, self._reader.wanted, self._reader.wanted_fds
                )
            except BlockingIOError:
                return None
            except OSError as error:
                raise EOFError(str(error)) from error
            if not data and not fds:
                raise EOFError("closed by the peer" + ("" if self._reader.empty else ", halfway"))
            message = self._reader.feed(data, fds, truncated=truncated)
            if message is not None:
                return message

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, or as much as fits, and queue the rest.

        ``fds`` stay the caller's: when they have to wait, copies of them do.

        Raises:
            EOFError: The connection is broken, or ``fds`` can't be kept for it.
        """
        rest = memoryview(data)
        if not self._queue and (sent := self._send(rest, fds)):
            rest, fds = rest[sent:], ()
        if rest:
            try:
                self._queue.append((rest, copy_fds(fds)))
            except OSError as error:
                raise EOFError(f"file descriptors can't wait to be sent: {error}") from error
            self.queued_bytes += len(rest)

    def flush(self) -> None:
        """Send what is queued, as far as it fits.

        Raises:
            EOFError: The connection is broken.
        """
        while self._queue:
            data, fds = self._queue[0]
            sent = self._send(data, fds)
            if not sent:
                return
            self.queued_bytes -= sent
            close_fds(fds)
            if sent < len(data):
                self._queue[0] = (data[sent:], [])
            else:
                self._queue.popleft()

    def close(self) -> None:
        """Close the socket, and the file descriptors of messages that weren't completed."""
        close_fds(self._reader.take_fds())
        for _, fds in self._queue:
            close_fds(fds)
        self._queue.clear()
        self.queued_bytes = 0
        self._sock.close()

    def _polled(self, event: int) -> bool:
        poll = select.poll()
        poll.register(self._sock, event)
        return bool(poll.poll(0))

    def _send(self, data: memoryview, fds: Sequence[int]) -> int:
        """Send what fits; return how many bytes went."""
        try:
            return send(self._sock, data, fds)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise EOFError(str(error)) from error
