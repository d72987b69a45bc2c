"""The path that a server listens on: nobody else's, and gone afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.loop import Loop

__all__ = ["EXHAUSTED", "Listener"]

EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Why there can be no further client now, but later."""

_RETRY: Final = 0.1  # seconds, when there is no file descriptor left for a client
_BACKLOG: Final = 8
_MODE: Final = 0o600  # whoever may connect may have us write its memory and files


class Listener:
    """A non-blocking listening UNIX socket at ``path``, open to this user (and root) only.

    ``kind`` is SOCK_STREAM or SOCK_SEQPACKET.

    What a server that died has left there is removed; a server that lives, or
    anything else, is not.

    Raises:
        UsageError: There can be no socket at ``path``; it says why.
    """

    def __init__(self, path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, kind)
        try:
            self.socket.setblocking(False)
            _remove_stale(path, kind)
            # The mode of the socket is that of its path: no moment with another one.
            os.fchmod(self.socket.fileno(), _MODE)
            self.socket.bind(os.fspath(path))
            self.socket.listen(_BACKLOG)
            status = path.lstat()
        except OSError as error:
            self.socket.close()
            raise UsageError(f"can't listen on {path}: {_explain(error)}") from error
        except UsageError:
            self.socket.close()
            raise
        self._identity = status.st_dev, status.st_ino

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed."""
        return self.socket.fileno()

    def accept(self, loop: Loop, again: Callable[[], None]) -> socket.socket | None:
        """Return the next client; ``None`` if it has gone again, or if this is closed.

        Raises:
            OSError: It can't be accepted. If that is for want of resources, the client stays
                in the queue, and ``again`` is called when ``loop`` finds it there later.
        """
        if self.fileno() < 0:
            return None  # closed since a retry was planned
        try:
            return self.socket.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in EXHAUSTED:
                loop.on_readable(self, None)
                loop.call_later(_RETRY, lambda: self._watch(loop, again))
            raise

    def _watch(self, loop: Loop, callback: Callable[[], None]) -> None:
        if self.fileno() >= 0:
            loop.on_readable(self, callback)

    def close(self) -> None:
        """Stop listening and remove the path, unless it has become another's."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        with contextlib.suppress(OSError):  # removed by somebody, with or without its directory
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"can't listen on {path}: there is something that is not a socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # nobody listens
            return
        except BlockingIOError:
            pass  # somebody listens, and is busy
    raise UsageError(f"can't listen on {path}: another process does; stop it or use another path")


def _explain(error: OSError) -> str:
    match error.errno:
        case None:
            return f"{error}; use a shorter path"  # Python's own "AF_UNIX path too long"
        case errno.ENOENT:
            return "its directory does not exist"
        case number:
            return os.strerror(number)
