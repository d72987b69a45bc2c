"""Requests that a device has not answered: replies are matched by id, in any order. No I/O."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from viommu.errors import PeerError, UsageError
from viommu.spec import vfio_user as spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.deferred import Deferred
    from viommu.vfio_user.protocol import Message
    from viommu.vfio_user.requests import Request

__all__ = ["Outstanding"]

_IDS: Final = 1 << 16
_MAX_ERRNO: Final = 4095


class _Call(NamedTuple):
    request: Request[Any]
    deferred: Deferred[Any]
    deadline: float


class Outstanding:
    """Requests under way: each is done when its reply is taken, or all are refused."""

    def __init__(self) -> None:
        #: How many file descriptors went with them.
        self.fds = 0
        self._calls: dict[int, _Call] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, request: Request[Any], deferred: Deferred[Any], deadline: float) -> int:
        """Expect a reply until ``deadline``; return the id of the message to send.

        Raises:
            UsageError: There are as many as there are ids.
        """
        ident = self.fresh_id()
        self._calls[ident] = _Call(request, deferred, deadline)
        self.fds += len(request.fds)
        return ident

    def fresh_id(self) -> int:
        """Return an id that no request waits for.

        Raises:
            UsageError: There is none.
        """
        if len(self._calls) == _IDS:
            raise UsageError(f"{_IDS} requests are under way")
        while self._next in self._calls:
            self._next = (self._next + 1) % _IDS
        ident = self._next
        self._next = (ident + 1) % _IDS
        return ident

    def deadline(self) -> float | None:
        """Return the earliest deadline. Runtime complexity: `O(n)`."""
        return min((call.deadline for call in self._calls.values()), default=None)

    def take(self, message: Message) -> Callable[[], None]:
        """Match a reply; return what tells whoever waits for it.

        What is left of the message's file descriptors is still to be closed.

        Raises:
            PeerError: EPROTO, it is no reply to anything that was asked, and its
                sender can't be understood any more.
        """
        if message.kind != spec.F_TYPE_REPLY:
            raise _nonsense(f"a message of type {message.kind}")
        call = self._calls.get(message.id)
        if call is None:
            raise _nonsense(f"a reply to message {message.id} unasked")
        request, deferred, _ = call
        what = f"the reply to message {message.id}, command {request.command}"
        if message.command != request.command:
            raise _nonsense(f"{what}: it is to command {message.command}")
        failed = bool(message.flags & spec.F_ERROR)
        if len(message.fds) > (0 if failed else request.max_fds):
            raise _nonsense(f"{what}: it has {len(message.fds)} file descriptors")
        if failed:
            # libvfio-user sends a payload with some errors; it means nothing.
            number = message.error if 0 < message.error <= _MAX_ERRNO else errno.EIO
            error = PeerError(number, f"command {request.command} failed: {os.strerror(number)}")
        elif message.truncated:
            if not request.max_fds:
                raise _nonsense(f"{what}: it has file descriptors")
            error = PeerError(errno.EMFILE, f"{what}: no room for its file descriptors")
        else:
            try:
                value = request.decode(message)
            except PeerError as nonsense:
                raise _nonsense(f"{what}: {nonsense}") from nonsense
            self._remove(message.id)
            return lambda: deferred.resolve(value)
        self._remove(message.id)
        return lambda: deferred.refuse(error)

    def refuse_all(self, number: int, why: str) -> None:
        """Refuse every request, oldest first."""
        calls, self._calls, self.fds = self._calls, {}, 0
        for call in calls.values():
            call.deferred.refuse(PeerError(number, why))

    def _remove(self, ident: int) -> None:
        self.fds -= len(self._calls.pop(ident).request.fds)


def _nonsense(why: str) -> PeerError:
    return PeerError(errno.EPROTO, why)
