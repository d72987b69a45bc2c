"""One client of the server: what it holds when it leaves, misbehaves, or doesn't let go."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import PAGE, RawClient, Rig, make_rig
from viommu.errors import PeerError
from viommu.ipc import packets, protocol
from viommu.ipc.conversation import ExportLimits
from viommu.ipc.hold import HoldPolicy, Measure
from viommu.ipc.peer import PeerProcess
from viommu.ipc.protocol import Kind

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from viommu.ipc.served_client import ServedClient
    from viommu.loop import Loop

LIMIT = 8.0
KILL = HoldPolicy(LIMIT, Measure.KILL)
PATIENCE = 30  # seconds until a test that waits for a process fails


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is the client, as far as it can be killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def client_of(rig: Rig) -> ServedClient:
    client = rig.server.client
    assert client is not None
    return client


def is_set(fault: socket.socket) -> bool:
    """Whether a fault was signalled; it is cleared."""
    try:
        fault.recv(8)
    except BlockingIOError:
        return False
    return True


def turn_until_gone(loop: Loop, rig: Rig) -> None:
    while not rig.gone:
        loop.turn(PATIENCE)


# -- the eight steps


def test_an_unmap_waits_for_the_release_and_not_longer(rig: Rig) -> None:
    client = rig.connect()
    fault = client.start()
    client.export(0x10000, PAGE)
    client.export(0x11000, PAGE)
    assert not is_set(fault)
    resolution = rig.unmap(0x10000, 4 * PAGE)

    assert resolution is not None
    assert is_set(fault)
    client.release(0x10000, PAGE)
    assert not resolution.is_set()
    client.release(0x11000, PAGE)
    assert resolution.is_set()
    fault.close()


def test_the_next_session_begins_when_all_is_released(rig: Rig) -> None:
    client = rig.connect()
    client.start().close()
    client.export(0x10000, PAGE)
    rig.unmap(0x10000, 4 * PAGE)
    assert client.ask(Kind.START).error
    client.release(0x10000, PAGE)
    rig.map(0x10000, 0, PAGE)
    fault = client.start()

    assert not client.export(0x10000, PAGE).error
    assert not is_set(fault)
    fault.close()


# -- leaving


def test_a_client_that_dies_has_released_everything_at_once(rig: Rig) -> None:
    client = rig.connect()
    client.start().close()
    for _ in range(3):
        client.export(0x10000, PAGE)
    resolution = rig.unmap(0x10000, 4 * PAGE)
    assert resolution is not None
    client.close()

    assert resolution.is_set()
    assert rig.mapper.exports.total == 0
    assert rig.gone == ["closed by the client"]
    assert rig.server.client is None


@pytest.mark.parametrize("how", ["in order", "cut off", "unread"])
def test_a_client_that_has_hung_up_gives_way_to_the_next_at_once(rig: Rig, how: str) -> None:
    client = rig.connect()
    client.start().close()
    client.export(0x10000, PAGE)
    if how == "cut off":
        client.send(b"nonsense")
    elif how == "unread":
        with contextlib.suppress(BlockingIOError):
            while True:
                client.request(Kind.MEMORY, protocol.FIRST.pack(0))
    client.socket.close()  # and the loop has not turned yet
    rig.connect()

    assert rig.mapper.exports.total == 0
    assert len(rig.gone) == 1


def test_a_client_says_why_it_leaves(rig: Rig) -> None:
    client = rig.connect()
    client.tell(Kind.LEAVE, b"disk.img is in use")
    client.close()

    assert rig.gone == ["closed by the client (disk.img is in use)"]


def test_a_client_that_says_nothing_is_dropped() -> None:
    with Rig(limits=ExportLimits(hello_time=5.0)) as rig:
        silent = rig.connect(greet=False)
        rig.advance(5)
        assert silent.cut_off
        assert rig.gone == ["it said nothing in time"]

        polite = rig.connect()
        rig.advance(5)
        assert not polite.cut_off


# -- breaking the protocol


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n", bytes(8), bytes(1 << 16)])
def test_nonsense_ends_the_connection(rig: Rig, data: bytes) -> None:
    client = rig.connect()
    client.start().close()
    client.send(data)

    assert client.cut_off
    assert len(rig.gone) == 1
    rig.connect()


def test_a_client_that_is_cut_off_holds_until_it_has_let_go(rig: Rig) -> None:
    client = rig.connect()
    fault = client.start()
    client.export(0x10000, PAGE)
    client.send(b"nonsense")

    assert is_set(fault)
    assert client.cut_off
    resolution = rig.unmap(0x10000, 4 * PAGE)
    assert resolution is not None
    client.release(0x10000, PAGE)  # nobody listens any more
    assert not resolution.is_set()
    assert rig.gone == []
    described = client_of(rig).describe()
    assert (described["session"], described["exports"]) == ("ending", 1)
    client.close()
    assert resolution.is_set()
    assert rig.gone == ["a packet of kind 0x6f6e, error 29550"]
    fault.close()


def test_releasing_what_is_not_held_ends_the_connection(rig: Rig) -> None:
    client = rig.connect()
    client.start().close()
    client.release(0x10000, PAGE)

    assert client.cut_off


def test_a_client_that_can_not_be_answered_holds_until_it_has_let_go_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is out of something: that says nothing of the client, which may be writing."""
    client = rig.connect()
    fault = client.start()
    client.export(0x10000, PAGE)

    def refuse(*_: object) -> int:
        raise OSError(errno.ETOOMANYREFS, "too many references")

    monkeypatch.setattr(packets, "send", refuse)
    client.request(Kind.MEMORY, protocol.FIRST.pack(0))
    monkeypatch.undo()

    assert is_set(fault)
    assert client.cut_off
    assert rig.mapper.exports.total == 1
    client.close()
    assert rig.gone == ["its socket: [Errno 109] too many references"]
    fault.close()


def test_nor_one_that_can_not_be_told_of_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rig.connect()
    list_memory(client)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOBUFS, "no buffers")

    monkeypatch.setattr(packets, "send", refuse)
    change_memory(rig)

    assert rig.gone == ["its socket: [Errno 105] no buffers"]


# -- a client that doesn't read


def test_a_client_that_does_not_read_is_not_read_from(rig: Rig) -> None:
    client = rig.connect()
    client.start().close()
    asked = 0
    body = protocol.FIRST.pack(0)
    while asked < 10_000:
        try:
            client.request(Kind.MEMORY, body)
        except BlockingIOError:
            break
        asked += 1
    assert asked < 10_000, "it could go on for ever"

    client.turn()
    answers = 0
    while (answer := client.receive()) is not None:
        answers += 1
        for fd in answer.fds:
            os.close(fd)
        client.turn()
    assert answers == asked
    assert not client.export(0x10000, PAGE).error
    client.release(0x10000, PAGE)


def test_a_client_that_never_read_may_leave(rig: Rig) -> None:
    client = rig.connect()
    client.start().close()
    client.export(0x10000, PAGE)
    while True:
        try:
            client.request(Kind.MEMORY, protocol.FIRST.pack(0))
        except BlockingIOError:
            break
    resolution = rig.unmap(0x10000, 4 * PAGE)
    assert resolution is not None
    client.close()

    assert resolution.is_set()
    assert len(rig.gone) == 1


def test_others_have_their_turn(rig: Rig) -> None:
    client = rig.connect()
    client.start().close()
    for _ in range(64):
        client.socket.send(
            protocol.encode_request(Kind.EXPORT, 7, protocol.RANGE.pack(0x10000, PAGE))
        )
    client.socket.send(protocol.encode_request(Kind.START, 7))
    rig.loop.turn(0)
    assert rig.mapper.exports.total == 64

    replies = 0
    rig.turn()
    while client.receive() is not None:
        replies += 1
    assert replies == 65


# -- memory that changes


def list_memory(client: RawClient) -> None:
    answer = client.ask(Kind.MEMORY, protocol.FIRST.pack(0))
    for fd in answer.fds:
        os.close(fd)


def change_memory(rig: Rig, times: int = 1) -> None:
    for _ in range(times):
        rig.memory.map(1 << 40, PAGE, readable=True, writable=True, file=None)
        rig.memory.unmap(1 << 40, PAGE)
    rig.turn()


def test_a_client_is_told_once_that_its_list_of_memory_is_old(rig: Rig) -> None:
    client = rig.connect()
    change_memory(rig)
    assert client.receive() is None, "it never asked"

    list_memory(client)
    change_memory(rig, 50)
    note = client.receive()
    assert note is not None
    assert protocol.Reply(*note[:4]).is_note
    assert client.receive() is None
    change_memory(rig)
    assert client.receive() is None

    list_memory(client)
    change_memory(rig)
    assert client.receive() is not None


def test_a_note_waits_for_a_client_that_does_not_read(rig: Rig) -> None:
    client = rig.connect()
    asked = 0
    while True:
        try:
            client.request(Kind.MEMORY, protocol.FIRST.pack(0))
        except BlockingIOError:
            break
        asked += 1
    change_memory(rig)
    notes = answers = 0
    while (answer := client.receive()) is not None:
        notes += protocol.Reply(*answer[:4]).is_note
        answers += 1
        for fd in answer.fds:
            os.close(fd)
        client.turn()
    assert answers == asked + notes
    assert notes == 1


def test_a_client_that_is_gone_is_not_told(rig: Rig) -> None:
    client = rig.connect()
    list_memory(client)
    client.socket.close()
    change_memory(rig)
    assert len(rig.gone) == 1

    client = rig.connect()
    client.start().close()
    list_memory(client)
    client.export(0x10000, PAGE)
    client.send(b"nonsense")
    change_memory(rig)
    assert client.cut_off


# -- not letting go


def test_under_wait_the_guest_waits_and_it_is_logged_once_a_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Rig(policy=HoldPolicy(LIMIT)) as rig:
        client = rig.connect()
        client.start().close()
        client.export(0x10000, PAGE)
        rig.advance(100)
        assert caplog.messages == []
        resolution = rig.unmap(0x10000, 4 * PAGE)
        assert resolution is not None
        for _ in range(3):
            rig.advance(LIMIT)
        assert len(caplog.messages) == 3
        assert f"process {os.getpid()} has not let go of 1 exports for 24.0 s" in caplog.text
        assert client_of(rig).describe()["waited for"] == 24.0
        assert not resolution.is_set()

        client.release(0x10000, PAGE)
        assert resolution.is_set()
        assert client_of(rig).describe()["waited for"] is None
        rig.advance(100)
        assert len(caplog.messages) == 3


def test_under_kill_the_guest_waits_until_the_process_has_ended(
    child: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with Rig(policy=KILL) as rig:
        client = rig.connect(PeerProcess.of_child(child.pid))
        client.start().close()
        client.export(0x10000, PAGE)
        resolution = rig.unmap(0x10000, 4 * PAGE)
        assert resolution is not None
        rig.advance(LIMIT - 1)
        assert child.poll() is None
        rig.advance(1)

        assert client_of(rig).describe()["killed"] if not rig.gone else True
        # Its socket is still open here: it is the process that counts.
        turn_until_gone(rig.loop, rig)
        assert resolution.is_set()
        assert child.wait() == -9
        assert rig.gone == ["it was killed because it did not let go"]
        assert "it is killed" in caplog.text
        assert "another has its connection" in caplog.text


def test_a_client_that_lets_go_in_time_is_left_alone(child: subprocess.Popen[bytes]) -> None:
    with Rig(policy=KILL) as rig:
        client = rig.connect(PeerProcess.of_child(child.pid))
        client.start().close()
        client.export(0x10000, PAGE)
        rig.unmap(0x10000, 4 * PAGE)
        rig.advance(LIMIT - 1)
        client.release(0x10000, PAGE)
        rig.advance(LIMIT)

        assert child.poll() is None
        assert rig.gone == []


def test_a_client_that_broke_the_protocol_must_let_go_in_time_too(
    child: subprocess.Popen[bytes],
) -> None:
    with Rig(policy=KILL) as rig:
        client = rig.connect(PeerProcess.of_child(child.pid))
        client.start().close()
        client.export(0x10000, PAGE)
        client.send(b"nonsense")
        rig.advance(LIMIT)
        turn_until_gone(rig.loop, rig)

        assert child.wait() == -9
        assert rig.mapper.exports.total == 0


def test_a_killed_process_whose_socket_closes_first_is_gone(
    child: subprocess.Popen[bytes],
) -> None:
    with Rig(policy=KILL) as rig:
        client = rig.connect(PeerProcess.of_child(child.pid))
        client.start().close()
        client.export(0x10000, PAGE)
        rig.unmap(0x10000, 4 * PAGE)
        client.socket.close()
        rig.advance(LIMIT)

        assert rig.gone == ["closed by the client"]
        assert child.poll() is None


def test_after_the_kill_the_end_of_the_process_counts_and_not_that_of_its_socket(
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Rig(policy=KILL) as rig:
        client = rig.connect(PeerProcess.of_child(child.pid))
        client.start().close()
        client.export(0x10000, PAGE)
        resolution = rig.unmap(0x10000, 4 * PAGE)
        assert resolution is not None
        process = client_of(rig).process
        monkeypatch.setattr(process, "kill", lambda: True)  # a signal that takes its time
        rig.advance(LIMIT)
        client.close()
        with pytest.raises(PeerError, match="is the client here"):
            rig.connect(PeerProcess.of_child(child.pid))
        states = [resolution.is_set(), bool(rig.gone)]
        monkeypatch.undo()
        process.kill()
        turn_until_gone(rig.loop, rig)

        assert states == [False, False]
        assert resolution.is_set()
        assert child.wait() == -9
        assert "another has its connection" not in caplog.text


def test_the_description_says_who_holds_what_since_when(rig: Rig) -> None:
    client = rig.connect()
    rig.advance(2)
    client.start().close()
    client.export(0x10000, PAGE)
    rig.advance(3)
    client.export(0x10000, PAGE)
    client.export(0x11000, 16)

    assert client_of(rig).describe() == {
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "connected": 5.0,
        "session": "active",
        "exports": 3,
        "bytes": 2 * PAGE + 16,
        "holds": [[0x10000, PAGE, 2, 3.0], [0x11000, 16, 1, 0.0]],
        "waited for": None,
        "killed": False,
    }


def test_closing_twice_is_harmless(rig: Rig) -> None:
    rig.connect()
    client = client_of(rig)
    client.close("enough")
    client.close("enough")

    assert client.closed
    assert rig.gone == []


def test_a_rig_finds_what_is_leaked() -> None:
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(make_rig())
        rig.mapper.start_export_session().close()
        rig.mapper.export(0x10000, 1)
        with pytest.raises(AssertionError):
            stack.close()
