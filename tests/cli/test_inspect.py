"""`viommu inspect` against a real control socket that is served by a thread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from tests.cli.test_snapshot_view import SNAPSHOT
from viommu.cli.exit_codes import ExitCode
from viommu.cli.main import cli
from viommu.control import SOCKET_NAME, ControlServer
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Served(threading.Thread):
    """Answers looks in ``directory`` with ``snapshot``; ends after ``looks`` of them."""

    def __init__(self, directory: Path, looks: int | None = None) -> None:
        super().__init__()
        self.snapshot: dict[str, Any] = dict(SNAPSHOT)
        self.left = looks
        self.loop = Loop()
        self.server = ControlServer(self.loop, directory / SOCKET_NAME, self.look)
        self.reader, self.writer = os.pipe()
        self.loop.on_readable(self.reader, self.loop.stop)
        self.start()

    def look(self) -> dict[str, object]:
        if self.left is not None:
            if not self.left:
                self.loop.call_soon(self.loop.stop)
            self.left -= 1
        return self.snapshot

    def run(self) -> None:
        self.loop.run()
        self.server.close()

    def end(self) -> None:
        os.write(self.writer, b".")
        self.join()
        self.loop.close()
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.end()


def inspect(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli, ["inspect", *map(str, arguments)])


def test_tables(served: Served, tmp_path: Path) -> None:
    result = inspect(tmp_path)

    assert result.exit_code == ExitCode.OK
    assert "viommu 1.2.3, process 4711" in result.stdout
    assert "00:07.0  0x38  away" in result.stdout


def test_json(served: Served, tmp_path: Path) -> None:
    result = inspect(tmp_path, "--json")

    assert result.exit_code == ExitCode.OK
    assert json.loads(result.stdout) == SNAPSHOT


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "no server answers"), (["--json"], "no server answers")]
)
def test_nobody_is_there(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = inspect(tmp_path, *arguments)

    assert result.exit_code == ExitCode.FAILURE
    assert result.stderr == (
        f"viommu: no server answers in {tmp_path} (No such file or directory): "
        f"start one with `viommu serve --dir {tmp_path}`\n"
    )


def test_no_directory(tmp_path: Path) -> None:
    assert inspect(tmp_path / "no").exit_code == ExitCode.USAGE


def test_a_server_of_another_version(served: Served, tmp_path: Path) -> None:
    served.snapshot = {"version": "9.9"}

    result = inspect(tmp_path)

    assert result.exit_code == ExitCode.FAILURE
    assert "the server is viommu 9.9 and this is" in result.stderr


@pytest.mark.parametrize("arguments", [["--json"], []], ids=["json", "tables"])
def test_watching_ends_with_the_server(arguments: list[str], tmp_path: Path) -> None:
    served = Served(tmp_path, looks=2)

    result = inspect(tmp_path, "--watch", "--interval", "0.05", *arguments)
    served.end()

    assert result.exit_code == ExitCode.FAILURE
    assert "the server at" in result.stderr
    assert result.stdout.count("1.2.3") == 3


def test_watching_ends_with_an_interrupt(served: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "viommu.cli.main", "inspect", str(tmp_path), "--watch"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == SNAPSHOT
        process.send_signal(signal.SIGINT)
        assert process.wait() == ExitCode.OK
