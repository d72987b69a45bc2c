"""Who is at the other end, and the end of that process."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, cast

import pytest

from viommu.errors import PeerError
from viommu.ipc import peer
from viommu.ipc.peer import PeerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONNECT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its stdin does."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


class Caller:
    """A process that connects to us."""

    def __init__(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", CONNECT, str(path)], stdin=subprocess.PIPE
            )
            self.socket, _ = listener.accept()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.socket.close()


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    caller = Caller(tmp_path / "s")
    yield caller
    caller.close()


def ended(process: PeerProcess, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])


def test_a_child_is_killed_and_its_end_is_seen(child: subprocess.Popen[bytes]) -> None:
    process = PeerProcess.of_child(child.pid)
    assert (process.pid, process.uid) == (child.pid, os.geteuid())
    assert str(process) == f"process {child.pid}"
    assert not ended(process, 0)

    assert process.kill()
    assert ended(process, 30)
    child.wait()
    assert process.kill()  # it has ended already
    process.close()
    process.close()
    assert process.fileno() == -1
    assert not process.kill()


def test_a_process_that_is_not_ours_to_kill(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pidfd: int, _number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    process = PeerProcess.of_child(child.pid)
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    assert not process.can_be_killed()
    assert not process.kill()
    process.close()


@pytest.mark.parametrize(("number", "gone"), [(errno.ESRCH, True), (errno.EMFILE, False)])
def test_what_a_kernel_that_knows_pidfds_of_peers_may_answer(number: int, gone: bool) -> None:
    class Socket:
        def getsockopt(self, _level: int, option: int, size: int = 0) -> bytes:
            if option == socket.SO_PEERCRED:
                return struct.pack("=iII", 4711, os.geteuid(), 0)
            raise OSError(number, os.strerror(number))

    sock = cast("socket.socket", Socket())
    if gone:
        with pytest.raises(PeerError, match="process 4711 is gone"):
            PeerProcess.of_socket(sock)
    else:
        assert PeerProcess.of_socket(sock).fileno() == -1


def test_the_process_that_connected_is_found(caller: Caller) -> None:
    process = PeerProcess.of_socket(caller.socket)

    assert (process.pid, process.uid) == (caller.process.pid, os.geteuid())
    assert process.kill()
    assert ended(process, 30)
    process.close()


def test_a_kernel_that_does_not_know_pidfds_of_peers(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "_SO_PEERPIDFD", 0x7FFF)
    process = PeerProcess.of_socket(caller.socket)
    assert process.kill()
    assert ended(process, 30)
    process.close()

    # The number alone proves nothing when its owner may be gone.
    caller.process.wait()
    with pytest.raises(PeerError, match="is gone") as caught:
        PeerProcess.of_socket(caller.socket)
    assert caught.value.errno == errno.ESRCH


def test_a_process_that_can_not_be_told_has_no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pidfd(pid: int) -> int:
        raise OSError(errno.ESRCH, f"{pid} is of another namespace")

    monkeypatch.setattr(peer, "_SO_PEERPIDFD", 0x7FFF)
    monkeypatch.setattr(os, "pidfd_open", no_pidfd)
    one, other = socket.socketpair()
    assert PeerProcess.of_socket(one).fileno() == -1
    one.close()
    other.close()


def test_a_process_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = os.geteuid()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other,
    ):
        listener.bind("")  # Linux gives it a name that is in no directory
        listener.listen()
        if ours:
            monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
        else:
            os.seteuid(65534)  # what counts is who connects
        try:
            other.connect(listener.getsockname())
        finally:
            os.seteuid(ours)
        sock, _ = listener.accept()
        with sock, pytest.raises(PeerError, match="is of user") as caught:
            PeerProcess.of_socket(sock)
    assert caught.value.errno == errno.EPERM


def test_root_is_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("needs a client that is root")
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    one, other = socket.socketpair()
    with one, other:
        process = PeerProcess.of_socket(one)
        assert process.uid == 0
        process.close()
