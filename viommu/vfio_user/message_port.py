"""Reads and writes the memory of a client with DMA_READ and DMA_WRITE, and waits for it.

QEMU must not be asked like this: it answers only while none of its own commands is
outstanding (its CPUs and its main loop share a lock), so both would wait for each
other. :attr:`Capabilities.message_dma` says which clients can be asked at any time.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from viommu.errors import GuestMemoryError
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user.connection import close_fds
from viommu.vfio_user.protocol import MessageSizeError, command_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.vfio_user.connection import Connection
    from viommu.vfio_user.protocol import Message

__all__ = ["MessagePort"]

_MAX_TRANSFER: Final = 64 << 10
_MAX_ARRIVED: Final = 16384
_MAX_ARRIVED_BYTES: Final = 16 << 20


class MessagePort:
    """Implements :class:`~viommu.memory.MemoryPort` on the connection of a client.

    What the client sends while it is waited for is kept in order, for :meth:`take`;
    ``noticed`` is called when there is something. ``fresh_id`` returns an id for a
    command of ours.

    A client that doesn't answer within ``timeout`` seconds, answers nonsense or goes
    away is not asked again, and ``lost`` is told why. The device is in the middle of
    something then: ``lost`` must not disconnect it before that has come to its end.
    """

    def __init__(
        self,
        connection: Connection,
        fresh_id: Callable[[], int],
        timeout: float,
        *,
        noticed: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        #: How many bytes are transferred at a time; the client may take less.
        self.max_transfer = _MAX_TRANSFER
        self._connection = connection
        self._fresh_id = fresh_id
        self._timeout = timeout
        self._noticed = noticed
        self._lost = lost
        self._ended: str | None = None
        self._arrived: deque[Message] = deque()
        self._arrived_bytes = 0

    @property
    def ended(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._ended is not None

    @property
    def arrived(self) -> bool:
        """Whether :meth:`take` has a message."""
        return bool(self._arrived)

    def take(self) -> Message | None:
        """Return the first message that came while a reply was awaited, if there is one."""
        if not self._arrived:
            return None
        message = self._arrived.popleft()
        self._arrived_bytes -= len(message.payload)
        return message

    def read(self, gpa: int, size: int) -> bytes:
        """Return ``size`` bytes at ``gpa``.

        Raises:
            GuestMemoryError: The client refuses, or can't be asked any more.
        """
        data = []
        for at, length in self._chunks(gpa, size):
            head = spec.DMA_ACCESS.pack(at, length)
            payload = self._ask(Command.DMA_READ, head, at, length)
            if len(payload) != len(head) + length or not payload.startswith(head):
                raise self._end(at, length, f"it sent {len(payload)} bytes for a read of {length}")
            data.append(payload[len(head) :])
        return b"".join(data)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``; raises as :meth:`read` does."""
        source = memoryview(data)
        for at, length in self._chunks(gpa, len(source)):
            head = spec.DMA_ACCESS.pack(at, length)
            # Some reply with the address and the count, some with nothing.
            self._ask(Command.DMA_WRITE, head + source[at - gpa :][:length], at, length)

    def end(self, why: str) -> None:
        """Ask nothing more, and forget what has arrived."""
        self._ended = self._ended or why
        for message in self._arrived:
            close_fds(message.fds)
        self._arrived.clear()

    def _chunks(self, gpa: int, size: int) -> Iterator[tuple[int, int]]:
        for at in range(gpa, gpa + size, self.max_transfer):
            yield at, min(self.max_transfer, gpa + size - at)

    def _ask(self, command: int, payload: bytes, gpa: int, size: int) -> bytes:
        """Send a command about ``[gpa, gpa + size)``; return the payload of the reply."""
        if self._ended is not None:
            raise GuestMemoryError(gpa, size, f"its client is gone: {self._ended}")
        ident = self._fresh_id()
        try:
            self._connection.send(command_message(ident, command, payload))
            reply = self._await(ident, command)
        except MessageSizeError as error:
            close_fds(error.message.fds)
            raise self._end(gpa, size, str(error)) from error
        except EOFError as error:
            raise self._end(gpa, size, str(error)) from error
        close_fds(reply.fds)
        if reply.flags & spec.F_ERROR:
            why = os.strerror(reply.error) if reply.error else "an error without a number"
            raise GuestMemoryError(gpa, size, f"the client refused command {command}: {why}")
        return reply.payload

    def _await(self, ident: int, command: int) -> Message:
        """Return the reply to a command of ours.

        Raises:
            EOFError: There will be none.
            MessageSizeError: The client's messages can't be told apart any more.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._connection.receive()
            if message is None:
                self._wait(deadline)
            elif (message.kind, message.id, message.command) == (
                spec.F_TYPE_REPLY,
                ident,
                command,
            ):
                if self._connection.backlog:
                    # What is left of the command would be nobody's to send.
                    close_fds(message.fds)
                    raise EOFError("it answered what it had not read")
                return message
            else:
                self._keep(message)

    def _wait(self, deadline: float) -> None:
        """Wait until the connection can be read, sending what waits to be sent."""
        writing = select.POLLOUT if self._connection.backlog else 0
        poll = select.poll()
        poll.register(self._connection, select.POLLIN | writing)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise EOFError(f"it did not answer for its memory within {self._timeout} s")
        if writing:
            self._connection.flush()

    def _keep(self, message: Message) -> None:
        if not self._arrived:
            self._noticed()
        self._arrived.append(message)
        self._arrived_bytes += len(message.payload)
        if len(self._arrived) > _MAX_ARRIVED or self._arrived_bytes > _MAX_ARRIVED_BYTES:
            raise EOFError("it sent too much while it was asked for its memory")

    def _end(self, gpa: int, size: int, why: str) -> GuestMemoryError:
        self._ended = why
        self._lost(why)
        return GuestMemoryError(gpa, size, f"its client is gone: {why}")
