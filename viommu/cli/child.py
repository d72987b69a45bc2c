"""A child process that ends with us, and whose end is an event of the loop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Final

from viommu.cli.exit_codes import CliError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from viommu.loop import Loop, Timer

__all__ = ["Child", "dies_with_us", "terminal_kept"]

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_GRACE: Final = 5.0  # seconds between asking a child to end and ending it


class Child:
    """Runs ``arguments`` with our stdin, stdout and stderr.

    ``on_exit`` is called once, from ``loop``, with an exit code as a shell would
    give it: the process's own, or 128 and the number of the signal that ended
    it. Should we be killed, the kernel kills the child.

    Raises:
        CliError: The program can't be executed.
    """

    def __init__(
        self, loop: Loop, arguments: Sequence[str], on_exit: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self._killer: Timer | None = None
        try:
            self._process = subprocess.Popen(  # noqa: S603  # the user chose this program
                arguments,
                preexec_fn=dies_with_us(),  # noqa: PLW1509  # this process has one thread
            )
        except OSError as error:
            raise CliError(f"{arguments[0]} can't be run: {error.strerror}") from error
        self._pidfd = os.pidfd_open(self._process.pid)
        loop.on_readable(self._pidfd, self._reap)

    def stop(self) -> None:
        """Ask the child to end, and see to it if it doesn't."""
        if self._pidfd >= 0 and self._killer is None:
            self._process.terminate()
            self._killer = self._loop.call_later(_GRACE, self._process.kill)

    def close(self) -> None:
        """End the child now if it still runs; ``on_exit`` is not called."""
        if self._pidfd < 0:
            return
        self._process.kill()
        self._finish()

    def _reap(self) -> None:
        self._on_exit(self._finish())

    def _finish(self) -> int:
        self._loop.forget(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._killer is not None:
            self._killer.cancel()
        code = self._process.wait()
        return 128 - code if code < 0 else code


def dies_with_us() -> Callable[[], None]:
    """Return what a child must call before it executes its program, so as not to outlive us."""
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
    """Put the terminal back to how it was: a killed QEMU leaves it raw."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
