"""A connection that the loop drives: messages in, messages out, and nobody waits."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.errors import PeerError
from viommu.vfio_user.connection import Connection, close_fds
from viommu.vfio_user.protocol import MessageSizeError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from viommu.loop import Loop
    from viommu.vfio_user.protocol import Message

__all__ = ["Link"]


class Link:
    """Reads messages from ``sock``, which is owned, and sends what does not fit at once later.

    ``take`` gets every message, and says whether to look for another one at once; its
    file descriptors that are left then are closed. ``lost`` is told, once and from the
    loop, that the peer has gone (ECONNRESET) or sends what are no messages (EPROTO);
    the socket is closed by then.

    No message is larger than ``max_message``.

    A peer is read from even when it doesn't read: it may be busy with sending to us.
    Only when more than ``max_queued`` bytes wait for it, it must read first. In one
    turn of the loop no more than so many messages, or bytes and a message, are taken.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        *,
        take: Callable[[Message], bool],
        lost: Callable[[PeerError], None],
        max_message: int,
        max_queued: int,
        messages_per_turn: int,
        bytes_per_turn: int,
    ) -> None:
        self._loop = loop
        self._connection = Connection(sock, max_message)
        self._take = take
        self._lost = lost
        self._max_queued = max_queued
        self._messages_per_turn = messages_per_turn
        self._bytes_per_turn = bytes_per_turn
        self._closed = self._paused = self._breaking = False
        loop.on_readable(self._connection, self._readable)

    @property
    def sending(self) -> bool:
        """Return whether the loop has still to send something, or to find that it can't."""
        return self._breaking or self._connection.backlog

    @property
    def unread(self) -> bool:
        """Return whether the peer has sent something that the loop has not come to."""
        return not self._closed and self._connection.unread

    @property
    def queued_bytes(self) -> int:
        """Return how many bytes wait for the peer."""
        return self._connection.queued_bytes

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed."""
        return self._connection.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message, or queue it; ``fds`` stay the caller's.

        When the peer has gone nothing is sent, and ``lost`` is told later.
        """
        if self._breaking or self._closed:
            return
        try:
            self._connection.send(data, fds)
        except EOFError as error:
            # Whoever sends is not called back meanwhile, and what the peer has sent
            # before it went is read first.
            self._breaking = True
            why = str(error)
            self._loop.call_soon(lambda: self._break(errno.ECONNRESET, why))
            return
        if self._connection.backlog:
            self._loop.on_writable(self._connection, self._writable)

    def close(self) -> None:
        """Close the socket, and forget what was not sent; closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._breaking = False
            self._loop.forget(self._connection)
            self._connection.close()

    def _writable(self) -> None:
        try:
            self._connection.flush()
        except EOFError as error:
            self._break(errno.ECONNRESET, str(error))
            return
        if not self._connection.backlog:
            self._loop.on_writable(self._connection, None)
        if self._paused and self._connection.queued_bytes <= self._max_queued:
            self._paused = False
            self._loop.on_readable(self._connection, self._readable)

    def _readable(self) -> None:
        left = self._bytes_per_turn
        for _ in range(self._messages_per_turn):
            if self._connection.queued_bytes > self._max_queued:
                self._paused = True
                self._loop.on_readable(self._connection, None)
                return
            try:
                message = self._connection.receive()
            except MessageSizeError as error:
                close_fds(error.message.fds)
                self._break(errno.EPROTO, str(error))
                return
            except EOFError as error:
                self._break(errno.ECONNRESET, str(error))
                return
            if message is None:
                return
            try:
                more = self._take(message)
            finally:
                close_fds(message.fds)
            left -= len(message.payload)
            if self._closed or not more or left <= 0:
                return  # if there is something after all, the loop says so

    def _break(self, number: int, why: str) -> None:
        if not self._closed:
            self.close()
            gone = "the server has gone: " if number == errno.ECONNRESET else ""
            self._lost(PeerError(number, gone + why))
