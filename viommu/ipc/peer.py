"""The process at the other end of a socket: who it is, whether it lives, and its end.

A process number may be given to another process as soon as the first is gone; a
*pidfd* means the same process for ever, is readable when that has ended, and is what
signals are sent by.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from typing import Final

from viommu.errors import PeerError
from viommu.ipc.packets import hung_up

__all__ = ["PeerProcess"]

_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred
_SO_PEERPIDFD: Final = 77  # <asm-generic/socket.h>, Linux 6.5


class PeerProcess:
    """The process ``pid`` of user ``uid``; owns ``pidfd``, which is -1 where there is none."""

    def __init__(self, pid: int, uid: int, pidfd: int) -> None:
        self.pid = pid
        self.uid = uid
        self._pidfd = pidfd

    @classmethod
    def of_socket(cls, sock: socket.socket) -> PeerProcess:
        """Return the process that connected ``sock``.

        Raises:
            PeerError: EPERM, it is neither of our user nor root's; ESRCH, it is gone.
        """
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        if uid not in {0, os.geteuid()}:
            raise PeerError(errno.EPERM, f"process {pid} is of user {uid}")
        return cls(pid, uid, _pidfd_of(sock, pid))

    @classmethod
    def of_child(cls, pid: int) -> PeerProcess:
        """Return a child of ours that has not been waited for.

        Raises:
            OSError: This process may open no more file descriptors.
        """
        return cls(pid, os.geteuid(), os.pidfd_open(pid))

    def copy(self) -> PeerProcess:
        """Return the same process with a pidfd of its own.

        Raises:
            OSError: This process may open no more file descriptors.
        """
        return PeerProcess(self.pid, self.uid, os.dup(self._pidfd))

    def fileno(self) -> int:
        """Return the pidfd, readable once the process has ended; -1 if there is none."""
        return self._pidfd

    def kill(self) -> bool:
        """Have the process killed; return false if that can't be done.

        Its end, when its memory is unmapped and its files are closed, comes later.
        """
        return self._signal(signal.SIGKILL)

    def can_be_killed(self) -> bool:
        """Return whether :meth:`kill` would be allowed now; nothing is done."""
        return self._signal(0)

    def close(self) -> None:
        """Close the pidfd; closing twice is harmless."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def _signal(self, number: int) -> bool:
        if self._pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass  # it has ended already
        except OSError:
            return False  # EPERM: root's; EINVAL: of another namespace
        return True

    def __str__(self) -> str:
        return f"process {self.pid}"


def _pidfd_of(sock: socket.socket, pid: int) -> int:
    """Return a pidfd of the process that connected, -1 where it can't be had.

    Raises:
        PeerError: ESRCH, the process is gone.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise PeerError(errno.ESRCH, f"process {pid} is gone") from error
        if error.errno != errno.ENOPROTOOPT:
            return -1
    pidfd = -1
    with contextlib.suppress(OSError):  # another namespace's, or gone, or no fd left
        pidfd = os.pidfd_open(pid)
    if hung_up(sock):
        # Then the number may be somebody else's by now: whose, can't be told.
        if pidfd >= 0:
            os.close(pidfd)
        raise PeerError(errno.ESRCH, f"process {pid} is gone")
    return pidfd
