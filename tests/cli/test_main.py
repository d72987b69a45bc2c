"""The command as a whole: help, errors in one sentence, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from viommu import __version__
from viommu.cli import main as main_module
from viommu.cli.exit_codes import EXIT_CODES, ExitCode
from viommu.cli.main import COMMANDS, cli
from viommu.errors import InternalError, PeerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


def test_help_lists_every_command_and_every_exit_code() -> None:
    result = CliRunner().invoke(cli, ["--help"])

    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}\n" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])

    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cli {name} ")
    assert result.stderr == ""


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"viommu {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense' (see `cli --help`)"),
        (["viot", "--nonsense"], "No such option '--nonsense' (see `cli viot --help`)"),
        (["viot", "--iommu", "5"], "'--iommu': '5' is not a PCI address"),
        (["viot", "--iommu", "00:00.0"], "q35 has the host bridge there"),
        (["viot", "--endpoint", "00:05.0"], "give either --iommu"),
    ],
)
def test_usage_errors_are_one_sentence_on_stderr(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, arguments)

    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("viommu: ")
    assert result.stderr.count("\n") == 1


def test_no_command_is_a_question_for_help() -> None:
    result = CliRunner().invoke(cli, [])

    assert result.exit_code == ExitCode.USAGE
    assert "Commands:" in result.stderr


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let `viommu viot` raise something."""

    def fail_with(error: BaseException) -> None:
        @click.command("viot")
        def viot() -> None:
            raise error

        monkeypatch.setattr("viommu.cli.viot.viot", viot)

    return fail_with


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PeerError(5, "it broke: mend it"), ExitCode.FAILURE),
        (UsageError("it broke: mend it"), ExitCode.USAGE),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=repr,
)
def test_expected_errors_have_no_traceback(
    error: BaseException, code: ExitCode, failing: Callable[[BaseException], None]
) -> None:
    failing(error)

    result = CliRunner().invoke(cli, ["viot"])

    assert result.exit_code == code
    assert result.stderr.strip() in {"viommu: it broke: mend it", ""}


@pytest.mark.parametrize("error", [InternalError("void"), ZeroDivisionError("void")], ids=repr)
def test_a_bug_is_a_traceback_and_a_request_to_report_it(
    error: Exception,
    failing: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    monkeypatch.setattr(sys, "argv", ["viommu", "viot"])

    with pytest.raises(SystemExit) as caught:
        main_module.main()

    assert caught.value.code == ExitCode.BUG
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "please report it" in captured.err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "viommu.cli.viot", raising=False)
    monkeypatch.setitem(sys.modules, "rich.table", None)

    result = CliRunner().invoke(cli, ["viot"])

    assert result.exit_code == ExitCode.HOST
    assert "the Python package 'rich.table' is not installed" in result.stderr


@pytest.mark.parametrize("command", [["--help"], ["viot", "--iommu", "00:05.0"]], ids=" ".join)
def test_a_reader_that_has_seen_enough(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "viommu.cli.main", *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)

    assert (result.returncode, result.stderr) == (ExitCode.FAILURE, "")
