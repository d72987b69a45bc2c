"""Options of endpoints: what one is, and those that all kinds which are emulated have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from viommu.errors import UsageError
from viommu.ipc.hold import DEFAULT_LIMIT, HoldPolicy, Measure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["HOLD_OPTIONS", "PROCESS_OPTIONS", "Option", "Running", "read_seconds", "read_switch"]

_LONGEST: Final = 3600.0  # seconds


class Option(NamedTuple):
    """An option of a kind: how its value is read (UsageError when it can't be), and help."""

    parse: Callable[[str], Any]
    help: str
    required: bool = False


class Running(NamedTuple):
    """Whether an endpoint has a process of its own, and what is done if that holds memory."""

    own: bool
    policy: HoldPolicy

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Running:
        """Return what the parsed options of an endpoint say."""
        own = "process" in options
        # A process that we started we may also end; one that isn't ours only if we are told to.
        measure = options.get("hold-policy", Measure.KILL if own else Measure.WAIT)
        return cls(own, HoldPolicy(options.get("hold-limit", DEFAULT_LIMIT), measure))


def read_seconds(value: str) -> float:
    """Read how many seconds something may take.

    Raises:
        UsageError: No number, or not more than none and up to an hour.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST:
        raise UsageError(f"expected seconds, more than 0 and up to {_LONGEST:g}")
    return seconds


def read_switch(value: str) -> bool:
    """Read ``on`` or ``off``.

    Raises:
        UsageError: It is something else.
    """
    if value not in {"on", "off"}:
        raise UsageError("expected on or off")
    return value == "on"


def _own(value: str) -> str:
    """Read ``own``, the only value so far."""
    if value != "own":
        raise UsageError("expected own")
    return value


def _measure(value: str) -> Measure:
    """Read what is done about a client that does not let go."""
    try:
        return Measure(value)
    except ValueError:
        raise UsageError("expected wait or kill") from None


PROCESS_OPTIONS: Final = {
    "process": Option(_own, "own: the endpoint runs in a process of its own"),
}
"""For kinds that are emulated here, or in such a process."""

HOLD_OPTIONS: Final = {
    "hold-limit": Option(
        read_seconds,
        f"how long that may hold memory that the guest has unmapped, seconds ({DEFAULT_LIMIT:g})",
    ),
    "hold-policy": Option(_measure, "then wait on, and log it; or kill it"),
}
"""For endpoints with export sessions of another process."""
