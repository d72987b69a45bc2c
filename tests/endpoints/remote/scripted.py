"""A device in another process, as far as its client can tell: it does what a test says, or lies."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from viommu.errors import PeerError
from viommu.spec import pci, vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import IrqInfo, RegionInfo
from viommu.vfio_user.connection import close_fds, receive, send
from viommu.vfio_user.protocol import (
    Capabilities,
    Message,
    MessageReader,
    encode_version,
    error_reply,
    reply_message,
)
from viommu.vfio_user.region_info import encode_region_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.loop import Loop

CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
INTX, MSI, MSIX, ERR, REQ = range(5)
READ_WRITE: Final = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
MAPPABLE: Final = READ_WRITE | vfio.REGION_INFO_FLAG_MMAP
EVENTFD: Final = vfio.IRQ_INFO_EVENTFD
BAR0, BAR2 = 0x1000, 0x8000
EXPRESS, MSIX_CAP, PM = 0x40, 0x80, 0x90
FLR: Final = (EXPRESS + pci.EXP_DEVCTL, b"\0\x80")


class Shape:
    """What a device says of itself."""

    def __init__(self) -> None:
        self.capabilities = Capabilities(8)
        self.flags = vfio.DEVICE_FLAGS_PCI | vfio.DEVICE_FLAGS_RESET
        self.num_regions = 9
        self.num_irqs = 5
        self.regions = {
            0: RegionInfo(BAR0, READ_WRITE),
            2: RegionInfo(BAR2, READ_WRITE),
            CONFIG: RegionInfo(4096, READ_WRITE),
        }
        self.irqs = {
            INTX: IrqInfo(1, EVENTFD | vfio.IRQ_INFO_MASKABLE | vfio.IRQ_INFO_AUTOMASKED),
            MSIX: IrqInfo(8, EVENTFD | vfio.IRQ_INFO_NORESIZE),
            ERR: IrqInfo(1, EVENTFD),
        }
        self.config = bytearray(4096)
        self.put(pci.VENDOR_ID, 0x34121B36, 4)
        self.put(pci.STATUS, pci.STATUS_CAP_LIST, 2)
        self.put(pci.REVISION_ID, 0x01020304, 4)
        self.put(pci.ROM_ADDRESS, 0xFFFFF801, 4)
        self.put(pci.CAPABILITY_LIST, EXPRESS, 1)
        self.put(pci.INTERRUPT_PIN, 1, 1)
        self.put(EXPRESS, pci.CAP_ID_EXPRESS | MSIX_CAP << 8, 2)
        self.put(EXPRESS + pci.EXP_DEVCAP, pci.EXP_DEVCAP_FLR, 4)
        self.put(MSIX_CAP, pci.CAP_ID_MSIX, 2)
        self.config[MSIX_CAP + 2 : MSIX_CAP + 12] = pci.MSIX.pack(7, 0x2002, 0x3002)

    def put(self, at: int, value: int, size: int) -> None:
        self.config[at : at + size] = value.to_bytes(size, "little")


class Scripted:
    """Serves a :class:`Shape` on a socket; ``log`` is what was asked of it, in order.

    ``mute`` and ``refuse`` have commands that it does not answer, or with an errno.
    ``lie`` may replace any reply.
    """

    def __init__(self, loop: Loop, sock: socket.socket, shape: Shape) -> None:
        self.shape = shape
        self.log: list[tuple[Any, ...]] = []
        self.mute: set[int] = set()
        self.refuse: dict[int, int] = {}
        self.lie: Callable[[Message, bytes], bytes] | None = None
        self.waiting: list[Message] = []
        self.hello = b""
        self.eventfds: dict[tuple[int, int], int] = {}
        self.bars = {index: bytearray(info.size) for index, info in shape.regions.items()}
        self.bars[CONFIG] = bytearray(shape.config)
        self._loop = loop
        self._socket = sock
        sock.setblocking(False)
        self._reader = MessageReader()
        loop.on_readable(sock, self._readable)

    @property
    def open(self) -> bool:
        return self._socket.fileno() >= 0

    def writes(self) -> list[tuple[Any, ...]]:
        """What was written since the last time this was asked, without the regions' reads."""
        found = [entry for entry in self.log if entry[0] != "read"]
        self.log.clear()
        return found

    def die(self) -> None:
        if self.open:
            self._loop.forget(self._socket)
            self._socket.close()
        close_fds(self._reader.take_fds())
        for message in self.waiting:
            close_fds(message.fds)
        for fd in self.eventfds.values():
            os.close(fd)
        self.eventfds.clear()

    def answer_waiting(self) -> None:
        """Answer what it was mute on."""
        self.mute.clear()
        waiting, self.waiting = self.waiting, []
        for message in waiting:
            self._answer(message)

    def _readable(self) -> None:
        while self.open:
            try:
                data, fds, _ = receive(self._socket, self._reader.wanted, self._reader.wanted_fds)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self.die()
                return
            message = self._reader.feed(data, fds)
            if message is not None and message.kind == spec.F_TYPE_COMMAND:
                if message.command in self.mute:
                    self.waiting.append(message)
                else:
                    self._answer(message)

    def _answer(self, message: Message) -> None:
        fds: tuple[int, ...] = ()
        if message.command in self.refuse:
            data = error_reply(message, self.refuse[message.command])
        else:
            try:
                payload, fds = self._do(message)
            except PeerError as error:
                data = error_reply(message, error.errno)
            else:
                data = reply_message(message, payload)
        close_fds(message.fds)
        if self.lie is not None:
            data = self.lie(message, data)
        if not message.no_reply and data:
            try:
                assert send(self._socket, data, fds) == len(data)
            except BrokenPipeError:
                self.die()

    def _do(self, message: Message) -> tuple[bytes, tuple[int, ...]]:
        shape, payload = self.shape, message.payload
        match message.command:
            case Command.VERSION:
                self.hello = payload
                return encode_version(0, shape.capabilities), ()
            case Command.DEVICE_GET_INFO:
                info = (spec.DEVICE_INFO.size, shape.flags, shape.num_regions, shape.num_irqs)
                return spec.DEVICE_INFO.pack(*info), ()
            case Command.DEVICE_GET_REGION_INFO:
                argsz, _, index, *_ = vfio.REGION_INFO.unpack_from(payload)
                if index not in shape.regions and index >= 4:
                    raise PeerError(errno.EINVAL, "not described")
                region = shape.regions.get(index, RegionInfo(0, 0))
                data, complete = encode_region_info(region, index, argsz)
                return data, () if region.fd is None or not complete else (region.fd,)
            case Command.DEVICE_GET_IRQ_INFO:
                _, _, index, _ = vfio.IRQ_INFO.unpack(payload)
                if index not in shape.irqs:
                    raise PeerError(errno.EINVAL, "not described")
                irq = shape.irqs[index]
                return vfio.IRQ_INFO.pack(vfio.IRQ_INFO.size, irq.flags, index, irq.count), ()
            case Command.DEVICE_SET_IRQS:
                return self._set_irqs(message), ()
            case Command.REGION_READ:
                offset, index, count = spec.REGION_ACCESS.unpack(payload)
                self.log.append(("read", index, offset, count))
                return payload + self.bars[index][offset : offset + count], ()
            case Command.REGION_WRITE:
                offset, index, count = spec.REGION_ACCESS.unpack_from(payload)
                data = payload[spec.REGION_ACCESS.size :]
                self.log.append(("write", index, offset, data))
                self.bars[index][offset : offset + count] = data
                if index == CONFIG:  # nobody can write what a device is
                    self.bars[CONFIG][: pci.COMMAND] = self.shape.config[: pci.COMMAND]
                return payload[: spec.REGION_ACCESS.size], ()
            case Command.DEVICE_RESET:
                self.log.append(("reset",))
                return b"", ()
            case _:
                raise PeerError(errno.EINVAL, f"command {message.command}")

    def _set_irqs(self, message: Message) -> bytes:
        _, flags, index, start, count = vfio.IRQ_SET.unpack_from(message.payload)
        self.log.append(("irqs", flags, index, start, count, len(message.fds)))
        if flags & vfio.IRQ_SET_ACTION_TRIGGER:
            for vector in range(start, start + count):
                if (index, vector) in self.eventfds:
                    os.close(self.eventfds.pop((index, vector)))
                if message.fds:
                    self.eventfds[index, vector] = message.fds.pop(0)
            if not count:
                for key in [key for key in self.eventfds if key[0] == index]:
                    os.close(self.eventfds.pop(key))
        return b""


class Stage:
    """Where devices come and go; ``absent`` is why there is none now."""

    def __init__(self, loop: Loop, shape: Shape | None = None) -> None:
        self.loop = loop
        self.shape = shape or Shape()
        self.absent: PeerError | None = None
        self.devices: list[Scripted] = []
        self.prepare: Callable[[Scripted], None] = lambda _: None

    @property
    def device(self) -> Scripted:
        return self.devices[-1]

    def dial(self) -> socket.socket:
        if self.absent is not None:
            raise self.absent
        ours, theirs = socket.socketpair()
        self.devices.append(Scripted(self.loop, theirs, self.shape))
        self.prepare(self.device)
        return ours

    def close(self) -> None:
        for device in self.devices:
            device.die()
