"""What every test runs under: a hypothesis profile, and no file descriptor left behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# No deadline in either: a shared machine may stall, and no test of ours judges time.
# "dev" looks for new failures in each run; "ci" runs the same examples every time.
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci", deadline=None, print_blob=True, derandomize=True, database=None
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)


def open_fds() -> dict[str, str]:
    """Return this process's file descriptors: number to what it refers to."""
    fds = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            fds[entry.name] = str(Path(entry.path).readlink())
        except FileNotFoundError:  # the fd of this scan itself
            continue
    return fds


@pytest.fixture(autouse=True)
def no_fd_leak() -> Iterator[None]:
    """Fail a test that leaves more file descriptors open than it found.

    An object that waits for the garbage collector still counts as closed: what
    is checked is that somebody owns each fd, not when the cycle is collected.
    """
    before = open_fds()
    yield
    if len(open_fds()) > len(before):
        gc.collect()
    after = open_fds()
    assert len(after) <= len(before), (
        f"left open: {sorted(set(after.items()) - set(before.items()))}"
    )
