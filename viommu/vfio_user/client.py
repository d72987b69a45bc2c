"""A synchronous vfio-user client: uses a device that another process serves."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu.errors import GuestMemoryError, PeerError, UsageError
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user.channel import Channel
from viommu.vfio_user.connection import close_fds
from viommu.vfio_user.protocol import (
    Capabilities,
    Message,
    command_message,
    decode_version,
    encode_version,
    error_reply,
    reply_message,
)
from viommu.vfio_user.region_info import decode_region_info
from viommu.vfio_user.served import IrqInfo, RegionInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from viommu.memory import GuestMemory

__all__ = ["Client", "DeviceInfo"]

_MAX_FDS: Final = 8
_MAX_DMA_MAPS: Final = 65535
_PAGE: Final = 4096


class DeviceInfo(NamedTuple):
    """``VFIO_DEVICE_FLAGS_*``, and how many regions and kinds of interrupt there are."""

    flags: int
    num_regions: int
    num_irqs: int


class Client:
    """Connects to ``path`` and negotiates; every call waits for its reply, at most ``timeout`` s.

    With ``memory`` the client serves DMA_READ and DMA_WRITE from it, whenever it
    waits for a reply or is in :meth:`serve`; without, it refuses them.

    Every call may raise :exc:`~viommu.errors.PeerError`. With the errno of an
    error reply the connection goes on. ETIMEDOUT (no reply), ECONNRESET (the
    server has gone) and EPROTO (it answered nonsense) close it, and from then on
    every call fails with ENOTCONN.
    """

    def __init__(
        self, path: Path, *, timeout: float = 5.0, memory: GuestMemory | None = None
    ) -> None:
        self.memory = memory
        self._next_id = 0
        self._channel = Channel(path, timeout)
        try:
            #: The minor version that is spoken, and what the server can take.
            self.minor, self.capabilities = self._negotiate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; closing twice is harmless."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed; readable: call :meth:`serve`."""
        return self._channel.fileno()

    def dma_map(
        self,
        gpa: int,
        size: int,
        *,
        fd: int | None = None,
        offset: int = 0,
        readable: bool = True,
        writable: bool = True,
    ) -> None:
        """Give the server memory: ``[gpa, gpa + size)`` is the file ``fd`` from ``offset`` on.

        Without ``fd`` the server knows of the memory, but can't map it.
        """
        flags = (spec.DMA_MAP_F_READ if readable else 0) | (spec.DMA_MAP_F_WRITE if writable else 0)
        payload = spec.DMA_MAP.pack(spec.DMA_MAP.size, flags, offset, gpa, size)
        self._request(Command.DMA_MAP, payload, 0, fds=[] if fd is None else [fd])

    def dma_unmap(self, gpa: int, size: int) -> None:
        """Take back what one :meth:`dma_map` gave."""
        self._dma_unmap(0, gpa, size)

    def dma_unmap_all(self) -> None:
        """Take back all memory."""
        self._dma_unmap(spec.DMA_UNMAP_F_ALL, 0, 0)

    def device_info(self) -> DeviceInfo:
        """Ask what kind of device it is."""
        size = spec.DEVICE_INFO.size
        request = spec.DEVICE_INFO.pack(size, 0, 0, 0)
        reply = self._request(Command.DEVICE_GET_INFO, request, size)
        _, flags, regions, irqs = spec.DEVICE_INFO.unpack(reply.payload)
        return DeviceInfo(flags, regions, irqs)

    def region_info(self, index: int) -> RegionInfo:
        """Ask about a region; a file descriptor in the answer is the caller's to close."""
        argsz = vfio.REGION_INFO.size
        for _ in range(2):  # the first answer may say that there is more to accept
            request = vfio.REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
            reply = self._request(Command.DEVICE_GET_REGION_INFO, request, None, max_fds=1)
            try:
                needed, info = decode_region_info(reply.payload, index)
            except PeerError as error:
                close_fds(reply.fds)
                raise self._channel.broken(error.errno, str(error)) from error
            if needed <= argsz:
                return info._replace(fd=reply.fds[0] if reply.fds else None)
            close_fds(reply.fds)
            argsz = needed
        raise self._channel.broken(errno.EPROTO, f"{argsz} bytes of information on region {index}")

    def irq_info(self, index: int) -> IrqInfo:
        """Ask about a kind of interrupt."""
        size = vfio.IRQ_INFO.size
        request = vfio.IRQ_INFO.pack(size, 0, index, 0)
        reply = self._request(Command.DEVICE_GET_IRQ_INFO, request, size)
        _, flags, _, count = vfio.IRQ_INFO.unpack(reply.payload)
        return IrqInfo(count, flags)

    def set_irqs(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        *,
        bools: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """Send a SET_IRQS as it is; ``flags`` are ``VFIO_IRQ_SET_*``."""
        argsz = vfio.IRQ_SET.size + len(bools)
        payload = vfio.IRQ_SET.pack(argsz, flags, index, start, count) + bools
        self._request(Command.DEVICE_SET_IRQS, payload, 0, fds=fds)

    def assign_irqs(self, index: int, start: int, fds: Sequence[int]) -> None:
        """Have vectors from ``start`` on signalled by eventfds, which stay the caller's."""
        flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
        chunk = max(1, self.capabilities.max_msg_fds)
        for first in range(0, len(fds), chunk):
            some = fds[first : first + chunk]
            self.set_irqs(index, flags, start + first, len(some), fds=some)

    def disable_irqs(self, index: int) -> None:
        """Have no vector of this kind signalled any more."""
        self.set_irqs(index, vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER, 0, 0)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read ``count`` bytes, at most what the server transfers at a time."""
        self._check_count(count)
        head = spec.REGION_ACCESS.pack(offset, region, count)
        reply = self._request(Command.REGION_READ, head, len(head) + count)
        return reply.payload[len(head) :]

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write ``data``; a posted write is not answered, not even when it fails."""
        self._check_count(len(data))
        head = spec.REGION_ACCESS.pack(offset, region, len(data))
        if posted:
            self._send(Command.REGION_WRITE, head + data, no_reply=True)
        else:
            self._request(Command.REGION_WRITE, head + data, len(head))

    def reset(self) -> None:
        """Reset the device."""
        self._request(Command.DEVICE_RESET, b"", 0)

    def serve(self, until: Callable[[], bool]) -> None:
        """Serve the server's DMA_READ and DMA_WRITE until ``until()``, asked before each.

        Raises:
            PeerError: ETIMEDOUT when no command comes within the time-out.
        """
        while not until():
            message = self._channel.receive(time.monotonic() + self._channel.timeout)
            if message.kind != spec.F_TYPE_COMMAND:
                close_fds(message.fds)
                raise self._channel.broken(errno.EPROTO, f"a reply to message {message.id} unasked")
            self._serve_command(message)

    def _negotiate(self) -> tuple[int, Capabilities]:
        # Serving DMA has no capability of its own: send what QEMU sends, which does.
        ours = Capabilities(_MAX_FDS)
        if self.memory is not None:
            ours = Capabilities(_MAX_FDS, max_dma_maps=_MAX_DMA_MAPS, pgsizes=_PAGE)
        reply = self._request(Command.VERSION, encode_version(spec.VERSION_MINOR, ours), None)
        try:
            minor, theirs = decode_version(reply.payload)
        except PeerError as error:
            raise PeerError(errno.EPROTO, f"the server's answer: {error}") from error
        if minor > spec.VERSION_MINOR:
            raise PeerError(errno.EPROTO, f"version 0.{minor} was not offered")
        return minor, theirs

    def _dma_unmap(self, flags: int, gpa: int, size: int) -> None:
        payload = spec.DMA_UNMAP.pack(spec.DMA_UNMAP.size, flags, gpa, size)
        self._request(Command.DMA_UNMAP, payload, len(payload))

    def _check_count(self, count: int) -> None:
        limit = self.capabilities.max_data_xfer_size
        if not 0 <= count <= limit:
            raise UsageError(f"{count} bytes can't be transferred, the server takes {limit}")

    def _request(
        self,
        command: int,
        payload: bytes,
        expected: int | None,
        *,
        fds: Sequence[int] = (),
        max_fds: int = 0,
    ) -> Message:
        """Send a command and return its reply, with ``expected`` bytes and few enough fds."""
        ident = self._send(command, payload, fds)
        deadline = time.monotonic() + self._channel.timeout
        while (message := self._channel.receive(deadline)).kind == spec.F_TYPE_COMMAND:
            self._serve_command(message)
        failed = bool(message.flags & spec.F_ERROR)
        wrong = None
        if (message.id, message.command) != (ident, command):
            wrong = f"it is to message {message.id}, command {message.command}"
        elif len(message.fds) > (0 if failed else max_fds):
            wrong = f"it has {len(message.fds)} file descriptors"
        elif not failed and expected is not None and len(message.payload) != expected:
            wrong = f"it has {len(message.payload)} bytes instead of {expected}"
        if wrong is not None:
            close_fds(message.fds)
            why = f"the reply to message {ident}, command {command}: {wrong}"
            raise self._channel.broken(errno.EPROTO, why)
        if failed:
            number = message.error or errno.EIO
            raise PeerError(number, f"command {command} failed: {os.strerror(number)}")
        return message

    def _send(
        self, command: int, payload: bytes, fds: Sequence[int] = (), *, no_reply: bool = False
    ) -> int:
        ident = self._next_id
        self._next_id = (ident + 1) & 0xFFFF
        self._channel.send(command_message(ident, command, payload, no_reply=no_reply), fds)
        return ident

    def _serve_command(self, message: Message) -> None:
        """Answer a DMA_READ or DMA_WRITE of the server; the errors are QEMU's."""
        try:
            reply = reply_message(message, self._access(message))
        except PeerError as error:
            reply = error_reply(message, error.errno)
        except GuestMemoryError:
            reply = error_reply(message, errno.ENODEV)
        finally:
            close_fds(message.fds)
        if not message.no_reply:
            self._channel.send(reply)

    def _access(self, message: Message) -> bytes:
        if self.memory is None or message.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise PeerError(errno.ENOSYS, f"command {message.command} is not served")
        size = spec.DMA_ACCESS.size
        if len(message.payload) < size or message.fds:
            raise PeerError(errno.EINVAL, f"{len(message.payload)} bytes, {len(message.fds)} fds")
        head, data = message.payload[:size], message.payload[size:]
        gpa, count = spec.DMA_ACCESS.unpack(head)
        if count > self.capabilities.max_data_xfer_size:
            raise PeerError(errno.E2BIG, f"{count} bytes are too many")
        if message.command == Command.DMA_READ:
            return head + self.memory.read(gpa, count)
        if count != len(data):
            raise PeerError(errno.EINVAL, f"{len(data)} bytes of data, {count} announced")
        self.memory.write(gpa, data)
        return head
