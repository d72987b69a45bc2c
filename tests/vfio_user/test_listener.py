from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from typing import TYPE_CHECKING

import pytest

from viommu.errors import UsageError
from viommu.loop import Loop
from viommu.vfio_user.listener import Listener

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_path_is_for_this_user_only(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        listener = Listener(tmp_path / "s")
    finally:
        os.umask(before)
    status = (tmp_path / "s").lstat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    listener.close()
    assert not (tmp_path / "s").exists()
    listener.close()


def test_what_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(os.fspath(path))
    dead.listen()
    dead.close()
    listener = Listener(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
    listener.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_living_server_is_left_alone(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "s"
    first = Listener(path, kind)
    with pytest.raises(UsageError, match=r"s: another process does; stop it"):
        Listener(path, kind)
    assert path.exists()
    first.close()


def test_a_busy_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(os.fspath(path))
        busy.listen(0)
        waiting.connect(os.fspath(path))
        with pytest.raises(UsageError, match="another process"):
            Listener(path)


def test_anything_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        Listener(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing/s", "directory does not exist"), ("s" * 200, "shorter path"), ("", "not a socket")],
)
def test_what_is_wrong_with_a_path_is_said(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Listener(tmp_path / name)


def test_any_other_reason_is_said_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Not a directory"):
        Listener(tmp_path / "file" / "s")


def test_a_path_that_became_another_s_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = Listener(path)
    path.unlink()
    second = Listener(path)
    first.close()
    assert path.exists()
    path.unlink()
    second.close()


@pytest.mark.parametrize("closed", [False, True])
def test_a_client_waits_for_resources_unless_its_server_ends(tmp_path: Path, closed: bool) -> None:
    now = [0.0]
    loop = Loop(lambda: now[0])
    listener = Listener(tmp_path / "s")
    calls: list[str] = []
    assert listener.accept(loop, lambda: calls.append("again")) is None, "nobody is there"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(listener.path))
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many") as refusal:
                listener.accept(loop, lambda: calls.append("again"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert refusal.value.errno == errno.EMFILE
        loop.turn(0)
        assert calls == [], "it is not looked for at once"
        if closed:
            listener.close()
        now[0] = 1.0
        loop.turn(0)
        loop.turn(0)
        assert bool(calls) is not closed
        accepted = listener.accept(loop, lambda: None)
        assert (accepted is None) is closed
        if accepted is not None:
            accepted.close()
            loop.forget(listener)
    listener.close()
    loop.close()
