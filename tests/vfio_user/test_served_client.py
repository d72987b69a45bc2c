"""Answers that come later, and a client whose socket is connected already."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import HELLO, PAGE, Clock, Peer, open_fds
from tests.vfio_user.register_bank import (
    BAR,
    DMA_ADDRESS,
    DMA_START,
    LATER,
    SHORT,
    RegisterBank,
)
from viommu.deferred import Deferred
from viommu.errors import BackendError, PeerError
from viommu.memory import MessageMemory
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import Server, ServerLimits
from viommu.vfio_user.connection import send
from viommu.vfio_user.ioas_table import IoasLimits
from viommu.vfio_user.protocol import Capabilities, encode_version
from viommu.vfio_user.served_client import ServedClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from viommu.loop import Loop
    from viommu.memory import MappedFiles

QEMU = encode_version(0, Capabilities(16, 1 << 20, 65535, 4096, True))
POSTED = spec.F_NO_REPLY


def access(offset: int, count: int, data: bytes = b"") -> bytes:
    return spec.REGION_ACCESS.pack(offset, BAR, count) + data


READ = access(LATER, 4)
WRITE = access(LATER, 4, b"data")
UNMAP = spec.DMA_UNMAP.pack(24, 0, 0, PAGE)
UNMAP_ALL = spec.DMA_UNMAP.pack(24, spec.DMA_UNMAP_F_ALL, 0, 0)

# What can take its time: the command, and what succeeds with it.
WAITING = {
    "read": (Command.REGION_READ, READ, READ + b"done"),
    "write": (Command.REGION_WRITE, WRITE, READ),
    "reset": (Command.DEVICE_RESET, b"", b""),
    "unmap": (Command.DMA_UNMAP, UNMAP, UNMAP),
    "unmap all": (Command.DMA_UNMAP, UNMAP_ALL, UNMAP_ALL),
}


class Slow:
    """The bank with memory mapped, where everything that can take its time does."""

    def __init__(self, bank: RegisterBank, peer: Peer, ram: int) -> None:
        self.bank = bank
        peer.ok(Command.DMA_MAP, spec.DMA_MAP.pack(32, 3, 0, 0, PAGE), [ram])
        bank.held_memory.held = bank.resets_later = True

    def open(self) -> list[Deferred[bytes] | Deferred[None]]:
        every: list[Deferred[bytes] | Deferred[None]] = [*self.bank.reads]
        every += [*self.bank.writes, *self.bank.held_memory.releases]
        return [deferred for deferred in every if not deferred.done]

    def finish(self) -> None:
        """Do what is asked for, which is one thing."""
        (deferred,) = self.open()
        if deferred in self.bank.reads:
            self.bank.reads[-1].resolve(b"done")
        else:
            [*self.bank.writes, *self.bank.held_memory.releases][-1].resolve(None)

    def fail(self, number: int) -> None:
        (deferred,) = self.open()
        deferred.refuse(PeerError(number, "it can't be done"))


@pytest.fixture
def slow(bank: RegisterBank, peer: Peer, memfd: Callable[..., int]) -> Iterator[Slow]:
    yield Slow(bank, peer, memfd())
    bank.held_memory.held = False


@pytest.fixture(params=WAITING)
def waiting(request: pytest.FixtureRequest) -> tuple[Command, bytes, bytes]:
    return WAITING[request.param]


# --- the answer comes later


def test_the_answer_comes_when_the_result_does(
    peer: Peer, slow: Slow, waiting: tuple[Command, bytes, bytes], server: Server
) -> None:
    command, payload, expected = waiting
    peer.post(command, payload)
    assert peer.receive() is None
    peer.post(Command.REGION_READ, access(0, 4))
    peer.turn(5)
    assert peer.receive() is None, "nothing overtakes"
    handled = server.counters.messages

    slow.finish()
    answer = peer.receive()
    assert answer is not None
    assert (answer.id, answer.command, answer.flags) == (peer.id - 1, command, spec.F_TYPE_REPLY)
    assert answer.payload == expected
    assert server.counters.messages == handled
    peer.turn()
    behind = peer.receive()
    assert behind is not None
    assert behind.id == peer.id
    peer.ok(Command.REGION_READ, access(0, 4))


def test_a_refusal_comes_later_too(
    peer: Peer, slow: Slow, waiting: tuple[Command, bytes, bytes], server: Server
) -> None:
    command, payload, _ = waiting
    peer.post(command, payload)
    slow.fail(errno.ENXIO)
    answer = peer.receive()
    assert answer is not None
    assert (answer.flags, answer.error) == (spec.F_TYPE_REPLY | spec.F_ERROR, errno.ENXIO)
    assert answer.payload == b""
    assert server.counters.refused == 1
    peer.ok(Command.REGION_READ, access(0, 4))


def test_a_result_that_is_there_at_once_is_answered_at_once(
    peer: Peer, bank: RegisterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Deferred[bytes] = Deferred()
    done.resolve(b"here")
    monkeypatch.setattr(bank, "region_read", lambda *_: done)
    assert peer.ok(Command.REGION_READ, access(0, 4)) == access(0, 4) + b"here"
    assert peer.ok(Command.REGION_READ, access(0, 4)) == access(0, 4) + b"here"


def test_a_result_of_another_size_is_a_defect_of_the_device(peer: Peer, bank: RegisterBank) -> None:
    peer.post(Command.REGION_READ, READ)
    bank.reads[0].resolve(b"short")
    answer = peer.receive()
    assert answer is not None
    assert answer.error == errno.EIO
    assert peer.refused(Command.REGION_READ, access(SHORT, 4)) == errno.EIO, "as ever"


def test_an_error_of_the_host_keeps_its_number(peer: Peer, bank: RegisterBank) -> None:
    peer.post(Command.REGION_READ, READ)
    bank.reads[0].refuse(BackendError(errno.ENOMEM, "no room"))
    answer = peer.receive()
    assert answer is not None
    assert answer.error == errno.ENOMEM


def test_everything_else_goes_on(
    peer: Peer, loop: Loop, bank: RegisterBank, connect: Callable[[], Peer], server: Server
) -> None:
    peer.post(Command.REGION_READ, READ)
    called: list[int] = []
    loop.call_soon(lambda: called.append(1))
    loop.turn(0)
    assert called == [1]
    assert connect().closed(), "a second client is told"
    assert server.turned_away == 1
    bank.reads[0].resolve(b"data")
    assert peer.receive() is not None


def test_the_device_is_not_asked_for_more_meanwhile(peer: Peer, bank: RegisterBank) -> None:
    for _ in range(3):
        peer.post(Command.REGION_READ, READ)
    for count in range(1, 4):
        assert len(bank.reads) == count
        bank.reads[-1].resolve(b"data")
        peer.turn()
    assert [message.id for message in iter(peer.receive, None)] == [
        peer.id - 2,
        peer.id - 1,
        peer.id,
    ]


# --- posted


def test_a_posted_write_holds_up_nothing(peer: Peer, bank: RegisterBank, server: Server) -> None:
    peer.post(Command.REGION_WRITE, WRITE, flags=POSTED)
    peer.post(Command.REGION_WRITE, WRITE, flags=POSTED)
    assert len(bank.writes) == 2
    peer.ok(Command.REGION_READ, access(0, 4))
    assert server.counters.posted == 0
    bank.writes[0].resolve(None)
    bank.writes[1].refuse(PeerError(errno.ENXIO, "no such register"))
    assert peer.receive() is None
    assert (server.counters.posted, server.counters.refused) == (2, 1)
    peer.ok(Command.REGION_READ, access(0, 4))


def test_a_device_that_does_not_keep_up_with_posted_writes_is_waited_for(
    loop: Loop, bank: RegisterBank, files: MappedFiles, tmp_path: Path
) -> None:
    server = Server(loop, bank, tmp_path / "few", files, ServerLimits(open_posted=2))
    peer = Peer(server, loop)
    peer.ok(Command.VERSION, HELLO)
    for _ in range(4):
        peer.post(Command.REGION_WRITE, WRITE, flags=POSTED)
    peer.turn(5)
    assert len(bank.writes) == 2
    bank.writes[0].resolve(None)
    peer.turn()
    assert len(bank.writes) == 2, "the newest is what is waited for"
    bank.writes[1].resolve(None)
    peer.turn()
    assert len(bank.writes) == 4
    peer.close()
    server.close()


def test_a_posted_command_of_another_kind_is_waited_for(peer: Peer, slow: Slow) -> None:
    """Otherwise a client could have any number of unmaps waiting."""
    peer.post(Command.DMA_UNMAP, UNMAP, flags=POSTED)
    peer.post(Command.REGION_READ, access(0, 4))
    assert peer.receive() is None
    slow.finish()
    peer.turn()
    answer = peer.receive()
    assert answer is not None
    assert answer.id == peer.id


# --- nobody waits any more


def test_a_client_may_leave_while_it_waits(
    peer: Peer,
    slow: Slow,
    waiting: tuple[Command, bytes, bytes],
    server: Server,
    connect: Callable[[], Peer],
) -> None:
    command, payload, _ = waiting
    before = open_fds()
    peer.post(command, payload)
    peer.post(Command.REGION_READ, access(0, 4))
    open_before = slow.open()
    slow.bank.held_memory.held = False
    peer.close()
    assert not server.connected
    assert slow.bank.departures == 1
    assert slow.bank.memory.regions() == []
    assert open_fds() < before
    after = connect()
    after.ok(Command.VERSION, HELLO)
    for deferred in open_before:
        deferred.refuse(PeerError(errno.EIO, "too late"))
    assert server.counters.refused == 0, "nobody was refused anything"
    assert after.receive() is None
    after.ok(Command.REGION_READ, access(0, 4))


def test_a_client_that_died_waiting_gives_way_at_once(
    server: Server, bank: RegisterBank, loop: Loop
) -> None:
    first = Peer(server, loop)
    first.ok(Command.VERSION, HELLO)
    first.post(Command.REGION_READ, READ)
    first.socket.close()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(server.path))
        server._accept()
        assert bank.departures == 1
        assert (server.clients, server.turned_away) == (2, 0)


def test_the_server_may_close_meanwhile(
    peer: Peer, slow: Slow, waiting: tuple[Command, bytes, bytes], server: Server
) -> None:
    command, payload, _ = waiting
    peer.post(command, payload)
    open_before = slow.open()
    slow.bank.held_memory.held = False
    server.close()
    assert peer.closed()
    assert slow.bank.departures == 1
    for deferred in open_before:
        deferred.refuse(PeerError(errno.EIO, "too late"))


def test_a_device_may_give_up_when_it_is_disconnected(
    peer: Peer, bank: RegisterBank, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disconnect() -> None:
        bank.irqs = None
        bank.reads[0].refuse(PeerError(errno.ECONNRESET, "the client has gone"))

    monkeypatch.setattr(bank, "disconnect", disconnect)
    peer.post(Command.REGION_READ, READ)
    peer.close()
    assert not server.connected
    assert server.counters.refused == 0


def test_a_client_that_waits_is_asked_for_nothing(
    connect: Callable[[], Peer],
    bank: RegisterBank,
    server: Server,
    memfd: Callable[..., int],
) -> None:
    """QEMU can't answer then."""
    peer = connect()
    peer.ok(Command.VERSION, QEMU)
    peer.ok(Command.DMA_MAP, spec.DMA_MAP.pack(32, 3, 0, 0, PAGE), [memfd()])
    peer.post(Command.REGION_READ, READ)
    server.suspect_memory(0)
    peer.turn()
    assert peer.receive() is None
    bank.reads[0].resolve(b"done")
    commands = [message.command for message in iter(peer.receive, None)]
    assert commands == [Command.REGION_READ, Command.DMA_READ]


@pytest.mark.parametrize("iommufd", [False, True])
def test_addresses_that_are_ours_mean_nothing_to_a_client(
    loop: Loop,
    bank: RegisterBank,
    files: MappedFiles,
    memfd: Callable[..., int],
    iommufd: bool,
) -> None:
    line = Line(loop, bank, files, ServerLimits(iommufd=IoasLimits()))
    theirs = Capabilities(message_dma=True, iommufd=iommufd)
    line.peer.ok(Command.VERSION, encode_version(0, theirs))
    line.peer.ok(Command.DMA_MAP, spec.DMA_MAP.pack(32, 3, 0, 0, PAGE), [memfd()])
    line.client.suspect_memory(0)
    line.peer.turn()
    asked = [message.command for message in iter(line.peer.receive, None)]
    assert asked == ([] if iommufd else [Command.DMA_READ])
    line.client.close()
    line.peer.socket.close()


# --- too late


def test_an_answer_that_took_too_long_is_withheld(
    connect: Callable[[], Peer], clock: Clock, bank: RegisterBank, server: Server
) -> None:
    peer = connect()
    peer.ok(Command.VERSION, QEMU)
    peer.post(Command.REGION_READ, READ)
    clock.now += 4
    peer.turn(5)
    clock.now += 1
    peer.turn(5)
    bank.reads[0].resolve(b"data")
    answer = peer.receive()
    assert answer is not None
    assert (answer.flags, answer.error) == (spec.F_TYPE_REPLY | spec.F_ERROR, errno.ETIMEDOUT)
    assert server.counters.withheld == 1
    assert peer.ok(Command.REGION_READ, access(0, 4)) == access(0, 4, bytes(4))


def test_an_answer_in_time_is_sent(
    connect: Callable[[], Peer], clock: Clock, bank: RegisterBank
) -> None:
    peer = connect()
    peer.ok(Command.VERSION, QEMU)
    peer.post(Command.REGION_READ, READ)
    clock.now += 4
    peer.turn(5)
    bank.reads[0].resolve(b"data")
    answer = peer.receive()
    assert answer is not None
    assert answer.payload == READ + b"data"


def test_what_came_meanwhile_has_waited_as_long(
    connect: Callable[[], Peer], clock: Clock, bank: RegisterBank
) -> None:
    """QEMU sends several commands and waits for the last: it has waited since it sent that."""
    peer = connect()
    peer.ok(Command.VERSION, QEMU)
    peer.post(Command.REGION_WRITE, WRITE)
    peer.post(Command.REGION_READ, access(0, 4))
    clock.now += 6
    peer.turn()
    bank.writes[0].resolve(None)
    peer.turn()
    first, second = peer.receive(), peer.receive()
    assert first is not None
    assert second is not None
    assert [first.error, second.error] == [errno.ETIMEDOUT, errno.ETIMEDOUT]
    peer.turn()
    assert peer.ok(Command.REGION_READ, access(0, 4)) == access(0, 4, bytes(4))


# --- one client on a connected socket


class Line:
    """A client on a socketpair, and what became of it."""

    def __init__(
        self,
        loop: Loop,
        bank: RegisterBank,
        files: MappedFiles,
        limits: ServerLimits | None = None,
    ) -> None:
        self.gone: list[str] = []
        self.refused: list[str] = []
        sock, other = socket.socketpair()
        self.peer = Peer(other, loop)
        self.client = ServedClient(
            loop,
            bank,
            sock,
            files,
            limits,
            on_gone=self.gone.append,
            on_memory_refused=self.refused.append,
        )


@pytest.fixture
def line(
    loop: Loop, bank: RegisterBank, files: MappedFiles, caplog: pytest.LogCaptureFixture
) -> Iterator[Line]:
    caplog.set_level(logging.INFO, "viommu.vfio_user")
    line = Line(loop, bank, files)
    yield line
    line.client.close()
    line.peer.socket.close()


def test_a_connected_socket_is_served_once(line: Line, bank: RegisterBank) -> None:
    line.peer.ok(Command.VERSION, HELLO)
    assert line.client.ready
    line.peer.ok(Command.REGION_WRITE, access(0, 4, b"data"))
    line.peer.close()
    assert line.gone == ["closed by the peer"]
    assert line.client.closed
    assert bank.departures == 1
    line.client.close()
    assert len(line.gone) == 1


def test_a_client_that_can_not_be_served_is_dropped(line: Line) -> None:
    assert line.peer.refused(Command.DEVICE_RESET) == errno.EINVAL
    assert line.gone == ["its messages can't be served"]
    assert line.peer.closed()


def test_one_who_closes_it_knows(line: Line, bank: RegisterBank) -> None:
    line.peer.ok(Command.VERSION, HELLO)
    line.client.close()
    assert line.gone == []
    assert bank.departures == 1
    assert line.peer.closed()


def test_a_client_without_memory_is_told_of(line: Line) -> None:
    line.peer.ok(Command.VERSION, HELLO)
    line.peer.ok(Command.DMA_MAP, spec.DMA_MAP.pack(32, 3, 0, 0, PAGE))
    info = spec.DEVICE_INFO.pack(16, 0, 0, 0)
    assert line.peer.refused(Command.DEVICE_GET_INFO, info) == errno.EINVAL
    assert line.peer.refused(Command.DEVICE_GET_INFO, info) == errno.EINVAL
    assert line.refused == [line.client.memory_refused]


# --- a client that is asked for its memory

TALKATIVE = encode_version(0, Capabilities(message_dma=True))
START = struct.pack("<Q", 0x5000)


class Asking(Line):
    """A device that asks its client for memory, which has no file."""

    def __init__(
        self, loop: Loop, bank: RegisterBank, files: MappedFiles, limits: ServerLimits
    ) -> None:
        self.memory = MessageMemory()
        bank.memory = self.memory
        super().__init__(loop, bank, files, limits)
        self.peer.ok(Command.VERSION, TALKATIVE)
        self.peer.ok(Command.DMA_MAP, spec.DMA_MAP.pack(32, 3, 0, 0x5000, PAGE))
        self.peer.ok(Command.REGION_WRITE, access(DMA_ADDRESS, 8, START))

    def answer(self, ident: int = 0, error: int = 0) -> None:
        """Send the answer to a DMA_WRITE, before it was asked for: the server waits for it."""
        flags = spec.F_TYPE_REPLY | (spec.F_ERROR if error else 0)
        self.peer.socket.send(spec.HEADER.pack(ident, Command.DMA_WRITE, 16, flags, error))

    def kick(self, flags: int = 0) -> None:
        """Send the write that starts the DMA, and let nothing happen yet."""
        self.peer.id += 1
        payload = access(DMA_START, 4, b"data")
        header = spec.HEADER.pack(self.peer.id, Command.REGION_WRITE, 36, flags, 0)
        self.peer.socket.send(header + payload)


@pytest.fixture
def asking(loop: Loop, bank: RegisterBank, files: MappedFiles) -> Iterator[Asking]:
    asking = Asking(loop, bank, files, ServerLimits(dma_time=0.01))
    yield asking
    asking.client.close()
    asking.peer.socket.close()
    assert asking.memory.port is None
    assert asking.memory.regions() == []


def test_the_write_that_starts_dma_is_answered_first(asking: Asking) -> None:
    asking.kick()
    asking.answer()
    asking.peer.turn(1)
    first, second = asking.peer.receive(), asking.peer.receive()
    assert first is not None
    assert second is not None
    assert (first.command, first.flags) == (Command.REGION_WRITE, spec.F_TYPE_REPLY)
    assert second.command == Command.DMA_WRITE
    assert second.payload == spec.DMA_ACCESS.pack(0x5000, 4) + b"data"
    asking.peer.ok(Command.REGION_READ, access(0, 4))


@pytest.mark.parametrize(
    ("takes", "sizes"), [(1 << 20, [0x10000, 0x8000]), (0x9000, [0x9000, 0x9000, 0x6000])]
)
def test_memory_is_asked_for_in_pieces(
    loop: Loop, bank: RegisterBank, files: MappedFiles, takes: int, sizes: list[int]
) -> None:
    bank.memory = memory = MessageMemory()
    line = Line(loop, bank, files)
    theirs = Capabilities(max_data_xfer_size=takes, message_dma=True)
    line.peer.ok(Command.VERSION, encode_version(0, theirs))
    line.peer.ok(Command.DMA_MAP, spec.DMA_MAP.pack(32, 3, 0, 0, 1 << 20))
    start = 0
    for ident, size in enumerate(sizes):
        payload = spec.DMA_ACCESS.pack(start, size) + bytes(size)
        header = spec.HEADER.pack(ident, Command.DMA_READ, 16 + len(payload), spec.F_TYPE_REPLY, 0)
        line.peer.socket.sendall(header + payload)
        start += size
    assert memory.read(0, 0x18000) == bytes(0x18000)
    asked = [message.payload for message in iter(line.peer.receive, None)]
    assert [spec.DMA_ACCESS.unpack(payload)[1] for payload in asked] == sizes
    line.client.close()
    line.peer.socket.close()


def test_a_posted_write_may_start_dma(asking: Asking) -> None:
    asking.kick(POSTED)
    asking.answer()
    asking.peer.turn(1)
    message = asking.peer.receive()
    assert message is not None
    assert message.command == Command.DMA_WRITE


def test_commands_that_come_meanwhile_are_served_in_order_afterwards(asking: Asking) -> None:
    asking.kick()
    ids = range(1, 201)  # more than are handled in a few turns
    for ident in ids:
        header = spec.HEADER.pack(ident, Command.REGION_READ, 32, 0, 0)
        asking.peer.socket.send(header + access(DMA_START, 4))
    asking.answer()
    asking.peer.turn(6)
    messages = list(iter(asking.peer.receive, None))
    assert [m.command for m in messages[:2]] == [Command.REGION_WRITE, Command.DMA_WRITE]
    assert [m.id for m in messages[2:]] == list(ids)
    assert messages[2].payload[16:] == b"data", "the write was done before"


def test_commands_that_come_while_the_device_is_awaited_are_served_afterwards(
    asking: Asking, bank: RegisterBank
) -> None:
    asking.peer.post(Command.REGION_READ, READ)
    header = spec.HEADER.pack(7, Command.REGION_READ, 32, 0, 0)
    asking.peer.socket.send(header + access(0, 4))
    asking.answer()
    asking.memory.write(0x5000, b"data")  # as a timer of the device may
    asking.peer.turn()
    message = asking.peer.receive()
    assert message is not None
    assert message.command == Command.DMA_WRITE
    assert asking.peer.receive() is None
    bank.reads[0].resolve(b"done")
    asking.peer.turn()
    answers = [message.payload for message in iter(asking.peer.receive, None)]
    assert answers == [READ + b"done", access(0, 4, bytes(4))]


def test_what_came_meanwhile_goes_with_the_client(
    asking: Asking, bank: RegisterBank, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    asking.peer.post(Command.REGION_READ, READ)
    header = spec.HEADER.pack(7, Command.DMA_MAP, 48, 0, 0)
    before = open_fds()
    send(asking.peer.socket, header + spec.DMA_MAP.pack(32, 3, 0, 0, PAGE), [fd])
    asking.answer()
    asking.memory.write(0x5000, b"data")
    assert open_fds() == before + 1
    asking.client.close()
    assert open_fds() == before - 1, "the connection, and what waited to be handled"
    bank.reads[0].resolve(b"done")


def test_the_client_may_refuse(asking: Asking, caplog: pytest.LogCaptureFixture) -> None:
    asking.kick()
    asking.answer(error=errno.EFAULT)
    asking.peer.turn(1)
    assert asking.peer.receive() is not None, "the write was answered before"
    assert "Bad address" in caplog.text
    assert asking.client.counters.refused == 1
    asking.peer.receive()
    asking.peer.ok(Command.REGION_READ, access(0, 4))


@pytest.mark.parametrize("posted", [0, POSTED])
def test_a_client_that_does_not_answer_is_dropped(asking: Asking, posted: int) -> None:
    asking.kick(posted)
    asking.peer.turn(3)
    assert asking.gone == ["it did not answer for its memory within 0.01 s"]
    commands = [] if posted else [Command.REGION_WRITE]
    for command in (*commands, Command.DMA_WRITE):
        message = asking.peer.receive()
        assert message is not None
        assert message.command == command
    assert asking.peer.closed()


def test_a_client_that_goes_meanwhile_is_dropped(asking: Asking, bank: RegisterBank) -> None:
    asking.kick(POSTED)
    asking.peer.socket.shutdown(socket.SHUT_WR)
    asking.peer.turn(3)
    assert asking.gone == ["closed by the peer"]
    assert bank.departures == 1


def test_a_client_that_left_before_is_not_asked(asking: Asking, bank: RegisterBank) -> None:
    asking.kick()
    asking.client._serve()  # the write is answered, and left to be done
    asking.client.close()
    asking.peer.turn()
    assert bank.bytes[BAR][DMA_START : DMA_START + 4] == bytes(4)


def test_what_is_done_behind_an_answer_may_take_its_time(
    asking: Asking, bank: RegisterBank
) -> None:
    asking.peer.ok(Command.REGION_WRITE, WRITE)
    asking.peer.post(Command.REGION_READ, access(0, 4))
    assert asking.peer.receive() is None
    bank.writes[0].refuse(PeerError(errno.ENXIO, "no such register"))
    asking.peer.turn()
    assert asking.peer.receive() is not None
    assert asking.client.counters.refused == 1
    asking.peer.ok(Command.REGION_WRITE, WRITE)
    asking.client.close()
    bank.writes[1].resolve(None)


def test_memory_without_a_file_is_no_reason_to_refuse_such_a_client(asking: Asking) -> None:
    asking.peer.ok(Command.DEVICE_GET_INFO, spec.DEVICE_INFO.pack(16, 0, 0, 0))


def test_qemu_is_not_asked(loop: Loop, bank: RegisterBank, files: MappedFiles) -> None:
    """Its main loop can't answer while one of its CPUs waits for us."""
    bank.memory = memory = MessageMemory()
    line = Line(loop, bank, files)
    line.peer.ok(Command.VERSION, QEMU)
    assert memory.port is None
    line.client.close()
    line.peer.socket.close()
