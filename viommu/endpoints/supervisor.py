"""Starts the process of an endpoint, whenever there is to be one, and tells when it is gone."""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Final

from viommu.endpoints.worker_process import WorkerProcess
from viommu.errors import BackendError, PeerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.ipc.server import ExportServer
    from viommu.loop import Loop, Timer

__all__ = ["Supervisor"]

_log: Final = logging.getLogger(__name__)

_PAUSE: Final = 1.0  # seconds from one start to the next


class Supervisor:
    """Has at most one process run the endpoint of ``description``, a client of ``exports``.

    ``on_change`` is told when there is one, before it starts, and when there is none any
    more: it has ended then, and everything that it held is released.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        description: str,
        exports: ExportServer,
        on_change: Callable[[bool], None],
    ) -> None:
        #: How many processes were started, and how the last one that ended did.
        self.starts = 0
        self.ended: str | None = None
        self._loop = loop
        self._name = name
        self._description = description
        self._exports = exports
        self._on_change = on_change
        self._worker: WorkerProcess | None = None
        # The device's socket for the process that is to be started.
        self._waiting: socket.socket | None = None
        self._timer: Timer | None = None
        self._next_start = loop.clock()

    @property
    def pid(self) -> int | None:
        """The number of the process; ``None`` while there is none."""
        return None if self._worker is None else self._worker.pid

    def dial(self) -> socket.socket:
        """Return a socket that a new process will serve by vfio-user.

        It starts as soon as the one before it has ended, which is seen to, and not sooner
        after that one's start than a second.

        Raises:
            BackendError: The host has no sockets, or no processes, to give.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise _no_socket(self._name, error) from error
        self._drop_waiting()
        self._waiting = theirs
        self.kill()
        try:
            self._start_if_possible()
        except BackendError:
            ours.close()
            raise
        return ours

    def kill(self) -> None:
        """Have the process end, if there is one."""
        if self._worker is not None:
            self._worker.kill()

    def close(self) -> None:
        """End the process and start no other; what it held is released."""
        self._drop_waiting()
        if self._worker is not None:
            self._worker.close()
            self._gone()

    def _start_if_possible(self) -> None:
        if self._worker is not None or self._waiting is None:
            return
        left = self._next_start - self._loop.clock()
        if left > 0:
            self._timer = self._loop.call_later(left, self._start_later)
            return
        device, self._waiting = self._waiting, None
        self._next_start = self._loop.clock() + _PAUSE
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            device.close()
            raise _no_socket(self._name, error) from error
        self._on_change(True)
        try:
            self._worker = WorkerProcess(
                self._loop,
                self._name,
                self._description,
                device,
                theirs,
                on_exit=self._exited,
            )
        except BackendError:
            ours.close()
            self._on_change(False)
            raise
        self.starts += 1
        _log.info("%s: process %d serves it", self._name, self._worker.pid)
        try:
            self._exports.admit(ours, self._worker.peer.copy())
        except (OSError, PeerError) as error:
            ours.close()  # which it will see
            _log.warning("%s: process %d gets no memory: %s", self._name, self._worker.pid, error)

    def _start_later(self) -> None:
        self._timer = None
        try:
            self._start_if_possible()
        except BackendError as error:
            # Whoever dialled reads an end of file.
            _log.warning("%s", error)

    def _exited(self, how: str) -> None:
        pid, self.ended = self.pid, how
        _log.warning("%s: process %d, which served it, has ended: %s", self._name, pid, how)
        self._gone()
        self._start_later()

    def _gone(self) -> None:
        self._worker = None
        self._exports.end_client("its process has ended")
        self._on_change(False)

    def _drop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None


def _no_socket(name: str, error: OSError) -> BackendError:
    return BackendError(error.errno or errno.EMFILE, f"{name}: no socket for its process")
