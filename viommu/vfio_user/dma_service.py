"""Serves a device that wants memory: DMA_READ and DMA_WRITE, one message in, one out. No I/O.

Errors are those that QEMU answers.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final, Protocol

from viommu.errors import GuestMemoryError, PeerError, TranslationFault, ViommuError
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user.protocol import errno_of, error_reply, reply_message

if TYPE_CHECKING:
    from viommu.vfio_user.protocol import Message

__all__ = ["DmaPort", "DmaService"]

_LOG: Final = logging.getLogger("viommu.vfio_user")


class DmaPort(Protocol):
    """Memory that a device reaches by messages: :class:`~viommu.memory.GuestMemory`, or less.

    What is not there, or not for the device, is a GuestMemoryError or a
    TranslationFault, which the device sees as ENODEV; of any other ViommuError it
    sees the errno.
    """

    def read(self, address: int, size: int) -> bytes:
        """Return exactly ``size`` bytes, all of them or an error."""

    def write(self, address: int, data: bytes) -> None:
        """Store ``data``, all of it or nothing."""


class DmaService:
    """Answers the commands of a device; without ``port`` they are all refused.

    ``max_transfer`` is what the client has announced that it takes at a time.
    """

    def __init__(self, port: DmaPort | None, max_transfer: int) -> None:
        #: How many commands have come, how many of them were reads and writes that
        #: succeeded, and how many were refused.
        self.commands = self.reads = self.writes = self.refused = 0
        self._port = port
        self._max_transfer = max_transfer

    def answer(self, message: Message) -> bytes | None:
        """Return the reply to a command, ``None`` if there must be none."""
        self.commands += 1
        try:
            reply = reply_message(message, self._access(message))
        except (GuestMemoryError, TranslationFault):
            reply = self._refusal(message, errno.ENODEV)
        except ViommuError as error:
            reply = self._refusal(message, errno_of(error))
        except Exception:  # noqa: BLE001 - a defect met by one device must not end the others
            _LOG.exception("internal error, please report it")
            reply = self._refusal(message, errno.EIO)
        return None if message.no_reply else reply

    def _refusal(self, message: Message, number: int) -> bytes:
        self.refused += 1
        return error_reply(message, number)

    def _access(self, message: Message) -> bytes:
        if self._port is None or message.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise PeerError(errno.ENOSYS, f"command {message.command} is not served")
        size = spec.DMA_ACCESS.size
        if len(message.payload) < size or message.fds or message.truncated:
            raise PeerError(errno.EINVAL, f"{len(message.payload)} bytes, {len(message.fds)} fds")
        head, data = message.payload[:size], message.payload[size:]
        address, count = spec.DMA_ACCESS.unpack(head)
        if count > self._max_transfer:
            raise PeerError(errno.E2BIG, f"{count} bytes are more than {self._max_transfer}")
        if message.command == Command.DMA_READ:
            found = self._port.read(address, count)
            self.reads += 1
            return head + found
        if count != len(data):
            number = errno.E2BIG if count > len(data) else errno.EINVAL
            raise PeerError(number, f"{len(data)} bytes of data, {count} announced")
        self._port.write(address, data)
        self.writes += 1
        return head
