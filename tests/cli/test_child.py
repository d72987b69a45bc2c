from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from viommu.cli import child as child_module
from viommu.cli.child import Child, terminal_kept
from viommu.cli.exit_codes import CliError
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator


class Ended:
    """A loop that runs until the child on it has ended, with its code."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.codes: list[int] = []

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.loop.stop()

    def run(self, script: str) -> list[int]:
        Child(self.loop, ["sh", "-c", script], self)
        self.loop.run()
        return self.codes


@pytest.fixture
def ended() -> Iterator[Ended]:
    ended = Ended()
    yield ended
    ended.loop.close()


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 33", 33), ("kill -SEGV $$", 128 + 11)]
)
def test_its_end_is_an_event_with_the_code_of_a_shell(script: str, code: int, ended: Ended) -> None:
    assert ended.run(script) == [code]


def test_it_is_asked_to_end(ended: Ended) -> None:
    child = Child(ended.loop, ["sleep", "100"], ended)
    child.stop()
    child.stop()
    ended.loop.run()

    assert ended.codes == [128 + signal.SIGTERM]
    child.stop()
    child.close()


def test_one_that_will_not_end_is_killed(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_GRACE", 0.0)
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    script = f"trap '' TERM; echo yes > {ready}; while :; do :; done"
    child = Child(ended.loop, ["sh", "-c", script], ended)
    assert ready.read_text() == "yes\n"  # the trap is set
    child.stop()
    ended.loop.run()

    assert ended.codes == [128 + signal.SIGKILL]


def test_closing_ends_it_without_a_word(ended: Ended) -> None:
    child = Child(ended.loop, ["sleep", "100"], ended)
    child.close()
    child.close()

    assert ended.codes == []
    ended.loop.turn(0)


def test_a_program_that_is_none(ended: Ended) -> None:
    with pytest.raises(CliError, match="/no/such can't be run: No such file"):
        Child(ended.loop, ["/no/such"], ended)


def test_it_dies_with_us() -> None:
    """Kill a process that has a child: the pipe that only the child holds open closes."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    script = (
        "import os, signal\n"
        "from viommu.cli.child import Child\n"
        "from viommu.loop import Loop\n"
        "Child(Loop(), ['sleep', '100'], print)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # sleep inherits the parent's stderr, which is the pipe
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=writer)
    os.close(writer)

    assert parent.wait() == -signal.SIGKILL
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_the_terminal_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(slave)
        with terminal_kept():
            raw = termios.tcgetattr(slave)
            raw[3] &= ~termios.ECHO
            termios.tcsetattr(slave, termios.TCSANOW, raw)

        assert termios.tcgetattr(slave) == before
    os.close(master)


def test_no_terminal_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with terminal_kept():
            pass
