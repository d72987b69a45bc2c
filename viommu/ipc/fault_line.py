"""The fault event of a session whose client is another process."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import Final

from viommu.errors import ExportError, UsageError
from viommu.events import Event

__all__ = ["FaultEvent", "FaultLine"]

_ONE: Final = (1).to_bytes(8, "little")


class FaultLine:
    """Our end: signals a fault, once, to whoever has the other end.

    What the client gets reads like an eventfd, eight bytes with a count, but is one end of
    a socket pair. Who shares an eventfd can clear its O_NONBLOCK, fill it, and so
    block whoever signals it next; our end of this is ours alone. And it becomes
    readable when this process dies, too.

    Raises:
        ExportError: This process may open no more file descriptors.
    """

    def __init__(self) -> None:
        try:
            self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ExportError(f"no event for an export session: {error}") from error
        self._ours.shutdown(socket.SHUT_RD)  # the client has nothing to say here
        self._theirs.setblocking(False)

    def take_other_end(self) -> int:
        """Return the client's end, once; the caller sends and closes it."""
        return self._theirs.detach()

    def signal(self) -> None:
        """Make the client's end readable; a client that closed it has itself to blame."""
        with contextlib.suppress(OSError):
            self._ours.send(_ONE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Close our end, which makes the other one readable; closing twice is harmless."""
        self._ours.close()
        self._theirs.close()


class FaultEvent(Event):
    """The client's end, as the event that :class:`~viommu.mapper.Exporter` returns; owns ``fd``."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the fd, -1 once closed."""
        return self._fd

    def signal(self) -> None:
        """Refuse: only the server signals it.

        Raises:
            UsageError: Always.
        """
        raise UsageError("a fault event is signalled by the server")

    def clear(self) -> bool:
        """Return whether it was signalled; if the server is gone, it stays so."""
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return False
        return True

    def is_set(self) -> bool:
        """Return whether it is signalled, without clearing it."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the fd; closing twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
