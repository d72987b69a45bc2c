"""Serves one device to one client, whose socket is already connected."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Final

from viommu.deferred import Deferred
from viommu.vfio_user.connection import Connection, peer_process
from viommu.vfio_user.message_port import MessagePort
from viommu.vfio_user.protocol import MessageSizeError
from viommu.vfio_user.session import Answer, ServerLimits, Session, SessionCounters

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from viommu.loop import Loop
    from viommu.memory import MappedFiles
    from viommu.vfio_user.protocol import Message
    from viommu.vfio_user.served import ServedDevice

__all__ = ["ServedClient"]

_LOG: Final = logging.getLogger("viommu.vfio_user")


class ServedClient:
    """One client on ``sock``, which is owned and made non-blocking; driven by ``loop``.

    Messages are handled in order. While the answer to one is awaited from the
    device, or the client doesn't read, nothing further is read from it. The device
    may wait for the client's memory: see :class:`~viommu.memory.MessageMemory`.

    ``counters`` may be those of the client before. ``on_gone`` is told why when the
    client has left, or was dropped for what it did; the device is disconnected by
    then. ``on_memory_refused`` is called with a message for people when guest memory
    turns out to be out of reach; the client gets an error, or is disconnected.
    """

    def __init__(
        self,
        loop: Loop,
        device: ServedDevice,
        sock: socket.socket,
        files: MappedFiles,
        limits: ServerLimits | None = None,
        *,
        counters: SessionCounters | None = None,
        on_gone: Callable[[str], None] | None = None,
        on_memory_refused: Callable[[str], None] | None = None,
    ) -> None:
        self.device = device
        self.counters = counters or SessionCounters()
        self.closed = False
        #: Why the client's memory could not be used.
        self.memory_refused: str | None = None
        self._loop = loop
        self._limits = limits or ServerLimits()
        self._on_gone = on_gone
        self._on_memory_refused = on_memory_refused
        self._connection = Connection(sock, self._limits.max_message)
        self._session = Session(
            device,
            files,
            self._limits,
            self.counters,
            peer=peer_process(sock),
            refuse=self._refuse_memory,
        )
        self._port = MessagePort(
            self._connection,
            self._session.fresh_id,
            self._limits.dma_time,
            noticed=lambda: loop.call_soon(self._serve),
            lost=self._lost,
        )
        self._session.port = self._port
        # Something has to be done before the next message is read, or a command sent.
        self._held = False
        # Since when, at the earliest, what has not been read waits in the socket.
        self._unread_since = math.inf
        self._deadline = loop.call_later(self._limits.negotiation_time, self._too_late)
        loop.on_readable(self._connection, self._serve)

    @property
    def ready(self) -> bool:
        """Whether the client is there and has negotiated."""
        return self._session.ready

    def suspect_memory(self, gpa: int | None = None) -> None:
        """Check that guest memory is shared: the device misses what the guest must have written.

        ``gpa`` is an address where it should be. Cheap, bounded, and without
        effect on clients that can't be asked for memory.
        """
        self._session.suspect_memory(gpa)
        self._loop.call_soon(self._ask)

    def finish_departed(self) -> None:
        """Handle the last messages of the client if it has hung up, and let it go."""
        while not self.closed and self._connection.hung_up:
            if self._connection.backlog:
                self._drop("closed by the peer before it read its replies")
            elif self._held:
                self._left_waiting()
            else:
                self._serve()

    def close(self) -> None:
        """Disconnect the client; closing twice is harmless."""
        self._close("the server is closing")

    def _serve(self) -> None:
        """Handle the messages that have arrived, up to a turn's worth."""
        for _ in range(self._limits.messages_per_turn):
            if self.closed or self._connection.backlog or self._held:
                return
            try:
                message = self._port.take() or self._connection.receive()
            except MessageSizeError as error:
                self._send_answer(self._session.reject(error))
            except EOFError as error:
                self._drop(str(error))
                return
            else:
                if message is None:
                    self._unread_since = math.inf
                    return
                self._handle(message)
            self._ask()
        if self._port.arrived:
            self._loop.call_soon(self._serve)

    def _handle(self, message: Message) -> None:
        since = min(self._loop.ready_since, self._unread_since)
        answer = self._session.handle(message)
        if isinstance(answer, Deferred):
            self._unread_since = since
            self._hold()
            answer.then(partial(self._answered, message, since))
        elif answer is not None:
            self._answer(message, since, answer)

    def _answered(self, message: Message, since: float, awaited: Deferred[Answer | None]) -> None:
        """Go on: the answer to a message is there."""
        self._resume()
        if (answer := awaited.result()) is not None:
            self._answer(message, since, answer)
        self._ask()

    def _hold(self) -> None:
        """Read nothing further for now, but notice when the client goes."""
        self._held = True
        self._loop.on_readable(self._connection, None)
        self._loop.on_hang_up(self._connection, self._left_waiting)

    def _resume(self) -> None:
        if self._port.ended:
            return  # the client is about to be dropped
        self._held = False
        if not self._connection.unread:
            self._unread_since = math.inf
        self._loop.on_hang_up(self._connection, None)
        self._read()

    def _read(self) -> None:
        """Take messages again."""
        if not self._held and not self._connection.backlog:
            self._loop.on_readable(self._connection, self._serve)
            if self._port.arrived:
                self._loop.call_soon(self._serve)

    def _answer(self, message: Message, since: float, answer: Answer) -> None:
        """Answer a message that may have come at ``since``."""
        if self._loop.clock() - since > self._limits.reply_time:
            answer = self._session.withhold(message, answer)
        self._send_answer(answer)

    def _send_answer(self, answer: Answer) -> None:
        if answer.data:
            self._send(answer.data, answer.fds)
        if answer.hang_up:
            self._drop("its messages can't be served")
        elif answer.then is not None and not self.closed:
            self._hold()
            self._loop.call_soon(partial(self._follow_up, answer))

    def _follow_up(self, answer: Answer) -> None:
        """Do what an answer has left to be done, now that it is on its way."""
        if self.closed:
            return
        done = self._session.follow_up(answer)
        if done is None:
            self._resume()
        else:
            done.then(lambda _: self._resume())

    def _ask(self) -> None:
        """Send a command of ours, now that all of the client's are answered."""
        if self.closed or self._connection.backlog or self._held:
            return
        if (command := self._session.next_command()) is not None:
            self._send(command)

    def _send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            self._connection.send(data, fds)
        except EOFError as error:
            self._drop(str(error))
            return
        if self._connection.backlog:
            # A client that doesn't read is not read from: one reply is all that waits.
            self._loop.on_readable(self._connection, None)
            self._loop.on_writable(self._connection, self._flush)

    def _flush(self) -> None:
        try:
            self._connection.flush()
        except EOFError as error:
            self._drop(str(error))
            return
        if not self._connection.backlog:
            self._loop.on_writable(self._connection, None)
            self._read()

    def _too_late(self) -> None:
        if not self._session.ready:
            self._drop("it did not negotiate in time")

    def _lost(self, why: str) -> None:
        """Drop the client, but not before its device has finished what it is doing."""
        self._held = True
        self._loop.call_soon(partial(self._drop, why))

    def _left_waiting(self) -> None:
        self._drop("closed by the peer while it waited for an answer")

    def _refuse_memory(self, why: str) -> None:
        if self.memory_refused is not None:
            return
        self.memory_refused = why
        _LOG.error("%s: %s", self.device.name, why)
        if self._on_memory_refused is not None:
            self._on_memory_refused(why)

    def _drop(self, why: str) -> None:
        if self._close(why) and self._on_gone is not None:
            self._on_gone(why)

    def _close(self, why: str) -> bool:
        """Disconnect the client; return whether it was there."""
        if self.closed:
            return False
        self.closed = True
        self._deadline.cancel()
        _LOG.info("%s: client disconnected: %s", self.device.name, why)
        self._loop.forget(self._connection)
        self._port.end(why)
        self._connection.close()
        self._session.close()
        return True
