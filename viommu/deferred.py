"""A result that comes later: the answer of somebody else that must not be waited for.

Everything happens in the thread of the loop. Whoever gets a :class:`Deferred`
says with :meth:`~Deferred.then` what to do with the result; whoever made it
calls :meth:`~Deferred.resolve` or :meth:`~Deferred.refuse`, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from viommu.errors import ViommuError

__all__ = ["Deferred", "all_done"]

T = TypeVar("T")


class Deferred(Generic[T]):
    """One result, a value or an error, that is there now or will be later."""

    def __init__(self) -> None:
        self._result: list[T] = []
        self._error: ViommuError | None = None
        self._callbacks: list[Callable[[Deferred[T]], None]] = []

    @property
    def done(self) -> bool:
        """Whether there is a value or an error."""
        return bool(self._result) or self._error is not None

    def resolve(self, value: T) -> None:
        """Give the value.

        Raises:
            UsageError: There is a result already.
        """
        self._check_open()
        self._result.append(value)
        self._call()

    def refuse(self, error: ViommuError) -> None:
        """Give an error instead of a value.

        Raises:
            UsageError: There is a result already.
        """
        self._check_open()
        self._error = error
        self._call()

    def then(self, callback: Callable[[Deferred[T]], None]) -> None:
        """Have ``callback`` called with this object when it is done: now, if it is."""
        if self.done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def result(self) -> T:
        """Return the value.

        Raises:
            ViommuError: The error that was given instead.
            UsageError: There is no result yet.
        """
        if self._error is not None:
            raise self._error
        if not self._result:
            raise UsageError("there is no result yet")
        return self._result[0]

    def _check_open(self) -> None:
        if self.done:
            raise UsageError("there is a result already")

    def _call(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)


def all_done(deferreds: Sequence[Deferred[Any]]) -> Deferred[None]:
    """Return what is done when each of ``deferreds`` has a value or an error."""
    together: Deferred[None] = Deferred()
    left = len(deferreds)

    def one_is_done(_: Deferred[Any]) -> None:
        nonlocal left
        left -= 1
        if not left:
            together.resolve(None)

    for deferred in deferreds:
        deferred.then(one_is_done)
    if not deferreds:
        together.resolve(None)
    return together
