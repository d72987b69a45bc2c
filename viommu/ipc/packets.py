"""Packets over a UNIX socket of type SOCK_SEQPACKET, file descriptors included."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections import deque
from typing import TYPE_CHECKING

from viommu.errors import PeerError
from viommu.ipc.protocol import MAX_REQUEST, Packet
from viommu.vfio_user.connection import close_fds, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PacketSocket", "discard", "hung_up"]


class PacketSocket:
    """The server's end of one client's connection; owned, and made non-blocking.

    What does not fit into the socket waits, and meanwhile :attr:`backlog` says that
    nothing more should be read.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._queue: deque[Packet] = deque()

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed."""
        return self._sock.fileno()

    @property
    def backlog(self) -> bool:
        """Return whether something waits until the client reads."""
        return bool(self._queue)

    @property
    def hung_up(self) -> bool:
        """Return whether the client has closed its end; what it sent may still be unread."""
        return hung_up(self._sock)

    def receive(self) -> bytes | None:
        """Return the next packet, ``None`` if there is none now.

        File descriptors that come with it are closed: a client has none to give.

        Raises:
            EOFError: The client has closed the connection.
            PeerError: It broke; the client may still be there.
        """
        try:
            # One byte more than allowed shows a packet that is too long.
            data, fds, _ = receive(self._sock, MAX_REQUEST + 1)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _broken(error) from error
        close_fds(fds)
        if not data:
            raise EOFError("closed by the client")
        return data

    def send(self, packets: Iterable[Packet]) -> None:
        """Send packets, or queue what doesn't fit; their file descriptors are closed then.

        Raises:
            EOFError, PeerError: As :meth:`receive`.
        """
        self._queue.extend(packets)
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as it fits.

        Raises:
            EOFError, PeerError: As :meth:`receive`.
        """
        while self._queue:
            data, fds = self._queue[0]
            try:
                send(self._sock, data, fds)
            except BlockingIOError:
                return
            except OSError as error:
                raise _broken(error) from error
            discard([self._queue.popleft()])

    def say_no_more(self) -> None:
        """Let the client read an end of file; what was queued is not sent."""
        self._drop_queue()
        with contextlib.suppress(OSError):  # it has gone at this moment
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket, and the file descriptors of what wasn't sent."""
        self._drop_queue()
        self._sock.close()

    def _drop_queue(self) -> None:
        discard(self._queue)
        self._queue.clear()


def _broken(error: OSError) -> EOFError | PeerError:
    """Return what an error of a socket means: that the client has gone, or not."""
    if isinstance(error, BrokenPipeError | ConnectionResetError):
        return EOFError(str(error))
    # ETOOMANYREFS, ENOBUFS, ...: this process or its user is out of something.
    return PeerError(error.errno or errno.EIO, f"its socket: {error}")


def hung_up(sock: socket.socket) -> bool:
    """Return whether the peer of a socket has closed its end."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def discard(packets: Iterable[Packet]) -> None:
    """Close the file descriptors of packets that go nowhere any more."""
    for packet in packets:
        for fd in packet.fds:
            os.close(fd)
