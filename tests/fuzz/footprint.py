"""What a fuzzer must leave as it was: this process's file descriptors and memory."""

from __future__ import annotations

import resource
from pathlib import Path


def open_fds() -> int:
    """Return how many file descriptors are open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def memory_use() -> tuple[int, int]:
    """Return the virtual and resident memory of this process, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()
