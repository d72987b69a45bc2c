"""Eventfds as objects: the only module that touches linuxfd."""

from __future__ import annotations

from typing import Self

import linuxfd

__all__ = ["Event"]


class Event:
    """A non-blocking eventfd: something that happened, visible to poll.

    Raises:
        OSError: EMFILE or ENFILE when the process or host has no fd left.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = linuxfd.eventfd(nonBlocking=True, closeOnExec=True)

    def fileno(self) -> int:
        """Return the fd, -1 once closed."""
        fd = self._event.fileno()
        return -1 if fd is None else int(fd)

    def signal(self) -> None:
        """Make the event readable; signalling twice is the same as once to a poller."""
        self._event.write(1)

    def clear(self) -> bool:
        """Make the event unreadable again; return whether it was signalled."""
        try:
            self._event.read()
        except BlockingIOError:
            return False
        return True

    def is_set(self) -> bool:
        """Return whether the event is signalled, without clearing it."""
        if not self.clear():
            return False
        self.signal()
        return True

    def close(self) -> None:
        """Close the fd; closing twice is harmless."""
        self._event.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
