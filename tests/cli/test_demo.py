"""The demo as it is, once; and that it fails when something that it claims does not happen."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from viommu.cli import demo as demo_module
from viommu.cli.exit_codes import ExitCode
from viommu.cli.main import cli
from viommu.testing.edu_driver import EduDriver

if TYPE_CHECKING:
    from collections.abc import Callable

CHAPTERS = (
    "1. A server, and a guest that finds it",
    "2. PROBE",
    "3. Before ATTACH",
    "4. ATTACH and MAP",
    "5. Disk I/O",
    "6. Stray accesses",
    "7. UNMAP meets a DMA in flight",
    "8. DETACH",
)


@pytest.mark.slow
def test_everything_that_is_shown_happened() -> None:
    """In a process of its own, without a terminal, in ASCII, and no wider than usual."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "viommu.cli.main", "demo"],
        env=environment,
        capture_output=True,
        encoding="ascii",
        check=False,
    )

    assert (result.returncode, result.stderr) == (ExitCode.OK, "")
    found = [line for line in result.stdout.splitlines() if line.startswith("-- ")]
    assert [line.startswith(f"-- {title}") for line, title in zip(found, CHAPTERS, strict=True)]
    assert max(map(len, result.stdout.splitlines())) <= 80
    for shown in (
        "00:06.0 is endpoint 0x30",
        "equal, byte for byte",
        "refused: INVAL",
        "|%%%%%%%%%%%%| exported: 00:06.0 holds it",
        "|xxxxxxxxxxxx| reserved: interrupts (MSI)",
        "! 0xdead000 read blocked",
        "exit code 0, nothing is left",
        " claims verified in ",
    ):
        assert shown in result.stdout


def _demo() -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(cli, ["demo"])


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., None]], None]:
    """Play something else in place of a scene."""

    def replace(scene: str, function: Callable[..., None]) -> None:
        monkeypatch.setattr(demo_module._Scene, scene, function)

    return replace


@pytest.mark.slow
def test_a_claim_that_does_not_hold_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device says that a blocked access went well."""
    monkeypatch.setattr(EduDriver, "write_memory", lambda *_, **__: 0)

    result = _demo()

    assert result.exit_code == ExitCode.FAILURE
    assert "viommu: the demo failed: write 4 KiB at 0x" in result.stderr
    assert "the device sees an error" in result.stderr
    assert "claims verified" not in result.stdout


@pytest.mark.slow
def test_a_server_that_dies_is_a_failure(
    instead: Callable[[str, Callable[..., None]], None],
) -> None:
    def kill(scene: demo_module._Scene) -> None:
        scene._server.stop()

    instead("probe", kill)

    result = _demo()

    assert result.exit_code == ExitCode.FAILURE
    assert "viommu: the demo failed: " in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_server_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "EDU_AT", demo_module.IOMMU_AT)

    result = _demo()

    assert result.exit_code == ExitCode.FAILURE
    assert "the server ended before it was ready: viommu: PCI address 00:05.0" in result.stderr
