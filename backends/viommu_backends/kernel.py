"""How the kernel is asked: one function for every ioctl."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from viommu.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ask", "open_device_file"]


def ask(fd: int, request: int, argument: bytearray | int, what: str) -> int:
    """Make an ioctl and return its result; a buffer is changed in place.

    Raises:
        BackendError: With the kernel's errno; ``what`` says what was asked for. EBADF
            for an ``fd`` that is closed.
    """
    if fd < 0:
        # Python refuses it before the kernel can, and with an error of another kind.
        raise BackendError(errno.EBADF, what)
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise BackendError(error.errno or 0, what) from error


def open_device_file(path: Path) -> int:
    """Open a device file for reading and writing, and not for children.

    Raises:
        BackendError: It isn't there, is in use or not ours to open.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(error.errno or 0, f"can't open {path}") from error
