"""A mapper with guest memory on one side and a device on the other, in one loop."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any

from tests.vfio_user.raw_device import error_to, reply_to
from tests.vfio_user.register_bank import RegisterBank
from viommu.errors import Access, PeerError
from viommu.loop import Loop
from viommu.mapper import AddMapResult, MappingInfo
from viommu.memory import MappedFiles
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import AddressRange, MemoryKind
from viommu.memory.managed import ManagedMemory
from viommu.memory.regions import RegionManager
from viommu.spec import vfio_user as spec
from viommu.spec import vfio_user_iommufd as iommufd
from viommu.spec.vfio_user import Command
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.vfio_user import LoopClient, ServerLimits
from viommu.vfio_user.connection import close_fds, receive, send
from viommu.vfio_user.ioas_table import IoasLimits
from viommu.vfio_user.loop_client import default_offers
from viommu.vfio_user.protocol import Capabilities, MessageReader, encode_version
from viommu.vfio_user.served_client import ServedClient
from viommu_backends.vfio_user.mapper import VfioUserMapper

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.deferred import Deferred
    from viommu.vfio_user.protocol import Message
    from viommu_backends.vfio_user.space import MemoryMode

__all__ = ["PAGE", "RW", "Asked", "Rig", "Scripted", "mapping"]

PAGE = 0x1000
RW = Access.READ | Access.WRITE
R = Access.READ


def mapping(page: int, gpa_page: int, count: int = 1, prot: Access = RW) -> MappingInfo:
    return MappingInfo(page * PAGE, gpa_page * PAGE, count * PAGE, prot)


class Rig:
    """Guest RAM in two regions, pages [0, 16) and [32, 64), the pages [8, 16) read-only.

    Guest page ``n`` is page ``n`` of one memfd.
    """

    def __init__(self, memory: MemoryMode = "shared", **options: Any) -> None:
        self.loop = Loop()
        self.manager = RegionManager()
        self.memory = ManagedMemory(self.manager)
        self.files = MappedFiles()
        self.ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.ram, 64 * PAGE)
        self.mapper = VfioUserMapper(self.loop, memory=memory, **options)
        self.registration = self.manager.register(self.mapper, "device", self.mapper.needs)
        self.add_ram(0, 8)
        self.add_ram(8, 8, writable=False)
        self.add_ram(32, 32)
        self.client: LoopClient | None = None
        self.lost: list[PeerError] = []
        self.closers: list[Callable[[], None]] = []

    def add_ram(self, page: int, count: int, *, writable: bool = True) -> None:
        size = count * PAGE
        file = self.files.get(self.ram, page * PAGE, size, writable=writable)
        try:
            self.memory.map(
                page * PAGE, size, readable=True, writable=writable, file=file, offset=page * PAGE
            )
        except PeerError:
            file.close()
            raise

    def add_bar(self, page: int, count: int, *, shared: bool = True) -> None:
        """Put device memory, in a file of its own or in none, at ``page``."""
        where = AddressRange(page * PAGE, (page + count) * PAGE)
        region = self.manager.add_region(f"BAR at {page}", where, MemoryKind.DEVICE)
        backing: FileBacking | PrivateBacking = PrivateBacking(count * PAGE)
        if shared:
            backing.close()
            fd = os.memfd_create("bar", os.MFD_CLOEXEC)
            os.ftruncate(fd, count * PAGE)
            backing = FileBacking(fd)
            os.close(fd)
        self.manager.add_mapping(region, AddressRange(0, count * PAGE), backing)
        self.manager.enable(region)
        self.closers.append(lambda: self.manager.remove_region(region))

    def link(self, sock: socket.socket, *, message: bool = False) -> LoopClient:
        """Connect a client to a device, as whoever owns the mapper does."""
        offers = self.mapper.offers(default_offers(serves=message))
        self.client = LoopClient(self.loop, sock, offers=offers, on_closed=self._closed)
        return self.client

    def _closed(self, why: PeerError) -> None:
        self.lost.append(why)
        self.mapper.lost(why)

    def serve(self, *, ioas: bool = False) -> RegisterBank:
        """Connect to a device of our own, which keeps what it is told; give it everything."""
        bank = RegisterBank()
        ours, theirs = socket.socketpair()
        limits = ServerLimits(iommufd=IoasLimits() if ioas else None)
        served = ServedClient(self.loop, bank, theirs, self.files, limits)
        self.closers += [served.close, bank.close]
        client = self.link(ours)
        self.until(client.negotiated)
        self.until(self.mapper.connected(client))
        return bank

    def script(self, theirs: Capabilities | None = None, *, give: bool = True) -> Scripted:
        """Connect to a device that answers when the test says so, and ``give`` it everything."""
        ours, sock = socket.socketpair()
        scripted = Scripted(self.loop, sock)
        self.closers.append(scripted.close)
        client = self.link(ours)
        hello = scripted.take()
        scripted.answer(hello, encode_version(1, theirs or Capabilities(8)))
        self.until(client.negotiated)
        if give:
            self.given = self.mapper.connected(client)
        return scripted

    def has_given(self) -> bool:
        """Whether the device that came last has got everything."""
        return self.given.done

    def turn(self, count: int = 3) -> None:
        for _ in range(count):
            self.loop.turn(0)

    def until(self, deferred: Deferred[None]) -> None:
        for _ in range(10000):
            if deferred.done:
                deferred.result()
                return
            self.loop.turn(0)
        raise AssertionError("it is never done")

    def settle(self) -> None:
        """Turn the loop until the mapper has settled."""
        event = self.mapper.unsettled()
        if event is not None:
            with event:
                for _ in range(10000):
                    if event.is_set():
                        break
                    self.loop.turn(0)
                assert event.is_set()
        assert self.mapper.unsettled() is None
        self.mapper._check()

    def add(self, *mappings: MappingInfo) -> None:
        for each in mappings:
            assert self.mapper.add_map(each) is AddMapResult.OK

    def close(self) -> None:
        if self.client is not None:
            self.client.close()
        self.mapper.close()
        for close in self.closers:
            close()
        self.registration.release()
        self.memory.close()
        self.turn()
        os.close(self.ram)
        self.loop.close()


class Asked:
    """A command that the device got, taken apart."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.command = message.command
        self.has_fd = bool(message.fds)
        close_fds(message.fds)

    def __repr__(self) -> str:
        return f"{self.what()}"

    def what(self) -> tuple[Any, ...]:
        """What it asks for, in pages.

        Maps have the first page, how many, which one of the file if there is one, and
        the protection; IOASes come first of all.
        """
        payload = self.message.payload
        if self.command == Command.DMA_MAP:
            _, flags, offset, address, size = spec.DMA_MAP.unpack(payload)
            at = offset // PAGE if self.has_fd else None
            return "map", address // PAGE, size // PAGE, at, Access(flags)
        if self.command == Command.DMA_UNMAP:
            _, _, address, size = spec.DMA_UNMAP.unpack(payload)
            return "unmap", address // PAGE, size // PAGE
        if self.command == IommufdCommand.IOAS_MAP:
            _, flags, ioas, _, _, length, iova, offset = iommufd.IOAS_MAP.unpack(payload)
            assert self.has_fd
            assert flags & iommufd.MAP_F_FIXED_IOVA
            prot = Access.READ if flags & iommufd.MAP_F_READABLE else Access.NONE
            prot |= Access.WRITE if flags & iommufd.MAP_F_WRITEABLE else Access.NONE
            return ioas, "map", iova // PAGE, length // PAGE, offset // PAGE, prot
        if self.command == IommufdCommand.IOAS_UNMAP:
            _, _, ioas, _, iova, length = iommufd.IOAS_UNMAP.unpack(payload)
            return ioas, "unmap", iova // PAGE, length // PAGE
        if self.command in {IommufdCommand.ATTACH_PT, IommufdCommand.DESTROY_IOAS}:
            _, _, ioas, _ = iommufd.DESTROY_IOAS.unpack(payload)
            return ioas, "attach" if self.command == IommufdCommand.ATTACH_PT else "destroy"
        if self.command in set(IommufdCommand):
            return (IommufdCommand(self.command).name,)
        return (Command(self.command).name,)


class Scripted:
    """The device's end of a socket: takes commands, and answers when and what it is told."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop = loop
        self.socket = sock
        self.socket.setblocking(False)
        self.reader = MessageReader()
        self.ioases = 0

    def look(self) -> Message | None:
        for _ in range(3):
            self.loop.turn(0)
        while self.socket.fileno() >= 0:
            try:
                data, fds, _ = receive(self.socket, self.reader.wanted, self.reader.wanted_fds)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            if (message := self.reader.feed(data, fds)) is not None:
                return message
        return None

    def take(self) -> Message:
        for _ in range(100):
            if (message := self.look()) is not None:
                return message
        raise AssertionError("nothing comes")

    def asked(self) -> list[Asked]:
        """Take everything that has come."""
        found = []
        while (message := self.look()) is not None:
            found.append(Asked(message))
        return found

    def answer(self, message: Message | Asked, payload: bytes = b"") -> None:
        asked = message.message if isinstance(message, Asked) else message
        if asked.command in {Command.DMA_UNMAP, IommufdCommand.IOAS_MAP, IommufdCommand.BIND}:
            payload = asked.payload
        elif asked.command == IommufdCommand.ALLOC_IOAS:
            self.ioases += 1
            payload = iommufd.ALLOC_IOAS.pack(16, 0, self.ioases, 0)
        self._send(reply_to(asked, payload))

    def answer_all(self) -> list[tuple[Any, ...]]:
        """Answer everything until nothing more comes; return what it was."""
        found = []
        while asked := self.asked():
            for each in asked:
                self.answer(each)
            found += [each.what() for each in asked]
        return found

    def refuse(self, message: Asked, number: int = errno.EIO) -> None:
        self._send(error_to(message.message, number))

    def _send(self, data: bytes) -> None:
        assert send(self.socket, data, ()) == len(data)
        for _ in range(3):
            self.loop.turn(0)

    def gone(self) -> bool:
        """Whether the other side has closed the connection."""
        try:
            self.asked()
        except (EOFError, ConnectionError):
            return True
        return False

    def close(self) -> None:
        close_fds(self.reader.take_fds())
        self.socket.close()
