"""Serves one device on a UNIX socket, to one client after the other."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from viommu.vfio_user.connection import Connection, peer_process
from viommu.vfio_user.irqs import IrqLines
from viommu.vfio_user.listener import Listener
from viommu.vfio_user.protocol import MessageSizeError
from viommu.vfio_user.served import IrqInfo, RegionInfo, ServedDevice
from viommu.vfio_user.session import Answer, ServerLimits, Session, SessionCounters

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.loop import Loop, Timer
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

_RETRY_ACCEPT: Final = 0.1  # seconds, when there is no file descriptor left for a client


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
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._deadline: Timer | None = None
        self._listener = Listener(path)
        loop.on_readable(self._listener, self._accept)

    @property
    def connected(self) -> bool:
        """Return whether a client is there and has negotiated."""
        return self._session is not None and self._session.ready

    def suspect_memory(self, gpa: int | None = None) -> None:
        """Check that guest memory is shared: the device misses what the guest must have written.

        ``gpa`` is an address where it should be. Cheap, bounded, and without
        effect on clients that can't be asked for memory.
        """
        if self._session is not None:
            self._session.suspect_memory(gpa)
            self._loop.call_soon(self._ask)

    def close(self) -> None:
        """Disconnect the client, stop listening and remove the path."""
        self._disconnect("the server is closing")
        if self._listener.fileno() >= 0:
            self._loop.forget(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        if self._listener.fileno() < 0:
            return  # closed since a retry was planned
        try:
            sock, _ = self._listener.socket.accept()
        except BlockingIOError:
            return  # it has gone again
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _LOG.warning("%s: can't accept a client: %s", self.device.name, error)
                return
            _LOG.warning("%s: no resources for another client: %s", self.device.name, error)
            self._loop.on_readable(self._listener, None)
            self._loop.call_later(_RETRY_ACCEPT, self._accept_again)
            return
        self._finish_departed()
        if self._connection is not None:
            self.turned_away += 1
            _LOG.warning("%s: a second client was turned away", self.device.name)
            sock.close()
            return
        self.clients += 1
        self.memory_refused = None
        self._connection = Connection(sock, self._limits.max_message)
        self._session = Session(
            self.device,
            self._files,
            self._limits,
            self.counters,
            peer=peer_process(sock),
            refuse=self._memory_refused,
        )
        self._deadline = self._loop.call_later(self._limits.negotiation_time, self._too_late)
        self._loop.on_readable(self._connection, self._serve)

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.on_readable(self._listener, self._accept)

    def _finish_departed(self) -> None:
        """Handle the last messages of a client that has hung up, if one has."""
        while self._connection is not None and self._connection.hung_up:
            if self._connection.backlog:
                self._disconnect("closed by the peer before it read its replies")
            else:
                self._serve()

    def _serve(self) -> None:
        """Handle the messages that have arrived, up to a turn's worth."""
        for _ in range(self._limits.messages_per_turn):
            connection, session = self._connection, self._session
            if connection is None or session is None or connection.backlog:
                return
            try:
                message = connection.receive()
            except MessageSizeError as error:
                answer: Answer | None = session.reject(error)
            except EOFError as error:
                self._disconnect(str(error))
                return
            else:
                if message is None:
                    return
                answer = session.handle(message)
                if answer is not None and self._late():
                    answer = session.withhold(message, answer)
            if answer is not None:
                self._answer(connection, answer)
            self._ask()

    def _late(self) -> bool:
        """Whether what is handled now may have waited longer than a client does."""
        return self._loop.clock() - self._loop.ready_since > self._limits.reply_time

    def _answer(self, connection: Connection, answer: Answer) -> None:
        if answer.data:
            self._send(connection, answer.data, answer.fds)
        if answer.hang_up and self._connection is connection:
            self._disconnect("its messages can't be served")

    def _ask(self) -> None:
        """Send a command of ours, now that all of the client's are answered."""
        connection, session = self._connection, self._session
        if connection is None or session is None or connection.backlog:
            return
        if (command := session.next_command()) is not None:
            self._send(connection, command)

    def _send(self, connection: Connection, data: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            connection.send(data, fds)
        except EOFError as error:
            self._disconnect(str(error))
            return
        if connection.backlog:
            # A client that doesn't read is not read from: one reply is all that waits.
            self._loop.on_readable(connection, None)
            self._loop.on_writable(connection, self._flush)

    def _flush(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            connection.flush()
        except EOFError as error:
            self._disconnect(str(error))
            return
        if not connection.backlog:
            self._loop.on_writable(connection, None)
            self._loop.on_readable(connection, self._serve)

    def _too_late(self) -> None:
        if self._session is not None and not self._session.ready:
            self._disconnect("it did not negotiate in time")

    def _memory_refused(self, why: str) -> None:
        if self.memory_refused is not None:
            return
        self.memory_refused = why
        _LOG.error("%s: %s", self.device.name, why)
        if self.on_memory_refused is not None:
            self.on_memory_refused(why)

    def _disconnect(self, why: str) -> None:
        connection, session = self._connection, self._session
        self._connection = self._session = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if connection is not None:
            _LOG.info("%s: client disconnected: %s", self.device.name, why)
            self._loop.forget(connection)
            connection.close()
        if session is not None:
            session.close()
