"""`viommu run` with programs that play QEMU: which arguments they get, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from viommu.cli.exit_codes import ExitCode
from viommu.cli.main import cli
from viommu.cli.run import guest_arguments

if TYPE_CHECKING:
    from pathlib import Path

# Answers as QEMU does, then does what $SCRIPT says with QEMU's arguments.
QEMU = """#!/bin/sh
case "$*" in
--version) echo 'QEMU emulator version 11.1.3' ; exit 0 ;;
"-device vfio-user-pci,help") echo 'vfio-user-pci options:'; exit 0 ;;
esac
eval "$SCRIPT"
"""


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.write_text(QEMU)
    path.chmod(0o755)
    (tmp_path / "vmlinuz").touch()
    (tmp_path / "initrd").touch()
    return path


def arguments(qemu: Path, *more: str) -> list[str]:
    kernel, initrd = qemu.parent / "vmlinuz", qemu.parent / "initrd"
    command = ["run", "--qemu", str(qemu), "--kernel", str(kernel), "--initrd", str(initrd)]
    return [*command, "--dir", str(qemu.parent / "run"), *more]


def viommu_run(qemu: Path, script: str, *more: str) -> Result:
    return CliRunner(env={"SCRIPT": script}).invoke(cli, arguments(qemu, *more))


def test_qemu_is_told_everything(qemu: Path) -> None:
    told = qemu.parent / "told"
    result = viommu_run(
        qemu,
        f'printf "%s\\n" "$@" > {told}; cp {qemu.parent}/run/qemu.args {qemu.parent}/args',
        *("--endpoint", "00:06.0=edu", "--mem", "1G", "--smp", "2", "--append", "quiet"),
        *("--", "-device", "virtio-rng-pci"),
    )

    assert result.exit_code == ExitCode.OK, result.stderr
    lines = told.read_text().splitlines()
    written = (qemu.parent / "args").read_text().splitlines()
    assert lines[: len(written)] == written
    assert lines[len(written) :] == [
        *("-accel", "tcg", "-smp", "2", "-no-user-config", "-nodefaults"),
        *("-display", "none", "-serial", "mon:stdio"),
        *("-kernel", str(qemu.parent / "vmlinuz"), "-initrd", str(qemu.parent / "initrd")),
        *("-append", "quiet console=ttyS0", "-device", "virtio-rng-pci"),
    ]
    assert "memory-backend-memfd,id=mem,size=1G,share=on" in written
    assert [json.loads(line)["addr"] for line in written if line.startswith("{")] == ["5.0", "6.0"]
    assert "QEMU 11.1.3" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("append", "expected"),
    [("", "console=ttyS0"), ("console=hvc0 quiet", "console=hvc0 quiet")],
)
def test_a_console_unless_there_is_one(append: str, expected: str, tmp_path: Path) -> None:
    found = guest_arguments(tmp_path, None, append, smp=1, accel="kvm")

    assert found[-2:] == ["-append", expected]
    assert found[:2] == ["-accel", "kvm"]
    assert "-initrd" not in found


@pytest.mark.parametrize(("script", "code"), [("exit 33", 33), ("kill -ABRT $$", 134)])
def test_its_exit_code_is_passed_on(script: str, code: int, qemu: Path) -> None:
    result = viommu_run(qemu, script)

    assert result.exit_code == code
    assert f"viommu: QEMU ended with exit code {code}\n" in result.stderr


def test_nothing_is_left(qemu: Path) -> None:
    before = sorted(qemu.parent.iterdir())
    viommu_run(qemu, "true")

    assert sorted(qemu.parent.iterdir()) == before


def test_a_signal_ends_qemu_and_the_server(qemu: Path) -> None:
    script = "trap 'exit 5' TERM; echo running; while :; do sleep 0.01; done"
    with subprocess.Popen(
        [sys.executable, "-m", "viommu.cli.main", *arguments(qemu)],
        env={**os.environ, "SCRIPT": script},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 5

    assert not (qemu.parent / "run").exists()


def test_an_unsuitable_qemu(qemu: Path) -> None:
    qemu.write_text(QEMU.replace("11.1.3", "7.2.0"))

    result = viommu_run(qemu, "true")

    assert result.exit_code == ExitCode.HOST
    assert "is QEMU 7.2.0 and 10.1.1 or newer is needed" in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_kernel() -> None:
    result = CliRunner().invoke(cli, ["run", "--kernel", "/no/such"])

    assert result.exit_code == ExitCode.USAGE
    assert "'/no/such' does not exist" in result.stderr
