"""SIGTERM and SIGINT as events of the loop."""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.loop import Loop

__all__ = ["on_stop_signals"]

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def on_stop_signals(loop: Loop, callback: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call ``callback`` from ``loop`` with the number of a signal that ends us.

    SIGINT, SIGTERM and SIGHUP do nothing else then: no exception can come up
    between two statements that belong together. Main thread only.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    def wake() -> None:
        with contextlib.suppress(BlockingIOError):
            for number in ours.recv(64):
                if number in _STOP:
                    callback(number)

    before = {number: signal.signal(number, lambda *_: None) for number in _STOP}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    loop.on_readable(ours, wake)
    try:
        yield
    finally:
        loop.forget(ours)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
