"""10,000 random replies, most of them nearly right: the client takes, refuses, ends, and lives."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from tests.fuzz.footprint import memory_use, open_fds
from viommu.errors import PeerError, ViommuError
from viommu.loop import Loop
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import ClientLimits, LoopClient, RegionInfo, requests
from viommu.vfio_user.connection import close_fds, receive, send
from viommu.vfio_user.protocol import Message, MessageReader
from viommu.vfio_user.region_info import encode_region_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from viommu.deferred import Deferred
    from viommu.vfio_user.requests import Request

REPLIES: Final = 10_000
PAGE: Final = 4096
MEMORY: Final = 16 * PAGE
NUMBERS: Final = (
    *range(10),
    *(15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 80, 255, 256, 4095, 4096, 4097),
    *(MEMORY - 1, MEMORY, 1 << 20, (1 << 20) + 1, (1 << 20) + 32, (1 << 20) + 33),
    *(1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1),
)
VERSION: Final = spec.VERSION.pack(0, 1) + b'{"capabilities":{"max_msg_fds":8%s}}\0'
TWIN: Final = b',"write_multiple":true,"twin_socket":{"supported":true,"fd_index":0}'
ENDS: Final = {errno.EPROTO, errno.ECONNRESET, errno.ETIMEDOUT}


class Answer(NamedTuple):
    """A reply that may be right."""

    payload: bytes
    fds: Sequence[int] = ()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fuzzer:
    """A device that means no good, but knows the protocol; and whoever uses it."""

    def __init__(self, memory: GuestMemory, seed: int) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.memory = memory
        self.random = random.Random(seed)
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC), os.memfd_create("bar", os.MFD_CLOEXEC)]
        self.files = [os.open("/dev/null", os.O_RDWR), *self.fds]
        self.socket: socket.socket | None = None
        self.twin: socket.socket | None = None
        self.connections = self.replies = self.taken = self.refused = self.asked = 0
        self.ends: dict[int, int] = {}
        self.waiting: list[Deferred[Any]] = []

    # --- whoever uses the device

    def use(self) -> None:
        """Submit and post a few requests."""
        for _ in range(self.random.randrange(4)):
            if self._one_in(20):
                self.client.post(requests.region_write(0, 0, bytes(4)))
            else:
                self._await(self._submit())

    def _submit(self) -> Deferred[Any]:
        match self.random.randrange(12):
            case 0:
                return self.client.region_info(1)
            case 1:
                return self.client.region_io_fds(1)
            case _:
                make = self.random.choice(REQUESTS)
                return self.client.submit(make(self.fds[1]), timeout=self.random.choice([1, 5]))

    def _await(self, deferred: Deferred[Any]) -> None:
        self.waiting.append(deferred)
        deferred.then(self._done)

    def _done(self, deferred: Deferred[Any]) -> None:
        try:
            result = deferred.result()
        except ViommuError:
            self.refused += 1
            return
        self.taken += 1
        if isinstance(result, RegionInfo) and result.fd is not None:
            os.close(result.fd)
        if isinstance(result, requests.RegionReply) and result.info.fd is not None:
            os.close(result.info.fd)
        if isinstance(result, requests.IoFdsReply):
            close_fds(list(result.fds))

    # --- the device

    def connect(self) -> None:
        self.connections += 1
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.reader = MessageReader()
        self.client = LoopClient(
            self.loop,
            ours,
            memory=self.memory if self._one_in(2) else None,
            limits=ClientLimits(max_outstanding=20, max_fds=8, max_queued_bytes=1 << 16),
            on_closed=self._ended,
        )
        self._await(self.client.negotiated)

    def _ended(self, why: PeerError) -> None:
        agreed = self.client.negotiated.done and self.client.capabilities.max_msg_fds == 8
        assert why.errno in ENDS or not agreed, "a version may be refused with any errno"
        self.ends[why.errno] = self.ends.get(why.errno, 0) + 1

    def step(self) -> None:
        """Let the client ask, and answer something of it."""
        if self.socket is None:
            self.connect()
        self.use()
        if self._one_in(5):
            self._ask()
        for _ in range(3):
            message = self._next()
            asks = message is not None and message.kind == spec.F_TYPE_COMMAND
            if message is not None and asks and not message.no_reply:
                self._answer(message)
        if self._one_in(300):
            self.clock.now += self.random.choice([0.5, 1, 5])
        self.loop.turn(0)
        if self.client.closed or self._one_in(200):
            self.leave()

    def _next(self) -> Message | None:
        """The client's next message; a device that doesn't always read."""
        while self.socket is not None and not self._one_in(50):
            try:
                data, fds, truncated = receive(
                    self.socket, self.reader.wanted, self.reader.wanted_fds
                )
            except (BlockingIOError, ConnectionResetError):
                return None
            if not data:
                return None
            message = self.reader.feed(data, fds, truncated=truncated)
            if message is not None:
                close_fds(message.fds)
                return message
        return None

    def _answer(self, message: Message) -> None:
        if self._one_in(100):
            return  # never
        self.replies += 1
        payload, fds = self._right(message)
        ident, command, flags, error = message.id, message.command, spec.F_TYPE_REPLY, 0
        size = None
        match self.random.randrange(40):
            case 0 | 1:
                payload = self._spoil(payload)
            case 2:
                size = self.random.choice(NUMBERS) & 0xFFFFFFFF
            case 3:
                flags = self.random.randrange(1 << 6)
            case 4:
                ident = self.random.choice([ident + 1, self.random.randrange(1 << 16)]) & 0xFFFF
            case 5:
                command = self.random.randrange(20)
            case 6 | 7:
                fds = [self.random.choice(self.files) for _ in range(self.random.choice(COUNTS))]
            case 8 | 9 | 10 | 11 | 12 | 13:
                flags, error = spec.F_TYPE_REPLY | spec.F_ERROR, self.random.choice(ERRORS)
                payload = payload if self._one_in(4) else b""
                fds = ()
            case 14:
                self._write(self.socket, self.random.randbytes(self.random.randrange(64)))
                return
            case _:
                pass
        total = spec.HEADER_SIZE + len(payload) if size is None else size
        data = spec.HEADER.pack(ident, command, total, flags, error) + payload
        self._write(self.socket, data, fds)

    def _right(self, message: Message) -> Answer:
        """What a device that means well would say."""
        head = message.payload
        match message.command:
            case Command.VERSION:
                return self._version(twin=b"twin_socket" in head)
            case Command.DEVICE_GET_INFO:
                return Answer(spec.DEVICE_INFO.pack(16, 3, 9, 5))
            case Command.DEVICE_GET_REGION_INFO:
                areas = ((0, PAGE), (2 * PAGE, PAGE))
                info = RegionInfo(4 * PAGE, 7, self.fds[1], 0, areas)
                argsz = vfio.REGION_INFO.unpack(head)[0]
                payload, whole = encode_region_info(info, 1, argsz)
                return Answer(payload, [self.fds[1]] if whole else ())
            case Command.DEVICE_GET_REGION_IO_FDS:
                layout = self.random.choice([spec.SUB_REGION, spec.SHADOW_SUB_REGION])
                values = (0, 4, 0, 0, 0, 0) + (0,) * (layout is spec.SHADOW_SUB_REGION)
                payload = spec.REGION_IO_FDS.pack(16 + layout.size, 0, 1, 1)
                if spec.REGION_IO_FDS.unpack(head)[0] < 16 + layout.size:
                    return Answer(payload)
                return Answer(payload + layout.pack(*values, 1), [self.fds[0]])
            case Command.DEVICE_GET_IRQ_INFO:
                return Answer(vfio.IRQ_INFO.pack(16, 1, 2, 8))
            case Command.REGION_READ:
                return Answer(head + bytes(spec.REGION_ACCESS.unpack(head)[2]))
            case Command.REGION_WRITE:
                return Answer(head[: spec.REGION_ACCESS.size])
            case Command.REGION_WRITE_MULTI:
                return Answer(head[: spec.MULTI_WRITES.size])
            case Command.MIG_DATA_READ:
                return Answer(spec.MIG_DATA.pack(11, 3) + b"abc")
            case Command.DMA_UNMAP | Command.DEVICE_FEATURE:
                return Answer(head)
            case _:
                return Answer(b"")

    def _version(self, *, twin: bool) -> Answer:
        if not twin or self._one_in(2):
            return Answer(VERSION % b"")
        theirs, self.twin = socket.socketpair()
        self.twin.setblocking(False)
        self.given = theirs  # until it has been sent
        return Answer(VERSION % TWIN, [theirs.fileno()])

    def _ask(self) -> None:
        """Ask for memory, in either place, more or less as one does."""
        self.asked += 1
        command = self.random.choice([11, 11, 12, 12, 12, 1, 13])
        address, count = self.random.choice(NUMBERS), self.random.choice([0, 4, 64, PAGE, 1 << 20])
        if self._one_in(8):
            count = self.random.choice(NUMBERS)
        data = self.random.choice([b"", b"1234", bytes(64), bytes(PAGE)])
        if self._one_in(2):
            count = len(data)
        payload = spec.DMA_ACCESS.pack(address, count) + (data if command == 12 else b"")
        if self._one_in(10):
            payload = self._spoil(payload)
        flags = self.random.choice([0, 0, 0, spec.F_NO_REPLY, spec.F_ERROR])
        fds = [self.random.choice(self.files)] if self._one_in(10) else []
        size = spec.HEADER_SIZE + len(payload)
        data = spec.HEADER.pack(self.random.randrange(1 << 16), command, size, flags, 0) + payload
        self._write(self.random.choice([self.socket, self.twin]), data, fds)

    def _spoil(self, payload: bytes) -> bytes:
        data = bytearray(payload)
        match self.random.randrange(4):
            case 0:
                del data[self.random.randrange(len(data) + 1) :]
            case 1:
                data += self.random.randbytes(self.random.randrange(64))
            case 2 if data:
                data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            case _:
                at = self.random.randrange(len(data) + 1) & ~3
                data[at : at + 8] = self.random.choice(NUMBERS).to_bytes(8, "little")
        return bytes(data)

    def _write(self, sock: socket.socket | None, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send, in one piece or in two, as far as it goes."""
        cut = self.random.randrange(len(data)) if data and self._one_in(10) else 0
        for part in (data[:cut], data[cut:]):
            if part and sock is not None:
                with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                    send(sock, part, fds)
                fds = ()
                self.loop.turn(0)
        if self.twin is not None and self.given is not None:
            self.given.close()

    def _one_in(self, count: int) -> bool:
        return self.random.randrange(count) == 0

    # --- the end of a connection

    def leave(self) -> None:
        if self.socket is None:
            return
        before = sum(self.ends.values())
        closed = self.client.closed
        close_fds(self.reader.take_fds())
        self.socket.close()
        if self.twin is not None:
            self.twin.close()
        self.socket = self.twin = self.given = None
        self.loop.turn(0)
        self.loop.turn(0)
        assert self.client.closed
        assert sum(self.ends.values()) == before + (not closed)
        assert self.client.outstanding == 0
        assert all(deferred.done for deferred in self.waiting), "nobody waits for ever"
        self.waiting.clear()

    given: socket.socket | None = None

    def close(self) -> None:
        self.leave()
        self.loop.close()
        for fd in self.files:
            os.close(fd)


COUNTS: Final = (0, 1, 1, 2, 3, 16, 40)
ERRORS: Final = (0, 1, 5, 19, 22, 4095, 4096, 2**31, 2**32 - 1)
REQUESTS: Final[list[Callable[[int], Request[Any]]]] = [
    lambda fd: requests.dma_map(0, PAGE, fd=fd),
    lambda _: requests.dma_unmap(0, PAGE),
    lambda _: requests.dma_unmap_all(),
    lambda _: requests.device_info(),
    lambda _: requests.region_info(1, 80),
    lambda _: requests.irq_info(2),
    lambda fd: requests.set_irqs(2, 0x24, 0, 1, fds=[fd]),
    lambda _: requests.region_read(0, 0, 4),
    lambda _: requests.region_read(1, 0, PAGE),
    lambda _: requests.region_write(0, 0, bytes(8)),
    lambda _: requests.region_write_multi([requests.RegionWrite(0, 0, b"1")]),
    lambda _: requests.reset(),
    lambda _: requests.device_feature(1 << 16 | 1, argsz=64),
    lambda _: requests.mig_data_read(64),
    lambda _: requests.mig_data_write(bytes(64)),
]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MEMORY)
    memory = GuestMemory()
    file = MappedFiles().get(fd, 0, MEMORY, writable=True)
    memory.map(0, MEMORY, readable=True, writable=True, file=file)
    yield memory
    memory.close()
    os.close(fd)


@pytest.fixture
def fuzzer(memory: GuestMemory) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(memory, seed=1)
    yield fuzzer
    fuzzer.close()


def test_random_replies_leave_the_client_as_it_was(
    fuzzer: Fuzzer, caplog: pytest.LogCaptureFixture
) -> None:
    while fuzzer.replies < REPLIES // 5:  # allocators settle
        fuzzer.step()
    fuzzer.leave()
    gc.collect()
    fds_before, memory_before = open_fds(), memory_use()
    while fuzzer.replies < REPLIES:
        fuzzer.step()
    fuzzer.leave()
    gc.collect()
    assert open_fds() == fds_before
    for now, before in zip(memory_use(), memory_before, strict=True):
        assert now - before < 4 << 20, "memory has grown"
    assert caplog.records == [], "no defect of ours was met"
    # It was a test: much was taken, much was refused, and it ended in every way.
    assert min(fuzzer.taken, fuzzer.refused, fuzzer.asked) > REPLIES // 10
    assert min(fuzzer.ends[number] for number in ENDS) > 10
