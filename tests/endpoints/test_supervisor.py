"""When a process is started, and when another."""

from __future__ import annotations

import errno
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import Rig
from viommu.endpoints.supervisor import Supervisor
from viommu.errors import BackendError, PeerError
from viommu.vfio_user import LoopClient, wait

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.ipc.peer import PeerProcess

PATIENCE = 60  # seconds until a test that waits for a process fails


class Nursery:
    """A supervisor among real parts, with a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.present: list[bool] = []
        self.sockets: list[socket.socket] = []
        self.supervisor = Supervisor(
            self.rig.loop, "00:06.0", "edu", self.rig.server, self.present.append
        )

    def dial(self) -> socket.socket:
        sock = self.supervisor.dial()
        self.sockets.append(sock)
        return sock

    def wait_until_gone(self) -> None:
        while self.supervisor.pid is not None:
            self.rig.loop.turn(PATIENCE)

    def kill(self) -> None:
        self.supervisor.kill()
        self.wait_until_gone()

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.supervisor.close()
        self.supervisor.close()
        self.rig.__exit__()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def at_end(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_whoever_dials_gets_a_device_in_a_process(nursery: Nursery) -> None:
    client = LoopClient(nursery.rig.loop, nursery.dial(), timeout=PATIENCE)
    wait(nursery.rig.loop, client.negotiated, PATIENCE)

    assert nursery.supervisor.pid is not None
    assert nursery.supervisor.starts == 1
    assert nursery.rig.server.client is not None
    assert nursery.rig.server.client.process.pid == nursery.supervisor.pid
    client.close()
    nursery.wait_until_gone()
    assert nursery.supervisor.ended == "exit status 0"
    assert nursery.present == [True, False]


def test_the_end_of_a_process_releases_everything_and_is_logged(
    nursery: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    nursery.dial()
    pid = nursery.supervisor.pid
    nursery.kill()

    assert nursery.rig.server.client is None
    assert nursery.present == [True, False]
    assert f"process {pid}, which served it, has ended: killed by SIGKILL" in caplog.text
    assert nursery.supervisor.starts == 1, "nobody has dialled"


def test_one_process_ends_before_another_starts(nursery: Nursery) -> None:
    nursery.dial()
    first = nursery.supervisor.pid
    nursery.rig.advance(5)
    nursery.dial()
    while nursery.supervisor.pid in {first, None}:
        nursery.rig.loop.turn(PATIENCE)

    assert nursery.present == [True, False, True]
    assert nursery.supervisor.ended == "killed by SIGKILL"


def test_starts_are_a_second_apart(nursery: Nursery) -> None:
    nursery.dial()
    nursery.kill()
    sock = nursery.dial()
    nursery.rig.advance(0.5)
    assert (nursery.supervisor.pid, nursery.supervisor.starts) == (None, 1)
    assert not at_end(sock)

    nursery.rig.advance(0.5)
    assert nursery.supervisor.pid is not None
    assert nursery.supervisor.starts == 2


def test_only_the_last_one_who_dialled_is_served(nursery: Nursery) -> None:
    nursery.dial()
    nursery.kill()
    first, second = nursery.dial(), nursery.dial()
    nursery.rig.advance(1)

    assert at_end(first)
    assert not at_end(second)
    assert nursery.supervisor.starts == 2


def test_a_close_starts_no_other(nursery: Nursery) -> None:
    nursery.dial()
    nursery.kill()
    sock = nursery.dial()
    nursery.supervisor.close()
    nursery.rig.advance(5)

    assert at_end(sock)
    assert nursery.supervisor.starts == 1


def test_a_host_without_processes_is_an_error_of_the_dial(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(BackendError, match="no process"):
        nursery.dial()
    assert nursery.present == [True, False]
    assert nursery.supervisor.starts == 0


def test_or_is_logged_when_it_comes_later(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nursery.dial()
    nursery.kill()
    nursery.dial()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    nursery.rig.advance(1)

    assert "no process" in caplog.text
    assert nursery.supervisor.pid is None


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_host_without_sockets_is_too(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    left = [pairs]
    real = socket.socketpair

    def socketpair(*args: int) -> tuple[socket.socket, socket.socket]:
        if not left[0]:
            raise OSError(errno.EMFILE, "too many")
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr(socket, "socketpair", socketpair)
    with pytest.raises(BackendError, match="no socket"):
        nursery.dial()
    assert nursery.supervisor.pid is None


def test_a_process_that_gets_no_memory_ends(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def admit(sock: socket.socket, process: PeerProcess) -> None:
        sock.close()
        process.close()
        raise PeerError(errno.EBUSY, "there is one")

    monkeypatch.setattr(nursery.rig.server, "admit", admit)
    nursery.dial()
    nursery.wait_until_gone()

    assert "gets no memory: there is one" in caplog.text
    assert nursery.supervisor.ended == "exit status 1"
