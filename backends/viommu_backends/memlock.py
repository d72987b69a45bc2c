"""What to say when the host refuses to lock, or pin, more memory."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

__all__ = ["LOCKED", "PINNED", "over_the_limit"]

LOCKED: Final = "VmLck"  # what VFIO type1 counts, for each process
PINNED: Final = "VmPin"  # what iommufd counts, and adds up for all processes of a user

_STATUS: Final = Path("/proc/self/status")


def over_the_limit(size: int, counter: str) -> str:
    """Return the numbers: how much more was wanted, how much there is, and the limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return (
        f"{size} more bytes would be locked, {_count(counter)} are, and the limit is "
        f"{'none' if limit == resource.RLIM_INFINITY else limit} (ulimit -l)"
    )


def _count(counter: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{counter}:"):
            return int(line.split()[1]) << 10
    return 0
