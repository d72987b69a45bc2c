"""Programs of the guest bundle, run on this host through their own dynamic loader."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LIBRARIES", "LOADER", "Userland", "foreign_command"]

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"


def foreign_command(tree: Path, program: str, *options: str) -> list[str]:
    """Return the command that runs ``program`` of ``tree`` with the libraries of ``tree``.

    The host's own libraries may be older; they are not looked at. ``options`` are the loader's.
    """
    loader = [str(tree / LOADER), "--library-path", str(tree / LIBRARIES)]
    return [*loader, *options, str(tree / program)]


class Userland:
    """The unpacked guest bundle ``tree``: Debian's files for the guest's user space."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def run(self, program: str, *arguments: str, check: bool = True) -> str:
        """Run ``program`` (a path in the bundle) on the host; return what it printed.

        Raises:
            LabError: It ended with an error, and ``check`` is set.
        """
        return self._output([*foreign_command(self.tree, program), *arguments], check=check)

    def libraries(self, programs: Iterable[str]) -> list[str]:
        """Return the shared objects that ``programs`` are linked with, and the loader."""
        needed = {LOADER}
        for program in programs:
            listing = self._output(foreign_command(self.tree, program, "--list"), check=True)
            names = (line.split()[0] for line in listing.splitlines())
            needed |= {f"{LIBRARIES}/{Path(n).name}" for n in names if n != "linux-vdso.so.1"}
        return sorted(needed)

    def _output(self, command: list[str], *, check: bool) -> str:
        done = subprocess.run(
            command,
            env={"PYTHONHOME": str(self.tree / "usr"), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise LabError(f"{command[3]} ended with {done.returncode}: {done.stdout}")
        return done.stdout
