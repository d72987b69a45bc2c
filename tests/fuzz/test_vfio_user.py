"""10,000 random messages, most of them nearly right: the server answers, forgets, and lives."""

from __future__ import annotations

import gc
import os
import random
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import pytest

from tests.fuzz.footprint import memory_use, open_fds
from tests.vfio_user.register_bank import RegisterBank
from viommu.deferred import Deferred
from viommu.errors import PeerError
from viommu.loop import Loop
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import Server
from viommu.vfio_user.connection import receive, send
from viommu.vfio_user.protocol import Capabilities, Message, MessageReader, encode_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")

MESSAGES: Final = 10_000
PAGE: Final = 4096
QEMU: Final = encode_version(0, Capabilities(16, 1 << 20, 65535, PAGE, write_multiple=True))
NUMBERS: Final = (
    *range(10),
    *(16, 20, 24, 31, 32, 33, 40, 80, 255, 256),
    *(PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 16 * PAGE, 1 << 20, (1 << 20) + 1),
    *(1 << 31, (1 << 32) - 1, 1 << 32, 8 << 40, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1),
)


class SteadyBank(RegisterBank):
    """A bank without the registers that misbehave: what goes wrong is the server's fault."""

    def _misbehave(self, index: int, offset: int) -> None:
        pass

    def settle(self) -> bool:
        """Finish something that was left to be done later; return whether there was anything."""
        return False


class SlowBank(SteadyBank):
    """A steady bank that leaves some of what it is asked for until :meth:`settle`."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = SlowMemory(self.later)
        self.random = random.Random(2)
        self.left: list[tuple[Deferred[Any], Any]] = []
        self.settled = 0

    def later(self, value: T) -> T | Deferred[T]:
        if self.random.random() < 0.7:
            return value
        deferred: Deferred[T] = Deferred()
        self.left.append((deferred, value))
        return deferred

    def region_read(self, index: int, offset: int, count: int) -> bytes | Deferred[bytes]:
        data = super().region_read(index, offset, count)
        assert isinstance(data, bytes)
        return self.later(data)

    def region_write(self, index: int, offset: int, data: bytes) -> Deferred[None] | None:
        super().region_write(index, offset, data)
        return self.later(None)

    def reset(self) -> Deferred[None] | None:
        super().reset()
        return self.later(None)

    def settle(self) -> bool:
        """Finish something, well or not, whoever may have gone since."""
        if not self.left:
            return False
        self.settled += 1
        deferred, value = self.left.pop(self.random.randrange(len(self.left)))
        if self.random.random() < 0.8:
            deferred.resolve(value)
        else:
            deferred.refuse(PeerError(5, "it went wrong"))
        return True


class SlowMemory(GuestMemory):
    """Guest memory that somebody may hold when it is unmapped."""

    def __init__(self, later: Callable[[None], Deferred[None] | None]) -> None:
        super().__init__()
        self._later = later

    def unmap(self, gpa: int, size: int) -> Deferred[None] | None:
        super().unmap(gpa, size)
        return self._later(None)

    def unmap_all(self) -> Deferred[None] | None:
        super().unmap_all()
        return self._later(None)


class Shot(NamedTuple):
    """A message that may be right."""

    command: int
    payload: bytes
    fds: Sequence[int] = ()


class Fuzzer:
    """A client that means no good, but knows the protocol."""

    hello = QEMU

    def __init__(self, server: Server, loop: Loop, bank: SteadyBank, seed: int) -> None:
        self.server = server
        self.bank = bank
        self.loop = loop
        self.random = random.Random(seed)
        self.sent = self.connections = self.replies = 0
        self.fds = self._fds()
        self.socket: socket.socket | None = None
        self.templates: list[Callable[[], Shot]] = [
            self._version,
            *[self._dma_map] * 3,
            *[self._dma_unmap] * 3,
            *[self._set_irqs] * 3,
            *[self._access] * 4,
            lambda: Shot(Command.DEVICE_GET_INFO, spec.DEVICE_INFO.pack(16, 0, 0, 0)),
            self._region_info,
            lambda: Shot(
                Command.DEVICE_GET_REGION_IO_FDS,
                spec.REGION_IO_FDS.pack(16, 0, self._below(10), 0),
            ),
            lambda: Shot(Command.DEVICE_GET_IRQ_INFO, vfio.IRQ_INFO.pack(16, 0, self._below(6), 0)),
            lambda: Shot(Command.DEVICE_RESET, b""),
            lambda: Shot(self.random.choice([0, 11, 12, 14, 15, 16, 17, 18, 26, 99]), bytes(32)),
        ]

    # --- the ways to be wrong

    def step(self) -> None:
        """Send something and look at what comes back."""
        if self.random.random() < 0.3:
            self.bank.settle()
        if self.socket is None:
            self.connect()
        self.sent += 1
        command, payload, fds = self.random.choice(self.templates)()
        flags, size, wrong = 0, None, self.random.random()
        if wrong < 0.15:
            payload = self._spoil(payload)
        elif wrong < 0.17:
            size = self.random.choice(NUMBERS) & 0xFFFFFFFF
        elif wrong < 0.20:
            flags = self.random.randrange(1 << 6)
        elif wrong < 0.30:
            fds = self._some_fds()
        elif wrong < 0.31:
            self.send(self.random.randbytes(self._below(100)))
            self.lost = True
            self.leave()
            return
        if self.random.random() < 0.2:
            flags |= spec.F_NO_REPLY
        ident = self._below(1 << 16)
        total = spec.HEADER_SIZE + len(payload) if size is None else size
        data = spec.HEADER.pack(ident, command, total, flags, 0) + payload
        self.lost = size is not None
        posted = flags & spec.F_NO_REPLY and not flags & spec.F_TYPE_MASK
        if not self.lost and not posted:
            self.expected.append(ident)
        self.send(data, fds)
        if self.lost or self.random.random() < 0.01:
            self.leave()
        elif self.random.random() < 0.9:  # or else read later
            self.look()

    def _spoil(self, payload: bytes) -> bytes:
        data = bytearray(payload)
        match self.random.randrange(4):
            case 0:
                del data[self._below(len(data) + 1) :]
            case 1:
                data += self.random.randbytes(self._below(64))
            case 2 if data:
                data[self._below(len(data))] ^= 1 << self._below(8)
            case _:
                at = self._below(len(data) + 1) & ~3
                value = self.random.choice(NUMBERS)
                data[at : at + 8] = value.to_bytes(8, "little")
        return bytes(data)

    def _some_fds(self) -> list[int]:
        count = self.random.choice([0, 0, 0, 1, 1, 1, 2, 3, 16, 40])
        kinds = self.random.choice([self.fds, self.fds[:2], self.fds[2:4]])
        return [self.random.choice(kinds) for _ in range(count)]

    def _below(self, limit: int) -> int:
        return self.random.randrange(limit)

    def _version(self) -> Shot:
        hello = self.hello
        return Shot(Command.VERSION, self.random.choice([hello, hello[:4], hello[:-1], b""]))

    def _dma_map(self) -> Shot:
        gpa, size = self._range()
        flags = self.random.choice([3, 3, 3, 3, 1, 2, 0, 7, 11, 16])
        fds = [self.random.choice(self.fds[:2])] if self.random.random() < 0.9 else []
        offset = self._below(16) * PAGE
        return Shot(Command.DMA_MAP, spec.DMA_MAP.pack(32, flags, offset, gpa, size), fds)

    def _dma_unmap(self) -> Shot:
        if self.random.random() < 0.1:
            request = spec.DMA_UNMAP.pack(24, spec.DMA_UNMAP_F_ALL, 0, 0)
        else:
            request = spec.DMA_UNMAP.pack(24, 0, *self._range())
        return Shot(Command.DMA_UNMAP, request)

    def _range(self) -> tuple[int, int]:
        size = self.random.choice([1, 1, 1, 1, 2, 4, 16, 0]) * PAGE
        return self._below(8) * PAGE, size

    def _set_irqs(self) -> Shot:
        flags = self.random.choice([1, 2, 4, 4]) | self.random.choice([8, 16, 32, 32, 32])
        start = self.random.choice([0, 0, 0, 1, 2047, 2048])
        count = self.random.choice([0, 1, 1, 1, 2, 3, 16])
        data = self.random.randbytes(count) if flags & vfio.IRQ_SET_DATA_BOOL else b""
        fds = [self.random.choice(self.fds[2:4]) for _ in range(count)]
        if not flags & vfio.IRQ_SET_DATA_EVENTFD or self.random.random() < 0.1:
            fds = []
        index = self.random.choice([2, 2, 2, 0, 1, 3, 4, 5])
        head = vfio.IRQ_SET.pack(20 + len(data), flags, index, start, count)
        return Shot(Command.DEVICE_SET_IRQS, head + data, fds)

    def _region_info(self) -> Shot:
        argsz = self.random.choice([32, 80, 8])
        request = vfio.REGION_INFO.pack(argsz, 0, self._below(10), 0, 0, 0)
        return Shot(Command.DEVICE_GET_REGION_INFO, request)

    def _access(self) -> Shot:
        region = self.random.choice([0, 0, 0, 1, 2, 7, 8, 9])
        offset = self.random.choice([0, 0x10, 0x18, 0x20, 0x80, 0xFFE, 0x1000, 0x7FFF, 1 << 63])
        if self.random.random() < 0.5:
            count = self.random.choice([0, 1, 2, 4, 8, 64, 4096, 70_000])
            return Shot(Command.REGION_READ, spec.REGION_ACCESS.pack(offset, region, count))
        data = self.random.choice([bytes(4), bytes(8), self.random.randbytes(self._below(20))])
        head = spec.REGION_ACCESS.pack(offset, region, len(data))
        return Shot(Command.REGION_WRITE, head + data)

    # --- the socket

    def connect(self, *, polite: float = 0.95) -> None:
        self.connections += 1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(os.fspath(self.server.path))
        self.socket.setblocking(False)
        self.reader = MessageReader()
        self.expected: deque[int] = deque()
        self.lost = False
        if self.random.random() < polite:
            self.expected.append(1)
            self.send(spec.HEADER.pack(1, 1, 16 + len(self.hello), 0, 0) + self.hello)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send, in one piece or in two."""
        assert self.socket is not None
        cut = self._below(len(data)) if data and self.random.random() < 0.1 else 0
        try:
            for part in (data[:cut], data[cut:]):
                if part:
                    assert send(self.socket, part, fds) == len(part)
                    fds = ()
                    self.turn()
        except (BrokenPipeError, ConnectionResetError):
            self.leave()
        except BlockingIOError:  # it waits until replies are read
            self.lost = True
            self.leave()

    def turn(self) -> None:
        for _ in range(2):
            self.loop.turn(0)

    def look(self) -> None:
        """Read what has come: replies in order, and questions about memory."""
        while self.socket is not None:
            self.turn()
            try:
                data, fds, _ = receive(self.socket, self.reader.wanted)
            except BlockingIOError:
                if self.lost or not self.expected:
                    return
                assert self.bank.settle(), "a command was not answered"
                continue
            except ConnectionResetError:
                data, fds = b"", []
            for fd in fds:
                os.close(fd)
            if not data:
                self.leave()
                return
            message = self.reader.feed(data)
            if message is not None:
                self.judge(message)

    def judge(self, message: Message) -> None:
        """A reply must be to the oldest command that is unanswered; a question may be lied to."""
        if message.kind == spec.F_TYPE_COMMAND:
            assert message.command == Command.DMA_READ
            assert len(message.payload) == spec.DMA_ACCESS.size
            payload = message.payload + self.random.choice([b"", b"\1" * PAGE, bytes(PAGE)])
            flags = self.random.choice([spec.F_TYPE_REPLY, spec.F_TYPE_REPLY | spec.F_ERROR])
            header = spec.HEADER.pack(message.id, 11, 16 + len(payload), flags, 5)
            self.send(header + payload)
            return
        assert message.kind == spec.F_TYPE_REPLY
        self.replies += 1
        if not self.lost:
            assert message.id == self.expected.popleft(), "not the reply that was due"
        if message.flags & spec.F_ERROR:
            assert message.payload == b""
            assert 0 < message.error < 4096

    def leave(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None
            self.turn()

    def _fds(self) -> list[int]:
        ram = []
        for _ in range(2):
            ram.append(os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(ram[-1], 16 * PAGE)
        reader, writer = os.pipe()
        events = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
        os.eventfd_write(events[1], 2**64 - 2)  # full: another write would block
        return [*ram, *events, reader, writer, os.open("/dev/null", os.O_RDWR)]

    def close(self) -> None:
        self.leave()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture(params=[SteadyBank, SlowBank])
def bank(request: pytest.FixtureRequest) -> Iterator[SteadyBank]:
    bank: SteadyBank = request.param()
    yield bank
    bank.close()


@pytest.fixture
def files() -> MappedFiles:
    return MappedFiles()


@pytest.fixture
def fuzzer(bank: SteadyBank, files: MappedFiles, tmp_path: Path) -> Iterator[Fuzzer]:
    loop = Loop()
    server = Server(loop, bank, tmp_path / "s", files)
    fuzzer = Fuzzer(server, loop, bank, seed=1)
    yield fuzzer
    fuzzer.close()
    server.close()
    loop.close()


def test_random_messages_leave_the_server_as_it_was(
    fuzzer: Fuzzer, bank: SteadyBank, files: MappedFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "viommu.vfio_user")  # thousands of refusals
    while fuzzer.sent < MESSAGES // 5:  # allocators settle
        fuzzer.step()
    fuzzer.leave()
    gc.collect()
    fds_before, memory_before = open_fds(), memory_use()
    while fuzzer.sent < MESSAGES:
        fuzzer.step()
    fuzzer.leave()
    while bank.settle():
        pass
    gc.collect()
    assert open_fds() == fds_before
    assert bank.memory.regions() == []
    assert len(files) == 0
    for now, before in zip(memory_use(), memory_before, strict=True):
        assert now - before < 4 << 20, "memory has grown"
    counters = fuzzer.server.counters
    assert counters.internal_errors == 0
    # It was a test: much was understood, much was refused, and connections were lost.
    assert counters.messages > MESSAGES // 2
    assert MESSAGES // 10 < counters.refused < counters.messages
    assert min(counters.dma_maps, counters.dma_unmaps, counters.resets, fuzzer.connections) > 50
    if isinstance(bank, SlowBank):
        assert bank.settled > MESSAGES // 20
    fuzzer.connect(polite=1)
    fuzzer.look()
    assert fuzzer.server.connected
