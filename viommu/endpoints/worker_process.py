"""The process of an endpoint that has one of its own, seen from the server."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import viommu
from viommu.errors import BackendError
from viommu.ipc.peer import PeerProcess

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from viommu.loop import Loop

__all__ = ["WorkerOrder", "WorkerProcess", "how_it_ended"]

_STDERR: Final = 2
_GRACE: Final = 2.0  # seconds to end by itself, once nobody needs it


class WorkerOrder(NamedTuple):
    """What a worker is told on its command line.

    ``device`` and ``exports`` are sockets that it inherits, ``server`` is our process
    number, ``level`` what is logged.
    """

    name: str
    description: str
    device: int
    exports: int
    server: int
    level: int

    def arguments(self) -> list[str]:
        """Return it as words."""
        return [str(word) for word in self]

    @classmethod
    def parse(cls, words: list[str]) -> WorkerOrder:
        """Return what :meth:`arguments` wrote."""
        name, description, *numbers = words
        return cls(name, description, *map(int, numbers))


class WorkerProcess:
    """Runs the endpoint of ``description`` in a new process, which ends when we do.

    It serves ``device``, a connected stream socket, by vfio-user, and uses ``exports``, one
    of packets, for its DMA; both are closed here. It is in a process group of its own, so
    that Ctrl-C in a terminal ends the server, which ends the worker, in this order.

    ``on_exit`` is called from ``loop``, once, with how it ended.

    Raises:
        BackendError: The host lets us start no process.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        description: str,
        device: socket.socket,
        exports: socket.socket,
        *,
        on_exit: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._on_exit = on_exit
        fds = device.fileno(), exports.fileno()
        level = logging.getLogger().getEffectiveLevel()
        order = WorkerOrder(name, description, *fds, os.getpid(), level)
        try:
            with device, exports:
                self._process = subprocess.Popen(  # noqa: S603  # ourselves
                    [sys.executable, "-P", "-m", "viommu.endpoints.worker", *order.arguments()],
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,  # ours is for what people and scripts read
                    env=_environment(),
                    pass_fds=fds,
                    process_group=0,
                )
            self.peer = self._watched()
        except OSError as error:
            raise BackendError(error.errno or 0, f"{name}: no process for it") from error
        loop.on_readable(self.peer, self._reap)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def kill(self) -> None:
        """Have it end now; ``on_exit`` tells when it has."""
        self.peer.kill()

    def close(self) -> None:
        """See to it that it ends, by itself if it does so soon; ``on_exit`` is not called."""
        if self.peer.fileno() < 0:
            return
        poll = select.poll()
        poll.register(self.peer, select.POLLIN)
        if not poll.poll(_GRACE * 1000):
            self.peer.kill()
        self._finish()

    def _watched(self) -> PeerProcess:
        """Return what tells of its end; one that can't be watched is ended."""
        try:
            return PeerProcess.of_child(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise

    def _reap(self) -> None:
        self._on_exit(self._finish())

    def _finish(self) -> str:
        self._loop.forget(self.peer)
        self.peer.close()
        return how_it_ended(self._process.wait())


def how_it_ended(code: int) -> str:
    """Say what a return code of :mod:`subprocess` means."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _environment() -> dict[str, str]:
    """Return our environment, so that the worker imports the code that we are."""
    ours = str(Path(viommu.__file__).parents[1])
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ours}{os.pathsep}{before}" if before else ours}
