"""Limits of this process and of the kernel, lowered for a test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["dma_entry_limit", "locked_memory", "pinned"]

_ENTRY_LIMIT: Final = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")

# Source: linux/capability.h.
_CAPABILITY_VERSION: Final = 0x20080522
_CAP_IPC_LOCK: Final = 14


@contextlib.contextmanager
def dma_entry_limit(count: int) -> Iterator[None]:
    """Let type1 containers that are opened meanwhile hold ``count`` mappings."""
    before = _ENTRY_LIMIT.read_text()
    _ENTRY_LIMIT.write_text(str(count))
    try:
        yield
    finally:
        _ENTRY_LIMIT.write_text(before)


@contextlib.contextmanager
def locked_memory(size: int) -> Iterator[None]:
    """Be a process that may lock ``size`` bytes, as those of users are."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, before[1]))
    try:
        with _without_ipc_lock():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@contextlib.contextmanager
def _without_ipc_lock() -> Iterator[None]:
    """Do without the capability that makes the kernel look at no limit."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Twice: effective, permitted, inheritable; first for the capabilities below 32.
    data = (ctypes.c_uint32 * 6)()

    def call(function: str) -> None:
        if getattr(libc, function)(header, data):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), function)

    call("capget")
    before = data[0]
    data[0] = before & ~(1 << _CAP_IPC_LOCK)
    call("capset")
    try:
        yield
    finally:
        data[0] = before
        call("capset")


def pinned() -> int:
    """Return how much memory of this process is pinned for devices, and counted; in bytes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x[:6] == "VmPin:")
    return int(line.split()[1]) << 10
