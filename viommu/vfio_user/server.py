"""Serves one device on a UNIX socket, to one client after the other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.vfio_user.irqs import IrqLines
from viommu.vfio_user.listener import EXHAUSTED, Listener
from viommu.vfio_user.served import IrqInfo, RegionInfo, ServedDevice
from viommu.vfio_user.served_client import ServedClient
from viommu.vfio_user.session import ServerLimits, SessionCounters

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.loop import Loop
    from viommu.memory import MappedFiles

__all__ = [
    "IrqInfo",
    "IrqLines",
    "RegionInfo",
    "ServedDevice",
    "Server",
    "ServerLimits",
]

_LOG: Final = logging.getLogger("viommu.vfio_user")


class Server:
    """Listens on ``path`` at once; driven by ``loop``, it never blocks.

    One client at a time: while it is connected, another is accepted and closed
    at once, so that a VMM started twice by mistake is told, instead of waiting.
    A client that has hung up gives way to the next even if its last bytes are
    still unread, so a VMM that was killed can be started again immediately.

    ``on_memory_refused`` is called with a message for people when guest memory
    turns out to be out of reach; the client gets an error, or is disconnected.
    The path is created for this user only, and removed by :meth:`close`.

    Raises:
        UsageError: There can be no socket at ``path``.
    """

    def __init__(
        self,
        loop: Loop,
        device: ServedDevice,
        path: Path,
        files: MappedFiles,
        limits: ServerLimits | None = None,
        *,
        on_memory_refused: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        self.device = device
        self.counters = SessionCounters()
        #: How many clients have come, and how many were turned away because there was one.
        self.clients = 0
        self.turned_away = 0
        #: Why the memory of the present, or last, client could not be used.
        self.memory_refused: str | None = None
        self.on_memory_refused = on_memory_refused
        self._loop = loop
        self._files = files
        self._limits = limits or ServerLimits()
        self._client: ServedClient | None = None
        self._listener = Listener(path)
        loop.on_readable(self._listener, self._accept)

    @property
    def connected(self) -> bool:
        """Return whether a client is there and has negotiated."""
        return self._client is not None and self._client.ready

    def suspect_memory(self, gpa: int | None = None) -> None:
        """Have guest memory checked, see :meth:`ServedClient.suspect_memory`, if there is any."""
        if self._client is not None:
            self._client.suspect_memory(gpa)

    def close(self) -> None:
        """Disconnect the client, stop listening and remove the path."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if self._listener.fileno() >= 0:
            self._loop.forget(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock = self._listener.accept(self._loop, self._accept)
        except OSError as error:
            why = "no resources for another" if error.errno in EXHAUSTED else "can't accept a"
            _LOG.warning("%s: %s client: %s", self.device.name, why, error)
            return
        if sock is None:
            return
        if self._client is not None:
            self._client.finish_departed()
        if self._client is not None:
            self.turned_away += 1
            _LOG.warning("%s: a second client was turned away", self.device.name)
            sock.close()
            return
        self.clients += 1
        self.memory_refused = None
        self._client = ServedClient(
            self._loop,
            self.device,
            sock,
            self._files,
            self._limits,
            counters=self.counters,
            on_gone=self._gone,
            on_memory_refused=self._memory_refused,
        )

    def _gone(self, _why: str) -> None:
        self._client = None

    def _memory_refused(self, why: str) -> None:
        self.memory_refused = why
        if self.on_memory_refused is not None:
            self.on_memory_refused(why)
