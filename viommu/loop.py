"""The one event loop: everything that waits is a file descriptor.

No thread is on the way of a request. Callbacks must not block; an exception
that escapes one is our own bug and ends :meth:`Loop.run`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HasFileno", "Loop", "Timer"]

# A poll that took no longer than this found ready what it found when it began.
_AT_ONCE: Final = 0.001  # seconds
# Polled for whatever is watched; to everybody it means: try, and learn what happened.
_BROKEN: Final = select.EPOLLERR | select.EPOLLHUP


class HasFileno(Protocol):
    """Anything with a file descriptor."""

    def fileno(self) -> int:
        """Return the file descriptor."""


class Timer:
    """A callback to come; :meth:`cancel` makes it never happen."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget the callback; cancelling twice, or too late, is harmless."""
        self.callback = None


class Loop:
    """Waits for file descriptors and timers and calls back, in one thread.

    ``clock`` is monotonic seconds; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._leavers: dict[int, Callable[[], None]] = {}
        self._fresh: set[int] = set()  # watched since the last poll
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopping = False
        self._polled = clock()
        #: Since when, at the earliest, what this turn found ready has been waiting. Long
        #: before now, and the turn before this one has kept everybody waiting.
        self.ready_since = self._polled

    def on_readable(self, source: HasFileno | int, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever ``source`` is readable; ``None`` stops that.

        Level-triggered: the callback must consume what made the fd readable.
        """
        self._watch(self._readers, source, callback)

    def on_writable(self, source: HasFileno | int, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever ``source`` is writable; ``None`` stops that."""
        self._watch(self._writers, source, callback)

    def on_hang_up(self, source: HasFileno | int, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when the peer of the socket ``source`` has gone; ``None`` stops that.

        For one who doesn't read now: what the peer sent before may be there still.
        Level-triggered: the callback must stop watching.
        """
        self._watch(self._leavers, source, callback)

    def forget(self, source: HasFileno | int) -> None:
        """Stop watching ``source``; call it before closing the fd."""
        self.on_readable(source, None)
        self.on_writable(source, None)
        self.on_hang_up(source, None)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the next turn of the loop, after those asked for before it."""
        self._soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once, ``seconds`` from now."""
        timer = Timer(self.clock() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def run(self) -> None:
        """Turn until :meth:`stop`."""
        self._stopping = False
        while not self._stopping:
            self.turn()

    def stop(self) -> None:
        """Let :meth:`run` return after the callback that is running now."""
        self._stopping = True

    def turn(self, timeout: float | None = None) -> None:
        """Wait once, at most ``timeout`` seconds (``None``: for the next event), and call back."""
        if self._soon:
            timeout = 0.0
        elif self._timers:
            left = max(0.0, self._timers[0][0] - self.clock())
            timeout = left if timeout is None else min(left, timeout)
        entered = self.clock()
        ready = self._epoll.poll(timeout)
        self._fresh.clear()
        before, self._polled = self._polled, self.clock()
        self.ready_since = before if self._polled - entered < _AT_ONCE else self._polled
        for fd, mask in ready:
            if mask & (select.EPOLLIN | _BROKEN) and (reader := self._meant(self._readers, fd)):
                reader()
            if mask & (select.EPOLLOUT | _BROKEN) and (writer := self._meant(self._writers, fd)):
                writer()
            if mask & (select.EPOLLRDHUP | _BROKEN) and (leaver := self._meant(self._leavers, fd)):
                leaver()
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback:
                timer.callback()
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def close(self) -> None:
        """Close the loop's own fd; the watched ones belong to their owners."""
        self._epoll.close()

    def _watch(
        self,
        table: dict[int, Callable[[], None]],
        source: HasFileno | int,
        callback: Callable[[], None] | None,
    ) -> None:
        fd = source if isinstance(source, int) else source.fileno()
        if fd < 0:
            raise UsageError(f"can't watch the closed file descriptor {fd} of {source!r}")
        before = self._mask(fd)
        if callback is None:
            table.pop(fd, None)
        else:
            table[fd] = callback
        after = self._mask(fd)
        if after == before:
            return
        if not before:
            self._epoll.register(fd, after)
            self._fresh.add(fd)
        elif after:
            self._epoll.modify(fd, after)
        else:
            # The kernel has forgotten an fd that its owner closed first.
            with contextlib.suppress(FileNotFoundError, OSError):
                self._epoll.unregister(fd)

    def _meant(self, table: dict[int, Callable[[], None]], fd: int) -> Callable[[], None] | None:
        """Return the callback that the last poll meant by ``fd``, unless it has been forgotten.

        An earlier callback of the turn may have closed an fd, and another may have been
        given its number: what the poll said does not hold for that one.
        """
        return None if fd in self._fresh else table.get(fd)

    def _mask(self, fd: int) -> int:
        reading = select.EPOLLIN if fd in self._readers else 0
        writing = select.EPOLLOUT if fd in self._writers else 0
        return reading | writing | (select.EPOLLRDHUP if fd in self._leavers else 0)
