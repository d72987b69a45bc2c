"""A server's loop in a thread of its own, for tests whose client waits for replies."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Self, TypeVar

from viommu.errors import UsageError
from viommu.events import Event
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LoopThread"]

_T = TypeVar("_T")


class LoopThread:
    """Runs ``loop``, its own by default, while the ``with`` block does.

    Servers belong to the loop's thread: make, look at and close them through
    :meth:`call`. An exception that ends the loop is raised by the next
    :meth:`call`, and at the end of the block. A loop of its own is closed then.
    """

    def __init__(self, loop: Loop | None = None) -> None:
        self.loop = loop or Loop()
        self._owned = loop is None
        self._wake = Event()
        self._calls: deque[Callable[[], None]] = deque()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="viommu-loop", daemon=True)

    def __enter__(self) -> Self:
        self.loop.on_readable(self._wake, self._woken)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._calls.append(self.loop.stop)
        self._wake.signal()
        self._thread.join()
        self.loop.forget(self._wake)
        self._wake.close()
        if self._owned:
            self.loop.close()
        self._raise()

    def call(self, function: Callable[[], _T]) -> _T:
        """Call ``function`` in the loop's thread; return what it returns, raise what it raises."""
        results: list[_T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                errors.append(error)
            done.set()

        self._calls.append(run)
        self._wake.signal()
        while not done.wait(0.1):
            if not self._thread.is_alive():
                self._raise()
                raise UsageError("the loop has been stopped")
        if errors:
            raise errors[0]
        return results[0]

    def _woken(self) -> None:
        self._wake.clear()
        while self._calls:
            self._calls.popleft()()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._failure = error

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
