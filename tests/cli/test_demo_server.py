from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from viommu.cli import demo_server as module
from viommu.cli.demo_server import DemoServer
from viommu.cli.exit_codes import CliError

if TYPE_CHECKING:
    from pathlib import Path


def test_it_is_ready_answers_and_ends(tmp_path: Path) -> None:
    with DemoServer(tmp_path / "run", ["--endpoint", "00:06.0=edu"]) as server:
        pid = server.start()
        assert pid != os.getpid()
        assert server.snapshot()["pid"] == pid
        assert server.log == ""
        assert server.stop() == 0

    assert not (tmp_path / "run").exists()


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    with DemoServer(tmp_path / "run", []) as server:
        pid = server.start()
        os.kill(pid, 0)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        DemoServer(tmp_path / "run", ["--iommu", "00:1f.0"]) as server,
        pytest.raises(CliError, match=r"ended before it was ready: viommu: PCI address 00:1f\.0"),
    ):
        server.start()


def test_one_that_was_never_started_needs_no_end(tmp_path: Path) -> None:
    with DemoServer(tmp_path / "run", []):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


def test_one_that_takes_for_ever_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    with DemoServer(tmp_path / "run", []) as server, pytest.raises(CliError, match="no reason"):
        server.start()
