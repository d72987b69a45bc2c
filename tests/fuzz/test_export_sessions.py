"""10,000 random packets, most of them nearly right: whoever sends them hurts itself only."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import socket
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.footprint import memory_use, open_fds
from tests.ipc.rig import PAGE, RW, make_memory
from viommu.basic import BasicMemoryMapper
from viommu.ipc import protocol
from viommu.ipc.conversation import ExportLimits
from viommu.ipc.protocol import Kind
from viommu.ipc.server import ExportServer
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory import MappedFiles
from viommu.vfio_user.connection import close_fds, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from viommu.errors import TranslationFault
    from viommu.events import Event

PACKETS: Final = 10_000
PAGES: Final = 16
NUMBERS: Final = (
    *range(10),
    *(0x7F, 0xFF, 0x100, 0x8000, 0xFFFF),
    *(PAGE - 1, PAGE, PAGE + 1, PAGES * PAGE, 1 << 20),
    *(1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1),
)
LIMITS: Final = ExportLimits(exports=64, hello_time=1e9)


class Fuzzer:
    """A client that means no good, but knows the protocol, and a guest that goes on meanwhile."""

    def __init__(self, path: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.loop = Loop()
        self.memory = make_memory(MappedFiles(), 0)
        self.mapper = BasicMemoryMapper()
        self.reports: list[TranslationFault] = []
        self.server = ExportServer(
            self.loop, "fuzz", self.mapper, self.memory, self.report, path=path, limits=LIMITS
        )
        self.path = path
        self.sent = self.connections = self.answers = self.parked = self.faults = 0
        self.socket: socket.socket | None = None
        self.ident = 0
        self.ranges: list[tuple[int, int]] = []
        self.kept: list[int] = []  # fault events that were not closed
        self.waits: list[Event] = []
        self.files = [*os.pipe(), os.memfd_create("gift"), os.open("/dev/null", os.O_RDWR)]
        self.templates: list[Callable[[], bytes]] = [
            self._hello,
            *[self._start] * 2,
            *[self._export] * 8,
            *[self._release] * 6,
            self._memory,
            *[self._report] * 2,
            lambda: self._request(Kind.LEAVE, self.random.randbytes(self._below(300)), 0),
        ]

    def report(self, fault: TranslationFault) -> None:
        """Take a fault report: a true one."""
        mapping = self.mapper.find(fault.iova)
        assert mapping is None or fault.access & ~mapping.prot
        self.faults += 1

    # --- the ways to be wrong

    def step(self) -> None:
        if self.socket is None:
            self.connect()
        self.sent += 1
        data, wrong = self.random.choice(self.templates)(), self.random.random()
        fds: list[int] = []
        if wrong < 0.01:
            data = self._spoil(data)
        elif wrong < 0.03:
            fds = [self.random.choice(self.files) for _ in range(self._below(20))]
        elif wrong < 0.035:
            data = self.random.randbytes(self._below(100))
        self.send(data, fds)
        match self._below(100):
            case 0:
                self.leave()
            case 1 | 2:
                self.guest_unmaps()
            case 3 | 4:
                self.guest_maps()
            case number if number < 90:
                self.look()

    def guest_maps(self) -> None:
        at = self._below(PAGES) * PAGE
        self.mapper.add_map(MappingInfo(at, self._below(PAGES) * PAGE, PAGE, RW))
        if not self._below(4):
            self.memory.map(1 << 32, PAGE, readable=True, writable=True, file=None)
            self.memory.unmap(1 << 32, PAGE)

    def guest_unmaps(self) -> None:
        result = self.mapper.remove_map(self._below(PAGES) * PAGE, PAGE)
        if result.resolution is not None and result.resolution not in self.waits:
            self.parked += 1
            self.waits.append(result.resolution)

    def _spoil(self, data: bytes) -> bytes:
        spoiled = bytearray(data)
        match self._below(4):
            case 0:
                del spoiled[self._below(len(spoiled) + 1) :]
            case 1:
                spoiled += self.random.randbytes(self._below(1000))
            case 2:
                spoiled[self._below(len(spoiled))] ^= 1 << self._below(8)
            case _:
                at = self._below(len(spoiled)) & ~3
                spoiled[at : at + 8] = self.random.choice(NUMBERS).to_bytes(8, "little")
        return bytes(spoiled)

    def _below(self, limit: int) -> int:
        return self.random.randrange(limit)

    def _request(self, kind: Kind, body: bytes, ident: int | None = None) -> bytes:
        if ident is None:
            self.ident = self.ident % 0xFFFF_FFFF + 1
            ident = self.ident
        return protocol.encode_request(kind, ident, body)

    def _hello(self) -> bytes:
        if self.random.random() < 0.9:
            return self._start()  # it was said when it connected
        return self._request(Kind.HELLO, protocol.HELLO.pack(protocol.TAG, 1, 0))

    def _start(self) -> bytes:
        return self._request(Kind.START, b"")

    def _range(self) -> tuple[int, int]:
        at = self._below(PAGES) * PAGE + self._below(2) * self._below(PAGE)
        size = self.random.choice([1, 8, 64, PAGE, 2 * PAGE])
        if self.random.random() < 0.05:
            return self.random.choice(NUMBERS) & (1 << 64) - 1, self.random.choice(NUMBERS)
        return at, size

    def _export(self) -> bytes:
        self.ranges.append(self._range())
        del self.ranges[:-32]
        return self._request(Kind.EXPORT, protocol.RANGE.pack(*self.ranges[-1]))

    def _release(self) -> bytes:
        known = self.ranges and self.random.random() < 0.9
        where = self.random.choice(self.ranges) if known else self._range()
        posted = self.random.random() < 0.05  # if it isn't held, that is the end
        return self._request(Kind.RELEASE, protocol.RANGE.pack(*where), 0 if posted else None)

    def _memory(self) -> bytes:
        first = self.random.choice([0, 0, 0, 1, 1 << 31])
        return self._request(Kind.MEMORY, protocol.FIRST.pack(first))

    def _report(self) -> bytes:
        access = self.random.choice([0, 1, 2, 3, 3])
        return self._request(Kind.REPORT, protocol.REPORT.pack(self._range()[0], access, 0), 0)

    # --- the socket

    def connect(self, *, polite: float = 0.97) -> None:
        self.connections += 1
        self.ranges.clear()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(os.fspath(self.path))
        self.socket.setblocking(False)
        if self.random.random() < polite:
            self.send(self._request(Kind.HELLO, protocol.HELLO.pack(protocol.TAG, 1, 0)))
            self.send(self._start())

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        if self.socket is None:
            return
        try:
            send(self.socket, data, fds or ())
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            self.leave()
        self.turn()

    def turn(self) -> None:
        for _ in range(2):
            self.loop.turn(0)
        for event in [event for event in self.waits if event.is_set()]:
            self.waits.remove(event)
            event.close()

    def look(self) -> None:
        """Read what has come."""
        while self.socket is not None:
            try:
                data, fds, _ = receive(self.socket, protocol.MAX_PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, fds = b"", []
            if not data:
                self.leave()
                return
            reply = protocol.decode_reply(data)
            self.answers += 1
            if reply.kind is Kind.START and fds:
                self._misuse(fds.pop())
            close_fds(fds)

    def _misuse(self, fd: int) -> None:
        """Close the fault event, or keep it and try to fill it; blocking, if it could be."""
        if self._below(2) or len(self.kept) > 8:
            os.close(fd)
            return
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        with pytest.raises(BrokenPipeError):
            os.write(fd, bytes(8))
        self.kept.append(fd)

    def leave(self) -> None:
        """Go; whatever the guest waited for is done then."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
            close_fds(self.kept)
            self.turn()
            self.turn()
            assert self.mapper.exports.total == 0
            assert self.waits == []

    def close(self) -> None:
        self.leave()
        close_fds(self.files)
        self.server.close()
        self.memory.close()
        self.loop.close()


@pytest.fixture
def fuzzer(tmp_path: Path) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(tmp_path / "s", seed=1)
    yield fuzzer
    fuzzer.close()


def test_random_packets_leave_the_server_as_it_was(
    fuzzer: Fuzzer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "viommu.ipc")  # hundreds of disconnections
    while fuzzer.sent < PACKETS // 5:  # allocators settle
        fuzzer.step()
    fuzzer.leave()
    gc.collect()
    fds_before, memory_before = open_fds(), memory_use()
    while fuzzer.sent < PACKETS:
        fuzzer.step()
    fuzzer.leave()
    gc.collect()
    assert open_fds() == fds_before
    for now, before in zip(memory_use(), memory_before, strict=True):
        assert now - before < 4 << 20, "memory has grown"
    fuzzer.mapper._check()
    # It was a test: much was done, much was refused, and connections were lost.
    counters = fuzzer.server.counters
    assert counters.exports > PACKETS // 20
    assert counters.refused > PACKETS // 20
    assert min(counters.releases, fuzzer.connections) > 100
    assert min(fuzzer.parked, fuzzer.faults, counters.reports_dropped) > 20
    fuzzer.connect(polite=1)
    assert fuzzer.server.client is not None
