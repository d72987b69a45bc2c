from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from viommu.cli.process_view import export_sessions, remote_devices

if TYPE_CHECKING:
    from rich.console import RenderableType


def shown(table: RenderableType) -> list[str]:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def with_door(client: dict[str, Any] | None, socket: str | None = None) -> list[str]:
    exports = {"socket": socket, "policy": "wait on, and log it every 8 s", "client": client}
    return shown(export_sessions([{"bdf": "00:07.0", "exports": exports}]))


CLIENT: dict[str, Any] = {
    "pid": 99,
    "uid": 1000,
    "connected": 7300.0,
    "session": "faulted",
    "exports": 3,
    "bytes": 8292,
    "holds": [[0x1000, 4096, 2, 3.5], [0x8000, 100, 1, 0.25]],
    "waited for": 3.25,
    "killed": False,
}


def test_who_holds_what_since_when_is_shown() -> None:
    lines = with_door(CLIENT, "/run/v/00:07.0.export.sock")

    assert (
        "00:07.0 99 1000 2 h faulted 0x1000 4 KiB x2 3.50 s 3.25 s wait on, and log it every 8 s"
        " /run/v/00:07.0.export.sock"
    ) in lines
    assert "0x8000 100 bytes 0.25 s" in lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"waited for": None, "holds": [], "exports": 0}, "00:07.0 99 1000 2 h faulted - - wait"),
        ({"connected": 40.0, "killed": True}, "00:07.0 99 1000 40 s killed 0x1000"),
        ({"connected": 600.0}, "00:07.0 99 1000 10 min faulted"),
        ({"exports": 70_000}, "and 69997 more"),
    ],
)
def test_what_a_client_is_doing_is_said(change: dict[str, Any], said: str) -> None:
    lines = with_door(CLIENT | change)

    assert any(line.startswith(said) for line in lines), lines


def test_a_door_that_nobody_uses_is_shown() -> None:
    assert "00:07.0 - wait on, and log it every 8 s a pair" in with_door(None)


REMOTE: dict[str, Any] = {
    "socket": "/tmp/a.sock",
    "process": 4711,
    "state": "alive",
    "memory": "shared",
    "protocol": "IOAS",
    "maps": [[0x1000, 4096, 0x8000, "rw"]],
    "maps in all": 300,
    "unanswered": 2,
}
DEAD = {
    "state": "dead",
    "dead": {"why": "gone", "since": "2026-01-02T03:04:05+00:00"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "00:08.0 4711 alive shared IOAS 300 2 /tmp/a.sock"),
        (
            {"memory": "message", "protocol": "DMA_MAP"},
            "00:08.0 4711 alive by messages DMA_MAP 300 2 /tmp/a.sock",
        ),
        (
            DEAD,
            "00:08.0 - dead shared IOAS 300 2 /tmp/a.sock 2026-01-02T03:04:05+00:00, gone",
        ),
        ({"process": None}, "00:08.0 - alive shared IOAS 300 2 /tmp/a.sock"),
    ],
)
def test_what_becomes_of_a_device_of_somebody_else(change: dict[str, Any], said: str) -> None:
    assert said in shown(remote_devices([{"bdf": "00:08.0", "device": REMOTE | change}]))


@pytest.mark.parametrize(
    ("device", "pid", "said"),
    [
        ({"state": "alive"}, 99, "00:07.0 99 alive shared export session - - a pair"),
        (DEAD, None, "00:07.0 - dead shared export session - - a pair 2026-01-02T03:04:05+00:00,"),
    ],
)
def test_a_process_of_our_own_is_one_too(
    device: dict[str, Any], pid: int | None, said: str
) -> None:
    endpoint = {"bdf": "00:07.0", "device": device, "process": {"pid": pid}}
    assert any(line.startswith(said) for line in shown(remote_devices([endpoint])))


def test_without_other_processes_nothing_is_shown() -> None:
    assert shown(remote_devices([{"bdf": "00:06.0"}])) == [""]
    assert shown(export_sessions([{"bdf": "00:06.0"}])) == [""]
