"""Messages over a UNIX stream socket for one who waits: everything has a deadline."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import TYPE_CHECKING

from viommu.errors import PeerError
from viommu.vfio_user.connection import close_fds, receive, send
from viommu.vfio_user.protocol import MessageReader, MessageSizeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from viommu.vfio_user.protocol import Message

__all__ = ["Channel"]


class Channel:
    """A connection to the server at ``path``; ``timeout`` in seconds holds for connecting too.

    What makes the stream useless (ETIMEDOUT, ECONNRESET, EPROTO) closes it; every
    use of a closed channel is ENOTCONN.

    Raises:
        PeerError: Nobody listens there, or doesn't accept in time.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.timeout = timeout
        self._reader = MessageReader()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            number = error.errno or errno.ETIMEDOUT
            raise PeerError(number, f"can't connect to {path}: {error}") from error

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; closing twice is harmless."""
        close_fds(self._reader.take_fds())
        self._socket.close()

    def broken(self, number: int, why: str) -> PeerError:
        """Close the channel and return the error that says why."""
        self.close()
        return PeerError(number, why)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message; ``fds`` stay the caller's.

        Raises:
            PeerError: The channel is, or had to be, closed.
        """
        self._check_open()
        self._socket.settimeout(self.timeout)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[send(self._socket, rest, fds) :]
                fds = ()
        except TimeoutError as error:
            raise self.broken(errno.ETIMEDOUT, "the server does not read") from error
        except OSError as error:
            raise self.broken(errno.ECONNRESET, f"the server has gone: {error}") from error

    def receive(self, deadline: float) -> Message:
        """Return the next message, whose file descriptors become the caller's.

        Raises:
            PeerError: The channel is, or had to be, closed; ETIMEDOUT once
                :func:`time.monotonic` passes ``deadline``.
        """
        self._check_open()
        while True:
            # A deadline that has passed still takes what is there: zero means not to wait.
            self._socket.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                data, fds, truncated = receive(
                    self._socket, self._reader.wanted, self._reader.wanted_fds
                )
            except (TimeoutError, BlockingIOError) as error:
                why = f"no answer within {self.timeout} s"
                raise self.broken(errno.ETIMEDOUT, why) from error
            except OSError as error:
                raise self.broken(errno.ECONNRESET, f"the server has gone: {error}") from error
            if not data:
                raise self.broken(errno.ECONNRESET, "the server has closed the connection")
            try:
                message = self._reader.feed(data, fds, truncated=truncated)
            except MessageSizeError as error:
                close_fds(error.message.fds)
                raise self.broken(errno.EPROTO, str(error)) from error
            if message is not None:
                return message

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise PeerError(errno.ENOTCONN, "the connection is closed")
