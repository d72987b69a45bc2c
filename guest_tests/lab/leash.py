"""Start a program that dies with its parent, however the parent ends.

Usage: ``python leash.py PARENT PROGRAM ARGUMENT...``. The kernel is asked to kill this process
when its parent ends; the request survives the change of program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["leashed", "main"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def leashed(command: list[str]) -> list[str]:
    """Return the command that runs ``command`` as a child that dies with this process.

    More exactly: with the thread that starts it (prctl(2), PR_SET_PDEATHSIG).
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Become the program that the command line names."""
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before the request
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
