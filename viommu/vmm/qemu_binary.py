"""Find a QEMU that can be a vfio-user client, and ask it what it can do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import ViommuError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MINIMUM_VERSION", "Qemu", "UnsuitableQemuError", "find_qemu", "probe_qemu"]

MINIMUM_VERSION: Final = (10, 1, 1)
"""The first QEMU whose vfio-user client has the message layouts that we speak."""

_NAME: Final = "qemu-system-x86_64"
_VARIABLE: Final = "VIOMMU_QEMU"
_TIMEOUT: Final = 60.0  # seconds; a wrapper may have to unpack something first
_VERSION: Final = re.compile(r"version (\d+)\.(\d+)\.(\d+)")


class UnsuitableQemuError(ViommuError):
    """There is no QEMU here, or it can't do what is needed; the message has the remedy."""


class Qemu(NamedTuple):
    """A QEMU, or a script that runs one, that was asked for its version and devices."""

    path: Path
    version: tuple[int, int, int]
    vfio_user: bool

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))

    def require(self) -> None:
        """Check that it can connect to a server of ours.

        Raises:
            UnsuitableQemuError: It is too old or was built without vfio-user.
        """
        wanted = ".".join(map(str, MINIMUM_VERSION))
        if self.version < MINIMUM_VERSION:
            raise UnsuitableQemuError(
                f"{self.path} is QEMU {self.version_text} and {wanted} or newer is needed: "
                f"install it, then name it with --qemu or {_VARIABLE}"
            )
        if not self.vfio_user:
            raise UnsuitableQemuError(
                f"{self.path} (QEMU {self.version_text}) has no vfio-user-pci device: "
                f"use a build with it and name it with --qemu or {_VARIABLE}"
            )


def find_qemu(explicit: str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the QEMU to use: ``explicit``, else ``$VIOMMU_QEMU``, else the one on ``PATH``.

    Raises:
        UnsuitableQemuError: There is none, or the named one can't be executed.
    """
    named = explicit or environ.get(_VARIABLE)
    found = shutil.which(named or _NAME, path=environ.get("PATH"))
    if found is not None:
        return Path(found)
    if named:
        source = "--qemu" if explicit else _VARIABLE
        raise UnsuitableQemuError(
            f"{source} names {named!r}, which is not a program: correct the path"
        )
    raise UnsuitableQemuError(
        f"no {_NAME} on PATH: install QEMU 10.1.1 or newer, or name one with --qemu or {_VARIABLE}"
    )


def probe_qemu(path: Path) -> Qemu:
    """Ask the QEMU at ``path`` for its version and for the vfio-user-pci device.

    Raises:
        UnsuitableQemuError: It doesn't run, or doesn't answer like a QEMU.
    """
    answer = _ask(path, "--version")
    match = _VERSION.search(answer.stdout)
    if match is None:
        said = (answer.stdout or answer.stderr).strip().partition("\n")[0]
        raise UnsuitableQemuError(
            f"{path} --version does not answer like QEMU (exit code {answer.returncode}, "
            f"{said!r}): name another with --qemu or {_VARIABLE}"
        )
    major, minor, micro = (int(part) for part in match.groups())
    # QEMU's exit code is 0 for a device it doesn't have, too.
    device = _ask(path, "-device", "vfio-user-pci,help")
    return Qemu(path, (major, minor, micro), vfio_user="vfio-user-pci options:" in device.stdout)


def _ask(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603  # the user chose this program
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsuitableQemuError(
            f"{path} can't be asked for its version: {error}; "
            f"name another QEMU with --qemu or {_VARIABLE}"
        ) from error
