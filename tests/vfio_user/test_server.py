from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import HELLO, PAGE, Clock, Peer, open_fds
from tests.vfio_user.register_bank import BAR, BIG, DMA_ADDRESS, DMA_START, DOORBELL, RegisterBank
from viommu.errors import UsageError
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import Server, ServerLimits
from viommu.vfio_user.protocol import Capabilities, encode_version
from viommu.vfio_user.sharing import REMEDY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.loop import Loop
    from viommu.memory import MappedFiles
    from viommu.vfio_user.protocol import Message

INFO = spec.DEVICE_INFO.pack(16, 0, 0, 0)
QEMU = encode_version(0, Capabilities(16, 1 << 20, 65535, 4096, True))


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return spec.REGION_ACCESS.pack(offset, region, count) + data


def dma_map(gpa: int, size: int, flags: int = 3) -> bytes:
    return spec.DMA_MAP.pack(32, flags, 0, gpa, size)


def assign(peer: Peer, fd: int) -> None:
    flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
    peer.ok(Command.DEVICE_SET_IRQS, vfio.IRQ_SET.pack(20, flags, 2, 0, 1), [fd])


# --- coming and going


def test_one_client_after_the_other(
    connect: Callable[[], Peer],
    server: Server,
    bank: RegisterBank,
    memfd: Callable[..., int],
    eventfd: Callable[..., int],
) -> None:
    ram, event = memfd(), eventfd()
    before = open_fds()
    for count in range(1, 4):
        peer = connect()
        peer.ok(Command.VERSION, HELLO)
        assert bank.irqs is not None
        peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [ram])
        assign(peer, event)
        peer.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kept"))
        peer.close()
        assert not server.connected
        assert server.clients == bank.departures == count
        assert bank.memory_at_departure == 1, "memory is there until the device is quiet"
        assert bank.memory.regions() == []
        assert bank.bytes[BAR][0x80:0x84] == bytes(4)
        assert open_fds() == before


@pytest.mark.parametrize("point", ["nothing", "header", "body", "fds"])
def test_a_client_may_leave_at_any_point(
    connect: Callable[[], Peer],
    bank: RegisterBank,
    memfd: Callable[..., int],
    point: str,
) -> None:
    before = open_fds()
    fd = memfd()
    message = spec.HEADER.pack(1, Command.DMA_MAP, 48, 0, 0) + dma_map(0, PAGE)
    length = {"nothing": 0, "header": 7, "body": 30, "fds": 16}[point]
    peer = connect()
    peer.ok(Command.VERSION, HELLO)
    if length:
        peer.send_bytes(message[:length], [fd] if point == "fds" else [])
    peer.close()
    assert bank.departures == 1
    assert open_fds() == before + 1  # fd


def test_half_a_message_keeps_nobody_waiting(
    connect: Callable[[], Peer], loop: Loop, server: Server
) -> None:
    peer = connect()
    peer.ok(Command.VERSION, HELLO)
    peer.send_bytes(spec.HEADER.pack(1, Command.REGION_WRITE, 20016, 0, 0)[:9])
    called: list[int] = []
    loop.call_soon(lambda: called.append(1))
    peer.turn()
    assert called
    assert server.connected


def test_a_second_client_is_turned_away_at_once(
    connect: Callable[[], Peer], server: Server
) -> None:
    first, second = connect(), connect()
    assert second.closed()
    assert server.turned_away == 1
    first.ok(Command.VERSION, HELLO)
    assert connect().closed()
    first.ok(Command.DEVICE_RESET)
    first.close()
    connect().ok(Command.VERSION, HELLO)


def test_a_client_that_died_gives_way_at_once(
    server: Server, bank: RegisterBank, loop: Loop
) -> None:
    """The end of the one and the arrival of the next are seen in the same turn."""
    first = Peer(server, loop)
    first.ok(Command.VERSION, HELLO)
    first.socket.send(spec.HEADER.pack(1, Command.REGION_WRITE, 36, spec.F_NO_REPLY, 0))
    first.socket.send(access(0x80, BAR, 4, b"last"))
    first.socket.send(spec.HEADER.pack(1, Command.DEVICE_RESET, 16, 0, 0))
    first.socket.close()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(server.path))
        server._accept()
        assert bank.resets == 1, "what it had said was done"
        assert bank.departures == 1
        assert server.clients == 2
        assert server.turned_away == 0


def test_a_client_that_died_with_replies_unread_gives_way(
    server: Server, bank: RegisterBank, loop: Loop
) -> None:
    first = Peer(server, loop)
    first.ok(Command.VERSION, HELLO)
    first.post(Command.REGION_READ, access(0, BIG, 1 << 20))
    first.socket.shutdown(socket.SHUT_WR)  # only half gone, and it never reads
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(server.path))
        server._accept()
        assert bank.departures == 1
        assert server.clients == 2
    first.socket.close()


def test_a_defect_of_the_device_ends_nothing(
    connect: Callable[[], Peer],
    bank: RegisterBank,
    files: MappedFiles,
    memfd: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = connect()
    peer.ok(Command.VERSION, HELLO)
    peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [memfd()])
    bank.irqs = None  # so that its disconnect() fails
    peer.close()
    assert "internal error" in caplog.text
    assert bank.memory.regions() == []
    assert len(files) == 0
    connect().ok(Command.VERSION, HELLO)


def test_nobody_to_accept_is_no_error(server: Server, connect: Callable[[], Peer]) -> None:
    server._accept()
    server.close()
    server._accept()
    assert server.clients == 0


def test_a_client_has_to_negotiate_in_time(
    connect: Callable[[], Peer], clock: Clock, server: Server
) -> None:
    silent = connect()
    clock.now = 9.9
    silent.turn()
    assert not silent.closed()
    clock.now = 10.1
    silent.turn()
    assert silent.closed()
    quick = connect()
    quick.ok(Command.VERSION, HELLO)
    clock.now = 1000
    quick.turn()
    quick.ok(Command.DEVICE_RESET)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(
    server: Server, loop: Loop, bank: RegisterBank, files: MappedFiles
) -> None:
    with pytest.raises(UsageError, match="another process"):
        Server(loop, bank, server.path, files)
    server.close()
    server.close()
    assert not server.path.exists()
    again = Server(loop, bank, server.path, files)
    again.close()


def test_closing_the_server_disconnects(peer: Peer, server: Server, bank: RegisterBank) -> None:
    server.close()
    assert peer.closed()
    assert bank.departures == 1
    peer.turn()


def test_without_file_descriptors_it_waits(
    connect: Callable[[], Peer], server: Server, loop: Loop, clock: Clock
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        sock.connect(os.fspath(server.path))
        # No number below the limit is free, so accepting fails with EMFILE.
        spare = [os.dup(0)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
        try:
            while True:
                try:
                    spare.append(os.dup(0))
                except OSError:
                    break
            for _ in range(3):
                loop.turn(0)
            assert server.clients == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        loop.turn(0)
        assert server.clients == 0, "it doesn't spin: the next try is a moment away"
        clock.now += 0.2
        for _ in range(2):
            loop.turn(0)
        assert server.clients == 1


# --- flow


def test_posted_writes_are_done_in_order_and_unanswered(peer: Peer, bank: RegisterBank) -> None:
    for value in range(200):
        data = access(0x80, BAR, 4, value.to_bytes(4, "little"))
        header = spec.HEADER.pack(value, Command.REGION_WRITE, 36, spec.F_NO_REPLY, 0)
        peer.socket.send(header + data)
    peer.turn(1)
    assert bank.bytes[BAR][0x80] == 63, "other sockets get their turn"
    peer.turn(4)
    assert peer.receive() is None
    assert bank.bytes[BAR][0x80] == 199


def test_a_client_that_does_not_read_is_not_read_from(
    peer: Peer, server: Server, bank: RegisterBank
) -> None:
    count = 0
    peer.turn()
    message = spec.HEADER.pack(0, Command.REGION_READ, 32, 0, 0) + access(0, BIG, 1 << 20)
    try:
        while True:
            peer.socket.send(message)
            count += 1
            peer.turn()
    except BlockingIOError:
        pass
    assert count > 10
    handled = server.counters.messages
    peer.turn(10)
    assert server.counters.messages == handled, "it waits"
    assert handled - 1 <= 2
    received = 0
    while received < count:
        if (reply := peer.receive()) is not None:
            assert len(reply.payload) == 16 + (1 << 20)
            received += 1
        peer.turn()
    peer.ok(Command.DEVICE_RESET)


def test_a_client_that_never_reads_may_leave(peer: Peer, server: Server) -> None:
    peer.post(Command.REGION_READ, access(0, BIG, 1 << 20))
    assert server.connected
    peer.close()
    assert not server.connected


def test_a_replaced_eventfd_is_the_one_that_rings(peer: Peer, eventfd: Callable[..., int]) -> None:
    old, new = eventfd(), eventfd()
    assign(peer, old)
    assign(peer, new)
    peer.ok(Command.REGION_WRITE, access(DOORBELL, BAR, 4, bytes(4)))
    assert os.eventfd_read(new) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(old)


class Stall:
    """Keeps the loop from its work for a while, during which a client asks for something."""

    def __init__(self, peer: Peer, clock: Clock) -> None:
        self.peer = peer
        self.clock = clock

    def ask(self, seconds: float, command: int, payload: bytes = b"") -> Message:
        answers: list[Message] = []
        header = spec.HEADER.pack(7, command, spec.HEADER_SIZE + len(payload), 0, 0)

        def busy() -> None:
            self.peer.socket.send(header + payload)
            self.clock.now += seconds

        self.peer.loop.call_soon(busy)
        self.peer.turn()
        while (message := self.peer.receive()) is not None:
            answers.append(message)
        (answer,) = answers
        assert answer.id == 7
        return answer


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.REGION_READ, access(0, BAR, 4)),
        (Command.REGION_WRITE, access(0, BAR, 4, b"data")),
        (Command.DEVICE_GET_INFO, INFO),
        (Command.DMA_UNMAP, spec.DMA_UNMAP.pack(24, spec.DMA_UNMAP_F_ALL, 0, 0)),
    ],
)
def test_a_reply_that_qemu_no_longer_waits_for_is_only_a_header(
    connect: Callable[[], Peer], clock: Clock, server: Server, command: int, payload: bytes
) -> None:
    """QEMU forgets a request after 5 s, and then takes the payload of the reply for a header."""
    peer = connect()
    peer.ok(Command.VERSION, QEMU)
    stall = Stall(peer, clock)

    answer = stall.ask(6, command, payload)
    assert (answer.flags, answer.error) == (spec.F_TYPE_REPLY | spec.F_ERROR, errno.ETIMEDOUT)
    assert answer.payload == b""
    assert server.counters.withheld == 1

    answer = stall.ask(4, command, payload)
    assert answer.flags == spec.F_TYPE_REPLY
    assert answer.payload != b""
    assert server.connected


def test_a_late_reply_without_payload_is_sent(connect: Callable[[], Peer], clock: Clock) -> None:
    peer = connect()
    peer.ok(Command.VERSION, QEMU)

    assert Stall(peer, clock).ask(6, Command.DEVICE_RESET).flags == spec.F_TYPE_REPLY


def test_a_client_that_waits_for_ever_gets_its_reply(peer: Peer, clock: Clock) -> None:
    answer = Stall(peer, clock).ask(60, Command.REGION_READ, access(0, BAR, 4))

    assert answer.payload == access(0, BAR, 4, bytes(4))


def test_a_device_that_takes_too_long_itself_is_late(
    connect: Callable[[], Peer], clock: Clock, bank: RegisterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(index: int, offset: int, data: bytes) -> None:
        clock.now += 5

    peer = connect()
    peer.ok(Command.VERSION, QEMU)
    monkeypatch.setattr(bank, "region_write", slow)

    assert peer.refused(Command.REGION_WRITE, access(0, BAR, 4, b"data")) == errno.ETIMEDOUT
    peer.ok(Command.REGION_READ, access(0, BAR, 4))


def test_limits_are_configuration(
    loop: Loop, bank: RegisterBank, files: MappedFiles, tmp_path: Path, memfd: Callable[..., int]
) -> None:
    limits = ServerLimits(max_message=4096, max_data_transfer=1024, max_dma_size=PAGE)
    server = Server(loop, bank, tmp_path / "small", files, limits)
    peer = Peer(server, loop)
    assert b'"max_data_xfer_size":1024}' in peer.ok(Command.VERSION, HELLO)
    assert peer.refused(Command.REGION_READ, access(0, BIG, 1025)) == errno.EINVAL
    peer.ok(Command.REGION_READ, access(0, BIG, 1024))
    assert peer.refused(Command.DMA_MAP, dma_map(0, 2 * PAGE), [memfd()]) == errno.ENOSPC
    assert peer.refused(Command.REGION_WRITE, size=4097) == errno.EINVAL
    assert peer.closed()
    peer.close()
    server.close()


# --- memory that is not shared


def test_memory_without_a_file_is_refused(
    peer: Peer, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    server.on_memory_refused = told.append
    peer.ok(Command.DEVICE_GET_INFO, INFO)  # none is mapped yet
    peer.ok(Command.DMA_MAP, dma_map(0, 1 << 28))
    for _ in range(2):
        assert peer.refused(Command.DEVICE_GET_INFO, INFO) == errno.EINVAL
    assert len(told) == 1
    assert REMEDY in told[0]
    assert server.memory_refused == told[0]
    assert caplog.text.count(REMEDY) == 1
    peer.ok(Command.DMA_UNMAP, spec.DMA_UNMAP.pack(24, 0, 0, 1 << 28))  # as QEMU does, and leaves


def test_without_a_callback_it_is_logged(
    peer: Peer, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    peer.ok(Command.DMA_MAP, dma_map(0, 1 << 28))
    peer.refused(Command.DEVICE_GET_INFO, INFO)
    assert REMEDY in caplog.text


def test_the_next_client_starts_afresh(
    connect: Callable[[], Peer], server: Server, memfd: Callable[..., int]
) -> None:
    peer = connect()
    peer.ok(Command.VERSION, HELLO)
    peer.ok(Command.DMA_MAP, dma_map(0, 1 << 28))
    peer.refused(Command.DEVICE_GET_INFO, INFO)
    peer.close()
    peer = connect()
    assert server.memory_refused is None
    peer.ok(Command.VERSION, HELLO)
    peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [memfd()])
    peer.ok(Command.DMA_MAP, dma_map(0xFD000000, PAGE))  # another device's BAR
    peer.ok(Command.DMA_MAP, dma_map(0xFFFC0000, PAGE, flags=1))  # firmware
    peer.ok(Command.DEVICE_GET_INFO, INFO)


VMM = """\
import mmap, os, socket, struct, sys
fd = os.memfd_create("ram")
os.ftruncate(fd, 4096)
ram = mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
def request(command, payload, fds=()):
    header = struct.pack("<HHIII", 1, command, 16 + len(payload), 0, 0)
    socket.send_fds(sock, [header + payload], fds)
    return sock.recv(4096)
request(1, struct.pack("<HH", 0, 0))
request(2, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096), [fd])
reply = request(4, struct.pack("<IIII", 16, 0, 0, 0))
print(struct.unpack_from("<II", reply, 8))
"""


def test_a_private_copy_is_refused_before_the_guest_runs(
    server: Server, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", VMM, os.fspath(server.path)], stdout=subprocess.PIPE
    ) as process:
        while server.clients == 0 or server.connected or server._client is not None:
            loop.turn(10)
        assert process.stdout is not None
        assert process.stdout.read() == b"(33, 22)\n"
    assert "share=off" in caplog.text
    assert REMEDY in caplog.text


class TestComparison:
    """share=off where the VMM's own maps can't be read: pages are compared."""

    @pytest.fixture
    def vmm(self, connect: Callable[[], Peer], memfd: Callable[..., int]) -> Peer:
        peer = connect()
        peer.ok(Command.VERSION, QEMU)
        peer.ok(Command.DMA_MAP, dma_map(0, 16 * PAGE), [memfd()])
        peer.ok(Command.DEVICE_GET_INFO, INFO)
        return peer

    def answer(self, peer: Peer, contents: bytes = b"", *, error: int = 0) -> int:
        """Answer one DMA_READ; return its address."""
        message = peer.receive()
        assert message is not None
        assert (message.command, message.flags) == (Command.DMA_READ, 0)
        gpa, count = spec.DMA_ACCESS.unpack(message.payload)
        assert count == PAGE
        payload = b"" if error else message.payload + contents.ljust(count, b"\0")
        flags = spec.F_TYPE_REPLY | (spec.F_ERROR if error else 0)
        header = spec.HEADER.pack(message.id, Command.DMA_READ, 16 + len(payload), flags, error)
        peer.send_bytes(header + payload)
        return int(gpa)

    def test_the_command_comes_after_the_reply(self, vmm: Peer) -> None:
        vmm.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"))
        # While it is out, commands are served as ever.
        message = vmm.receive()
        assert message is not None
        assert message.command == Command.DMA_READ
        vmm.ok(Command.REGION_READ, access(0x80, BAR, 4))
        vmm.post(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"), flags=spec.F_NO_REPLY)
        assert vmm.receive() is None

    def test_a_private_copy_ends_the_connection(
        self, vmm: Peer, server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        told: list[str] = []
        server.on_memory_refused = told.append
        vmm.post(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"), flags=spec.F_NO_REPLY)
        assert self.answer(vmm, b"interrupt vectors") == 0
        assert self.answer(vmm, b"interrupt vectors") == 0
        assert vmm.closed()
        assert not server.connected
        assert len(told) == 1
        assert REMEDY in told[0]

    def test_shared_memory_passes(self, vmm: Peer, bank: RegisterBank, server: Server) -> None:
        bank.memory.write(0, b"interrupt vectors")
        vmm.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"))
        assert vmm.receive() is None, "nothing is suspicious"
        server.suspect_memory(0)
        vmm.turn()
        assert self.answer(vmm, b"interrupt vectors") == 0
        server.suspect_memory(PAGE)
        vmm.turn()
        assert vmm.receive() is None

    def test_a_device_can_be_suspicious(
        self, vmm: Peer, bank: RegisterBank, server: Server
    ) -> None:
        address = (5 * PAGE).to_bytes(8, "little")
        vmm.ok(Command.REGION_WRITE, access(DMA_ADDRESS, BAR, 8, address))
        vmm.receive()
        vmm.close()
        server.suspect_memory(0)  # nobody is there: no harm

    @pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENODEV])
    def test_a_client_that_refuses_is_served_on(
        self, vmm: Peer, server: Server, error: int
    ) -> None:
        vmm.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"))
        self.answer(vmm, error=error)
        server.suspect_memory(0)
        vmm.turn()
        assert vmm.receive() is None
        vmm.ok(Command.DEVICE_RESET)

    @pytest.mark.parametrize(("ident", "command"), [(77, Command.DMA_READ), (0, Command.DMA_WRITE)])
    def test_another_reply_is_refused(self, vmm: Peer, ident: int, command: int) -> None:
        vmm.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"))
        assert vmm.receive() is not None
        vmm.send_bytes(spec.HEADER.pack(ident, command, 16, spec.F_TYPE_REPLY, 0))
        reply = vmm.receive()
        assert reply is not None
        assert (reply.flags, reply.error) == (0x21, errno.EINVAL)
        vmm.ok(Command.DEVICE_RESET)

    @pytest.mark.parametrize("payload", [b"", bytes(15), bytes(PAGE + 15), b"\1" * (PAGE + 16)])
    def test_an_answer_of_another_shape_proves_nothing(self, vmm: Peer, payload: bytes) -> None:
        vmm.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"))
        message = vmm.receive()
        assert message is not None
        header = spec.HEADER.pack(message.id, 11, 16 + len(payload), spec.F_TYPE_REPLY, 0)
        vmm.send_bytes(header + payload)
        assert vmm.receive() is None
        vmm.ok(Command.DEVICE_RESET)

    def test_a_client_that_serves_no_dma_is_not_asked(
        self, connect: Callable[[], Peer], server: Server, memfd: Callable[..., int]
    ) -> None:
        peer = connect()
        peer.ok(Command.VERSION, HELLO)
        peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [memfd()])
        peer.ok(Command.REGION_WRITE, access(0x80, BAR, 4, b"kick"))
        server.suspect_memory(0)
        peer.turn()
        assert peer.receive() is None


def test_dma_of_the_device_reaches_the_client(peer: Peer, memfd: Callable[..., int]) -> None:
    fd = memfd()
    peer.ok(Command.DMA_MAP, dma_map(1 << 40, PAGE), [fd])
    address = ((1 << 40) + 100).to_bytes(8, "little")
    peer.ok(Command.REGION_WRITE, access(DMA_ADDRESS, BAR, 8, address))
    peer.post(Command.REGION_WRITE, access(DMA_START, BAR, 4, b"data"), flags=spec.F_NO_REPLY)
    assert os.pread(fd, 4, 100) == b"data"
