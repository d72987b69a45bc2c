"""For how long a client may hold memory that the guest has taken back, and what then.

A CPU of the guest waits for the client with interrupts off. Linux complains of a CPU
that is stuck after 10 s (hard lockup detector), 20 s (soft lockup) or 21 s (RCU stall),
and some guests are configured to panic then.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.loop import Loop, Timer

__all__ = ["DEFAULT_LIMIT", "HoldPolicy", "HoldWatch", "Measure"]

DEFAULT_LIMIT: Final = 8.0  # seconds


class Measure(enum.Enum):
    """What is done about a client that does not let go within the limit."""

    #: The guest waits on, for ever if need be; it is logged each time a limit has passed.
    WAIT = "wait"
    #: The client's process is killed. When it has ended it holds nothing.
    KILL = "kill"


class HoldPolicy(NamedTuple):
    """``limit`` seconds, and what is done then."""

    limit: float = DEFAULT_LIMIT
    measure: Measure = Measure.WAIT

    def __str__(self) -> str:
        if self.measure is Measure.KILL:
            return f"kill it after {self.limit:g} s"
        return f"wait on, and log it every {self.limit:g} s"


class HoldWatch:
    """Measures how long a client has kept what it must let go of.

    ``overdue`` is called each time the limit of ``policy`` has passed, with the
    seconds since :meth:`start`, until :meth:`stop`.
    """

    def __init__(self, loop: Loop, policy: HoldPolicy, overdue: Callable[[float], None]) -> None:
        self.policy = policy
        self._loop = loop
        self._overdue = overdue
        self._since: float | None = None
        self._timer: Timer | None = None

    @property
    def waited(self) -> float | None:
        """How many seconds it has been waited for; ``None``: it isn't."""
        return None if self._since is None else self._loop.clock() - self._since

    def start(self) -> None:
        """Begin to wait; the first reason counts."""
        if self._since is None:
            self._since = self._loop.clock()
            self._set()

    def stop(self) -> None:
        """The client has let go."""
        self._since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self._timer = self._loop.call_later(self.policy.limit, self._passed)

    def _passed(self) -> None:
        waited = self.waited
        if waited is not None:
            self._set()
            self._overdue(waited)
