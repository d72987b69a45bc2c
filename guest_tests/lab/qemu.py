"""Which QEMU to run: the user's when it is good enough, else Debian's, from the cache."""

from __future__ import annotations

import contextlib
import os
import shlex
from typing import TYPE_CHECKING

from guest_tests.lab import bundles
from guest_tests.lab.cache import cache_directory
from guest_tests.lab.errors import LabError
from guest_tests.lab.manifest import QEMU
from guest_tests.lab.userland import LIBRARIES, foreign_command
from viommu.vmm.qemu_binary import Qemu, UnsuitableQemuError, find_qemu, probe_qemu

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["choose_qemu"]

_PROGRAM = "qemu-system-x86_64"


def choose_qemu() -> Qemu:
    """Return the QEMU of ``VIOMMU_QEMU`` or ``PATH`` if it can be our client, else fetch one.

    Raises:
        LabError: None can be fetched.
    """
    with contextlib.suppress(UnsuitableQemuError):
        return _required(find_qemu())
    tree = bundles.fetch([QEMU])[QEMU.name]
    try:
        return _required(_script(tree))
    except UnsuitableQemuError as error:
        raise LabError(f"the archive's QEMU is of no use: {error}") from error


def _required(path: Path) -> Qemu:
    qemu = probe_qemu(path)
    qemu.require()
    return qemu


def _script(tree: Path) -> Path:
    """Return a program that runs the QEMU in ``tree`` with the libraries and data beside it.

    It can be given to anything that wants a QEMU, such as ``viommu run --qemu``.
    """
    data = [tree / "usr/share/qemu", tree / "usr/share/seabios"]
    command = foreign_command(tree, f"usr/bin/{_PROGRAM}", "--argv0", _PROGRAM)
    for directory in data:
        command += ["-L", str(directory)]
    # QEMU's own modules must not be looked for in the host's directories.
    modules = shlex.quote(str(tree / LIBRARIES / "qemu"))
    text = f'#!/bin/sh\nQEMU_MODULE_DIR={modules} exec {shlex.join(command)} "$@"\n'
    script = cache_directory() / "bin" / _PROGRAM
    if not script.exists() or script.read_text() != text:
        script.parent.mkdir(exist_ok=True)
        new = script.with_name(f".{_PROGRAM}.{os.getpid()}")
        new.write_text(text)
        new.chmod(0o755)
        new.rename(script)
    return script
