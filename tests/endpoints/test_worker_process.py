from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import viommu
from viommu.endpoints import worker_process
from viommu.endpoints.worker_process import WorkerOrder, WorkerProcess, how_it_ended
from viommu.errors import BackendError
from viommu.ipc.peer import PeerProcess
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60  # seconds until a test that waits for a process fails


class Nursery:
    """A loop, and our ends of what a worker gets."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.ended: list[str] = []
        self.device, self._device = socket.socketpair()
        self.exports, self._exports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self) -> WorkerProcess:
        return WorkerProcess(
            self.loop,
            "00:06.0",
            "edu",
            self._device,
            self._exports,
            on_exit=self.ended.append,
        )

    def wait(self) -> None:
        while not self.ended:
            self.loop.turn(PATIENCE)

    def close(self) -> None:
        for sock in (self.device, self._device, self.exports, self._exports):
            sock.close()
        self.loop.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def test_an_order_is_read_as_it_was_written() -> None:
    order = WorkerOrder("00:07.0", "blk,path=a,,b c", 5, 6, 4711, 30)

    assert WorkerOrder.parse(order.arguments()) == order


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit status 0"), (3, "exit status 3"), (-9, "killed by SIGKILL"), (-63, "signal 63")],
)
def test_how_a_process_ended_can_be_said(code: int, words: str) -> None:
    assert how_it_ended(code).endswith(words)


def test_its_sockets_are_its_own(nursery: Nursery) -> None:
    worker = nursery.start()
    assert (nursery._device.fileno(), nursery._exports.fileno()) == (-1, -1)
    assert worker.pid == worker.peer.pid

    nursery.exports.close()  # there is no server for it
    nursery.wait()
    assert nursery.ended == ["exit status 1"]
    assert nursery.device.recv(1) == b""
    worker.close()
    worker.kill()


def test_one_that_is_killed_tells_how_it_ended(nursery: Nursery) -> None:
    nursery.start().kill()
    nursery.wait()

    assert nursery.ended == ["killed by SIGKILL"]


def test_one_that_nobody_needs_ends_by_itself(nursery: Nursery) -> None:
    worker = nursery.start()
    nursery.exports.close()
    nursery.device.close()
    worker.close()

    assert nursery.ended == []
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_or_is_killed(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_GRACE", 0)
    worker = nursery.start()
    worker.close()  # it waits for what the server has to say

    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_without_a_program_there_is_no_process(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(BackendError, match=r"00:06\.0: no process for it"):
        nursery.start()
    assert nursery.device.recv(1) == b""


def test_one_that_can_not_be_watched_is_not_left_behind(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def refuse(pid: int) -> PeerProcess:
        seen.append(pid)
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(PeerProcess, "of_child", refuse)
    with pytest.raises(BackendError, match=r"00:06\.0: no process for it"):
        nursery.start()
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_it_runs_the_code_that_we_are(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    first, *rest = worker_process._environment()["PYTHONPATH"].split(os.pathsep)

    assert (Path(first) / "viommu" / "__init__.py").samefile(viommu.__file__)
    assert rest == ([] if before is None else [before])
