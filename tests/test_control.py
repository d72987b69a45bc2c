"""The control socket: what a good client gets, and what bad ones can't do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from viommu.control import ControlClient, ControlLimits, ControlServer
from viommu.errors import PeerError, UsageError
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ASK = b'{"command": "snapshot"}\n'


def fds() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


class Served:
    """A server on a loop with a clock of its own, and what it was asked."""

    def __init__(self, path: Path, limits: ControlLimits) -> None:
        self.path = path
        self.now = 0.0
        self.made = 0
        self.content = ""
        self.loop = Loop(lambda: self.now)
        self.server = ControlServer(self.loop, path, self.snapshot, limits)

    def snapshot(self) -> dict[str, object]:
        self.made += 1
        return {"made": self.made, "content": self.content}

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.path))
        client.setblocking(False)
        return client

    def settle(self) -> None:
        for _ in range(20):
            self.loop.turn(0)

    def ask(self, client: socket.socket, request: bytes = ASK) -> dict[str, object]:
        client.send(request)
        self.settle()
        reply = json.loads(client.recv(1 << 16))
        assert isinstance(reply, dict)
        return reply


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(**limits: Any) -> Served:
            served = Served(tmp_path / "control.sock", ControlLimits(**limits))
            stack.callback(served.loop.close)
            stack.callback(served.server.close)
            return served

        yield start


def test_a_snapshot(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as client:
        assert served.ask(client) == {"ok": True, "snapshot": {"made": 1, "content": ""}}


def test_the_blocking_client(serve: Callable[..., Served]) -> None:
    served = serve()
    served.content = "x" * (1 << 20)
    asked: list[dict[str, object]] = []

    def ask() -> None:
        with ControlClient(served.path) as client:
            asked.append(client.snapshot())
            asked.append(client.snapshot())

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        served.loop.turn(0.01)
    thread.join()

    assert asked == [{"made": n, "content": served.content} for n in (1, 2)]


def test_every_snapshot_is_a_new_one(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as client:
        assert served.ask(client)["snapshot"] == {"made": 1, "content": ""}
        assert served.ask(client)["snapshot"] == {"made": 2, "content": ""}


@pytest.mark.parametrize(
    ("request_line", "error"),
    [
        (b"\n", "not JSON"),
        (b"{\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[" * 4000 + b"\n", "not JSON"),
        (b"[]\n", "only command"),
        (b"1\n", "only command"),
        (b'{"command": "reset"}\n', "only command"),
        (b'{"command": ["snapshot"]}\n', "only command"),
        (b"x" * 5000, "at most 4096 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_requests_are_refused(
    request_line: bytes, error: str, serve: Callable[..., Served]
) -> None:
    served = serve()
    with served.connect() as client:
        reply = served.ask(client, request_line)

        assert reply["ok"] is False
        assert error in str(reply["error"])
        assert served.made == 0


def test_a_request_in_pieces_and_several_at_once(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as client:
        for byte in ASK[:-1]:
            client.send(bytes([byte]))
            served.settle()
        client.send(b"\n" + ASK + ASK)
        served.settle()

        assert client.recv(1 << 16).count(b"\n") == 3


def test_many_requests_at_once_are_answered_one_a_turn(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as client:
        client.send(ASK * 10)
        served.loop.turn(0)  # accepts
        served.loop.turn(0)
        assert served.made == 2  # when it was read, and after all others had their turn
        for made in range(3, 11):
            served.loop.turn(0)
            assert served.made == made

        assert client.recv(1 << 16).count(b"\n") == 10
        assert served.ask(client)["ok"] is True


def test_a_client_may_leave_while_its_next_request_waits(serve: Callable[..., Served]) -> None:
    served = serve(clients=1)
    with served.connect() as greedy:
        greedy.send(ASK * 10)
        served.loop.turn(0)
        served.loop.turn(0)
        with served.connect() as other:  # displaces it
            assert served.ask(other)["ok"] is True
        assert served.made < 5


def test_a_client_that_does_not_read_stops_only_itself(serve: Callable[..., Served]) -> None:
    served = serve()
    served.content = "x" * (1 << 20)
    with served.connect() as slow, served.connect() as other:
        with contextlib.suppress(BlockingIOError):
            while True:
                slow.send(ASK)
                served.settle()
        made = served.made

        served.content = ""
        assert served.ask(other)["ok"] is True
        # Of everything that the slow one asked, one reply was made and waits.
        assert made == 1


def test_a_slow_client_gets_its_whole_reply(serve: Callable[..., Served]) -> None:
    served = serve()
    served.content = "x" * (1 << 20)
    received = b""
    with served.connect() as client:
        client.send(ASK + ASK)
        while received.count(b"\n") < 2:
            served.settle()
            received += client.recv(1 << 16)

    first, second, rest = received.split(b"\n")
    assert rest == b""
    assert json.loads(first)["snapshot"] == {"made": 1, "content": served.content}
    assert json.loads(second)["snapshot"] == {"made": 2, "content": served.content}


def test_a_snapshot_beyond_the_limit_is_an_error(serve: Callable[..., Served]) -> None:
    served = serve(reply=100)
    served.content = "x" * 200
    with served.connect() as client:
        assert "more than can be sent" in str(served.ask(client)["error"])


def test_one_client_more_displaces_the_one_silent_longest(serve: Callable[..., Served]) -> None:
    served = serve(clients=2)
    with served.connect() as first, served.connect() as second:
        served.ask(second)
        served.ask(first)
        with served.connect() as third:
            assert served.ask(third)["ok"] is True
            assert second.recv(10) == b""
            assert served.ask(first)["ok"] is True


def test_clients_that_vanish(serve: Callable[..., Served]) -> None:
    served = serve()
    before = len(fds())
    for request in (b"", b"{", ASK):
        with served.connect() as client:
            client.send(request)
        served.settle()

    assert len(fds()) == before
    with served.connect() as client:
        assert served.ask(client)["ok"] is True


def test_no_fd_left_to_accept_with(serve: Callable[..., Served]) -> None:
    served = serve()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with served.connect() as client:
        client.send(ASK)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds()), limits[1]))
        try:
            spare = []
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            served.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in spare:
                os.close(fd)
        with pytest.raises(BlockingIOError):
            client.recv(1)

        served.now += 2.0
        served.settle()
        assert json.loads(client.recv(1 << 16))["ok"] is True


def test_the_socket_is_private_and_is_removed(serve: Callable[..., Served]) -> None:
    served = serve()
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600

    served.server.close()
    served.server.close()

    assert not served.path.exists()


def test_a_path_that_is_taken(serve: Callable[..., Served]) -> None:
    served = serve()

    with pytest.raises(UsageError, match="can't listen on the control socket"):
        ControlServer(served.loop, served.path, dict)


def test_what_a_dead_server_has_left_is_replaced(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
        dead.listen()
    served = serve()

    with served.connect() as client:
        assert served.ask(client)["ok"]


def test_a_file_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("mine")
    with contextlib.closing(Loop()) as loop, pytest.raises(UsageError, match="in use"):
        ControlServer(loop, path, dict)

    assert path.read_text() == "mine"


def answer_with(path: Path, *answers: bytes) -> threading.Thread:
    """Accept one client at ``path``, send ``answers`` whatever it says, and hang up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(100)
            for answer in answers:
                connection.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "number", "message"),
    [
        (b"", errno.EPIPE, "went away"),
        (b'{"ok": true', errno.EPIPE, "went away"),
        (b"hello\n", errno.EPROTO, "sent b'hello"),
        (b"[]\n", errno.EPROTO, "sent"),
        (b'{"ok": true}\n', errno.EPROTO, "sent"),
        (b'{"ok": true, "snapshot": 1}\n', errno.EPROTO, "refused: 1"),
        (b'{"ok": false, "error": "busy"}\n', errno.EPROTO, "refused: busy"),
    ],
)
def test_a_server_that_lies(answer: bytes, number: int, message: str, tmp_path: Path) -> None:
    thread = answer_with(tmp_path / "s", answer)
    with (
        ControlClient(tmp_path / "s") as client,
        pytest.raises(PeerError, match=message) as caught,
    ):
        client.snapshot()
    thread.join()

    assert caught.value.errno == number


def test_a_server_that_is_silent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with (
            ControlClient(tmp_path / "s", timeout=0.01) as client,
            pytest.raises(PeerError, match="can't be asked: timed out"),
        ):
            client.snapshot()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ControlClient(tmp_path / "s")
