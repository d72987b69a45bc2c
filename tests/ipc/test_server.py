"""The door: one client at a time, of the right user, and gone from the directory afterwards."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import PAGE, RawClient, Rig, make_rig, me
from viommu.errors import PeerError, UsageError
from viommu.ipc.hold import HoldPolicy, Measure
from viommu.ipc.peer import PeerProcess
from viommu.ipc.server import ExportServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Rig]:
    with make_rig(tmp_path / "door") as rig:
        yield rig


def test_it_listens_until_it_is_closed(door: Rig) -> None:
    path = door.server.path
    assert path is not None
    assert path.is_socket()
    assert path.stat().st_mode & 0o777 == 0o600
    client = door.dial()
    door.server.close()
    door.server.close()

    assert not path.exists()
    assert client.cut_off


def test_the_process_is_known(door: Rig) -> None:
    door.dial()

    assert door.server.client is not None
    assert door.server.client.process.pid == os.getpid()


def test_one_client_at_a_time(door: Rig, caplog: pytest.LogCaptureFixture) -> None:
    first = door.dial()
    second = door.dial(greet=False)

    assert second.cut_off
    assert not first.cut_off
    assert (door.server.clients, door.server.turned_away) == (1, 1)
    assert f"process {os.getpid()} is the client here" in caplog.text
    first.close()
    assert not door.dial().cut_off
    assert door.gone == ["closed by the client"]


def test_a_client_that_has_hung_up_gives_way(door: Rig) -> None:
    first = door.dial()
    first.start().close()
    first.export(0x10000, PAGE)
    first.socket.close()  # the server has not looked yet
    second = door.dial()

    assert not second.cut_off
    assert door.mapper.exports.total == 0


def test_one_that_has_not_let_go_does_not(door: Rig) -> None:
    first = door.dial()
    first.start().close()
    first.export(0x10000, PAGE)
    first.send(b"nonsense")

    assert door.dial(greet=False).cut_off
    first.socket.close()
    assert not door.dial().cut_off


def test_another_user_is_turned_away(door: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_socket(sock: socket.socket) -> PeerProcess:
        raise PeerError(errno.EPERM, f"{sock} is of user 4711")

    monkeypatch.setattr(PeerProcess, "of_socket", of_socket)
    assert door.dial(greet=False).cut_off
    assert (door.server.clients, door.server.turned_away) == (0, 1)


def test_turning_away_does_not_fill_the_log(door: Rig, caplog: pytest.LogCaptureFixture) -> None:
    door.dial()
    for _ in range(50):
        door.dial(greet=False).close()

    assert door.server.turned_away == 50
    assert len(caplog.messages) == 16


def test_a_client_that_could_not_be_killed_is_not_admitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_pidfd: int, _number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with Rig(policy=HoldPolicy(8, Measure.KILL)) as rig:
        with pytest.raises(PeerError, match="could not be killed") as caught:
            rig.connect(me())
        assert caught.value.errno == errno.EPERM
        with monkeypatch.context() as roots:
            roots.setattr(signal, "pidfd_send_signal", refuse)
            with pytest.raises(PeerError, match="could not be killed"):
                rig.connect(PeerProcess.of_child(os.getpid()))
        rig.connect(PeerProcess.of_child(os.getpid()))


def test_admission_needs_no_path(rig: Rig) -> None:
    rig.connect()
    with pytest.raises(PeerError, match="is the client here"):
        rig.connect()
    assert rig.server.path is None


def test_a_path_that_is_taken(door: Rig) -> None:
    with pytest.raises(UsageError, match="another process does"):
        ExportServer(
            door.loop,
            "00:0a.0",
            door.mapper,
            door.memory,
            door.faults.append,
            path=door.server.path,
        )


def test_without_file_descriptors_clients_wait(door: Rig, caplog: pytest.LogCaptureFixture) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        sock.connect(str(door.server.path))
        door.turn()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "can't accept a client" in caplog.text
    assert len(caplog.messages) == 1  # it does not try at once, again and again
    door.advance(0.1)
    client = RawClient(door.loop, sock)
    assert not client.cut_off
    client.close()


def test_a_door_that_is_closed_does_not_look_again(door: Rig) -> None:
    door.server._accept()  # nobody is there
    door.server.close()
    door.server._accept()


def test_the_description_is_for_json(door: Rig) -> None:
    nobody = door.server.describe()
    assert nobody["client"] is None
    assert nobody["policy"] == "wait on, and log it every 8 s"
    client = door.dial()
    client.start().close()
    client.export(0x10000, PAGE)
    client.export(0x90000, PAGE)
    client.release(0x10000, PAGE)
    described = door.server.describe()

    assert described["socket"] == str(door.server.path)
    assert isinstance(described["client"], dict)
    assert described["counters"] == {
        "clients": 1,
        "turned away": 0,
        "exports": 1,
        "releases": 1,
        "refused": 1,
        "fault reports": 0,
        "fault reports dropped": 0,
    }
