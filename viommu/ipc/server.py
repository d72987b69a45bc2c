"""The door of an endpoint for clients in other processes: one session, one client at a time."""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Final

from viommu.errors import PeerError
from viommu.ipc.conversation import ConversationCounters, ConversationSetup, ExportLimits
from viommu.ipc.hold import HoldPolicy, Measure
from viommu.ipc.peer import PeerProcess
from viommu.ipc.served_client import ServedClient
from viommu.vfio_user.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.basic import BasicMemoryMapper
    from viommu.errors import TranslationFault
    from viommu.loop import Loop
    from viommu.memory import GuestMemory

__all__ = ["ExportServer"]

_log: Final = logging.getLogger("viommu.ipc")

_LOGGED: Final = 16  # clients turned away that are logged


class ExportServer:
    """Gives the exports of ``mapper`` to a client in another process; never blocks.

    Guest physical addresses lead to ``memory``, whose files the client gets: it is
    trusted with all of them. ``report`` takes the faults of this endpoint to the guest.
    ``policy`` is for a client that does not let go.

    With ``path`` it listens there, for processes of the same user and of root. While one
    client is connected, or has not let go, others are turned away. :meth:`admit` serves
    a socket that is connected already. ``on_gone`` is told why when a client is gone.

    Raises:
        UsageError: There can be no socket at ``path``.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        mapper: BasicMemoryMapper,
        memory: GuestMemory,
        report: Callable[[TranslationFault], None],
        *,
        path: Path | None = None,
        policy: HoldPolicy | None = None,
        limits: ExportLimits | None = None,
        on_gone: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.policy = policy or HoldPolicy()
        self.counters = ConversationCounters()
        #: How many clients have come, and how many were turned away.
        self.clients = 0
        self.turned_away = 0
        #: Why the client before left, in its own words.
        self.farewell = ""
        self._loop = loop
        self._setup = ConversationSetup(
            mapper, memory, report, limits or ExportLimits(), self.counters
        )
        self._on_gone = on_gone
        self._client: ServedClient | None = None
        self._listener: Listener | None = None
        if path is not None:
            self._listener = Listener(path, socket.SOCK_SEQPACKET)
            loop.on_readable(self._listener, self._accept)

    @property
    def client(self) -> ServedClient | None:
        """The client that is connected, or has not let go yet."""
        return self._client

    def admit(self, sock: socket.socket, process: PeerProcess) -> None:
        """Serve a client on ``sock``, which is ``process``; both are owned from now on.

        Raises:
            PeerError: EBUSY, there is one; EPERM, it could not be killed as ``policy`` says.
        """
        if self._client is not None:
            self._client.finish_departed()
        refusal = None
        if self._client is not None:
            refusal = PeerError(errno.EBUSY, f"{self._client.process} is the client here")
        elif self.policy.measure is Measure.KILL and not process.can_be_killed():
            refusal = PeerError(errno.EPERM, f"{process} could not be killed, if need be")
        if refusal is not None:
            process.close()
            sock.close()
            raise refusal
        self.clients += 1
        self._client = ServedClient(
            self._loop,
            sock,
            process,
            self._setup,
            name=self.name,
            policy=self.policy,
            on_gone=self._gone,
        )

    def end_client(self, why: str) -> None:
        """Release what the client holds and disconnect it: it has ended, and its memory with it."""
        client, self._client = self._client, None
        if client is not None:
            client.close(why)

    def describe(self) -> dict[str, object]:
        """Return who is served, what is held, and the counters, ready for JSON."""
        return {
            "socket": None if self.path is None else str(self.path),
            "policy": str(self.policy),
            "client": None if self._client is None else self._client.describe(),
            "counters": {
                "clients": self.clients,
                "turned away": self.turned_away,
                "exports": self.counters.exports,
                "releases": self.counters.releases,
                "refused": self.counters.refused,
                "fault reports": self.counters.reports,
                "fault reports dropped": self.counters.reports_dropped,
            },
        }

    def close(self) -> None:
        """Disconnect the client, releasing what it holds, and stop listening."""
        self.end_client("the server is closing")
        if self._listener is not None and self._listener.fileno() >= 0:
            self._loop.forget(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            sock = self._listener.accept(self._loop, self._accept)
        except OSError as error:
            _log.warning("%s: can't accept a client: %s", self.name, error)
            return
        if sock is None:
            return
        try:
            process = PeerProcess.of_socket(sock)
        except PeerError as error:
            sock.close()
            self._turn_away(error)
            return
        try:
            self.admit(sock, process)
        except PeerError as error:
            self._turn_away(error)

    def _turn_away(self, error: PeerError) -> None:
        self.turned_away += 1
        if self.turned_away <= _LOGGED:
            _log.warning("%s: a client is turned away: %s", self.name, error)

    def _gone(self, why: str) -> None:
        if self._client is not None:
            self.farewell = self._client.farewell
        self._client = None
        if self._on_gone is not None:
            self._on_gone(why)
