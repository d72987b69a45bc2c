"""`viommu serve` as a process of its own: what it makes, prints and removes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from viommu.cli.exit_codes import ExitCode
from viommu.cli.main import cli
from viommu.control import SOCKET_NAME, ControlClient
from viommu.vmm import Bdf, build_viot, qemu_arguments, socket_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IOMMU, EDU, BLK = Bdf(0, 5, 0), Bdf(0, 6, 0), Bdf(0, 7, 0)


class Server:
    """`viommu serve` in ``directory``, up to and including its line `ready`."""

    def __init__(self, directory: Path, disk: Path) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "viommu.cli.main", "serve", "--dir", str(directory)),
                *("--mem", "512M", "--iommu", "00:05.0", "--endpoint", "00:06.0=edu"),
                *("--endpoint", f"00:07.0=blk,path={disk}", "--page-sizes", "4K,2M"),
                *("--aw-bits", "39", "--limit", "domains=17"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line == "ready\n":
                break

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate()
        return self.process.returncode, out, err


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "d"


@pytest.fixture
def server(directory: Path, disk: Path) -> Iterator[Server]:
    server = Server(directory, disk)
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_there_when_it_is_ready(server: Server, directory: Path, disk: Path) -> None:
    sockets = {bdf: directory / socket_name(bdf) for bdf in (IOMMU, EDU, BLK)}
    assert names(directory) == [
        *(path.name for path in sockets.values()),
        "control.sock",
        "qemu.args",
        "viommu.pid",
        "viot.aml",
    ]
    assert (directory / "viot.aml").read_bytes() == build_viot(IOMMU, [EDU, BLK])
    assert (directory / "qemu.args").read_text().splitlines() == qemu_arguments(
        sockets, directory / "viot.aml", 512 << 20, blocked_at_boot=True
    )
    for path in sockets.values():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    with ControlClient(directory / SOCKET_NAME) as control:
        snapshot = control.snapshot()
    assert snapshot["pid"] == server.process.pid
    assert snapshot["directory"] == str(directory)

    assert server.lines[-1] == "ready"
    printed = "\n".join(server.lines)
    for chosen in (
        "00:05.0",
        "edu",
        f"blk,path={disk}",
        "512M",
        "0x201000",
        "0x8000000000",
        "blocked",
        "EVENT_IDX",
        "domains 17",
        "polling",
    ):
        assert chosen in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(
    number: signal.Signals, server: Server, directory: Path
) -> None:
    assert server.end(number) == (ExitCode.OK, "", "")
    assert not directory.exists()


def test_a_second_one_is_refused_and_a_killed_one_is_followed(
    server: Server, directory: Path, disk: Path
) -> None:
    second = CliRunner().invoke(cli, ["serve", "--dir", str(directory)])
    assert second.exit_code == ExitCode.FAILURE
    assert f"is used by a running server (process {server.process.pid})" in second.stderr
    with ControlClient(directory / SOCKET_NAME) as control:
        assert control.snapshot()["pid"] == server.process.pid

    server.end(signal.SIGKILL)
    assert "00:07.0.sock" in names(directory)

    third = Server(directory, disk)
    assert third.lines[-1] == "ready"
    assert third.end(signal.SIGTERM) == (ExitCode.OK, "", "")
    assert not directory.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--iommu", "00:1f.0"], ExitCode.USAGE, "q35 has the LPC"),
        (["--endpoint", "00:05.0=edu"], ExitCode.USAGE, "both the IOMMU and an endpoint"),
        (["--endpoint", "00:06.0"], ExitCode.USAGE, "is not an endpoint"),
        (["--endpoint", "00:06.0=toaster"], ExitCode.USAGE, "toaster"),
        (["--endpoint", "00:06.0=blk,path=/no/such"], ExitCode.USAGE, "/no/such"),
        (["--mem", "3K"], ExitCode.USAGE, "guest memory of 3072 bytes"),
        (["--mem", "lots"], ExitCode.USAGE, "'lots' is not a size"),
        (["--page-sizes", "5K"], ExitCode.USAGE, "not a power of two"),
        (["--aw-bits", "65"], ExitCode.USAGE, "65 is not in the range"),
        (["--limit", "cookies=1"], ExitCode.USAGE, "there is no limit 'cookies'"),
        (["--limit", "domains=0"], ExitCode.USAGE, "domains must be positive"),
        (["--limit", "domains"], ExitCode.USAGE, "is not a limit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served(
    arguments: list[str], code: ExitCode, message: str, directory: Path
) -> None:
    result = CliRunner().invoke(cli, ["serve", "--dir", str(directory), *arguments])

    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not directory.exists()


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("d" * 120, ExitCode.USAGE, "choose a shorter one"),
        ("a:b", ExitCode.USAGE, "choose one without a colon"),
        ("no/such", ExitCode.FAILURE, "can't be used"),
    ],
)
def test_where_nothing_can_be_served(
    name: str, code: ExitCode, message: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli, ["serve", "--dir", str(tmp_path / name)])

    assert result.exit_code == code
    assert message in result.stderr
