"""Answers that come later, and a client whose socket is connected already."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import HELLO, PAGE, Clock, Peer, open_fds
from tests.vfio_user.register_bank import BAR, LATER, SHORT, RegisterBank
from viommu.deferred import Deferred
from viommu.errors import BackendError, PeerError
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import Server, ServerLimits
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
        bank.memory.held = bank.resets_later = True

    def open(self) -> list[Deferred[bytes] | Deferred[None]]:
        every: list[Deferred[bytes] | Deferred[None]] = [*self.bank.reads]
        every += [*self.bank.writes, *self.bank.memory.releases]
        return [deferred for deferred in every if not deferred.done]

    def finish(self) -> None:
        """Do what is asked for, which is one thing."""
        (deferred,) = self.open()
        if deferred in self.bank.reads:
            self.bank.reads[-1].resolve(b"done")
        else:
            [*self.bank.writes, *self.bank.memory.releases][-1].resolve(None)

    def fail(self, number: int) -> None:
        (deferred,) = self.open()
        deferred.refuse(PeerError(number, "it can't be done"))


@pytest.fixture
def slow(bank: RegisterBank, peer: Peer, memfd: Callable[..., int]) -> Iterator[Slow]:
    yield Slow(bank, peer, memfd())
    bank.memory.held = False


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
    slow.bank.memory.held = False
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
    slow.bank.memory.held = False
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

    def __init__(self, loop: Loop, bank: RegisterBank, files: MappedFiles) -> None:
        self.gone: list[str] = []
        self.refused: list[str] = []
        sock, other = socket.socketpair()
        self.peer = Peer(other, loop)
        self.client = ServedClient(
            loop,
            bank,
            sock,
            files,
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
