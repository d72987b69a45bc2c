"""`viommu device` as a process of its own: what it prints, serves and removes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.endpoints.background_client import BackgroundClient
from viommu.cli.exit_codes import ExitCode
from viommu.cli.main import cli
from viommu.endpoints.edu_registers import Result
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import GuestRam

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096


class Device:
    """`viommu device edu` on a socket, up to and including its line `ready`."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path
        command = [sys.executable, "-m", "viommu.cli.main", "device", "edu", "--socket", str(path)]
        command += options
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "edu.sock")
    yield device
    if device.process.poll() is None:
        device.end(signal.SIGKILL)


def test_what_is_served_is_printed(device: Device) -> None:
    assert device.lines[-1] == "ready"
    printed = "\n".join(device.lines)
    for chosen in ("edu", str(device.path), "no IOMMU", "messages", "share=on"):
        assert chosen in printed
    argument = printed.partition("-device '")[2].partition("'")[0]
    assert json.loads(argument) == {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": str(device.path)},
    }


@pytest.mark.parametrize("shared", [True, False])
def test_one_client_after_the_other_is_served(device: Device, shared: bool) -> None:
    for _ in range(2):
        with GuestRam(PAGE) as ram:
            client = BackgroundClient(device.path, ram.memory)
            client.dma_map(0, PAGE, fd=ram._fd if shared else None)
            with EduDriver(client) as edu:
                ram.memory.write(0, b"data")
                assert edu.read_memory(0, 4) == Result.OK
                assert edu.write_memory(8, 4) == Result.OK
                assert ram.memory.read(8, 4) == b"data"
                assert edu.write_memory(PAGE, 4) == Result.TRANSLATION_FAULT
            client.close()
    code, out, err = device.end(signal.SIGTERM)
    assert (code, out) == (ExitCode.OK, "")
    assert "write at IOVA 0x1000 faulted" in err


def test_its_state_can_be_asked_for(tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    device = Device(tmp_path / "edu.sock", "--control", str(control))
    client = BackgroundClient(device.path)
    client.dma_map(0x10000, PAGE, writable=False)
    assert f"viommu inspect {control}" in "\n".join(device.lines)

    shown = CliRunner().invoke(cli, ["inspect", str(control)])
    assert shown.exit_code == ExitCode.OK, shown.output
    assert "by messages" in shown.output
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(control), "--json"]).output)
    assert found["maps"] == [[0x10000, PAGE, None, "r-"]]

    client.close()
    device.end(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
    gone = CliRunner().invoke(cli, ["inspect", str(tmp_path)])
    assert gone.exit_code == ExitCode.FAILURE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_removes_the_socket(device: Device, number: signal.Signals) -> None:
    client = BackgroundClient(device.path)
    assert device.end(number) == (ExitCode.OK, "", "")
    assert not device.path.exists()
    client.close()


def test_a_killed_one_is_followed(device: Device) -> None:
    device.end(signal.SIGKILL)
    assert device.path.exists()
    again = Device(device.path)
    assert again.end(signal.SIGTERM) == (ExitCode.OK, "", "")
    assert not device.path.exists()


def test_a_second_one_is_refused(device: Device) -> None:
    result = CliRunner().invoke(cli, ["device", "edu", "--socket", str(device.path)])
    assert result.exit_code == ExitCode.USAGE
    assert "another process does" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toaster", "--socket", "x"], "no endpoint is called 'toaster'"),
        (["blk", "--socket", "x"], "blk needs path="),
        (["blk,path=/no/such", "--socket", "x"], "/no/such"),
        (["edu"], "--socket"),
        (["--socket", "x"], "KIND"),
        (["edu", "--socket", "no/such/x"], "its directory does not exist"),
        (["edu", "--socket", "d" * 200], "shorter path"),
        (["nowhere:KIND", "--socket", "x"], "is it on PYTHONPATH?"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_served(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["device", *arguments])

    assert result.exit_code == ExitCode.USAGE, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
