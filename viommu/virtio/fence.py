"""Memory fences for what we share with a driver that runs on another CPU."""

from __future__ import annotations

import platform
import threading
from typing import Final

__all__ = ["WEAKLY_ORDERED", "full_fence"]

# x86 keeps loads in order and stores in order; only a load may pass an older
# store. Elsewhere index and data need a fence between them as well.
WEAKLY_ORDERED: Final = platform.machine() not in {"x86_64", "AMD64", "i686"}

_lock = threading.Lock()
_acquire = _lock.acquire
_release = _lock.release


def full_fence() -> None:
    """Make every store before it visible before any load after it is done.

    Taking a free lock is a compare-and-swap, which on x86 is a locked
    instruction and therefore a full fence. Where acquire and release order in
    one direction each (arm64), a second round closes the other: an acquire
    never passes an older release.
    """
    _acquire()
    _release()
    if WEAKLY_ORDERED:
        _acquire()
        _release()
