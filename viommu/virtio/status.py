"""The device status handshake as a table.

Source: virtio 1.2, 2.1 "Device Status Field" and 3.1 "Device Initialization".
A missing key is an illegal transition: nothing changes.
"""

from __future__ import annotations

import enum
from typing import Final

from viommu.spec import virtio_config as spec

__all__ = ["TRANSITIONS", "DeviceStatus", "Event", "State"]


class State(enum.Enum):
    """Where driver and device are with each other."""

    RESET = "reset"
    ACKNOWLEDGED = "acknowledged"
    DRIVER = "driver"
    FEATURES_OK = "features ok"
    RUNNING = "running"
    NEEDS_RESET = "needs reset"
    FAILED = "failed"
    RESETTING = "resetting"


class Event(enum.Enum):
    """What the driver (a status bit) or the device does."""

    ACKNOWLEDGE = "ACKNOWLEDGE"
    DRIVER = "DRIVER"
    FEATURES_OK = "FEATURES_OK"
    DRIVER_OK = "DRIVER_OK"
    FAIL = "FAILED"
    BREAK = "DEVICE_NEEDS_RESET"
    START_RESET = "0"
    FINISH_RESET = "reset done"


# A driver that skips ACKNOWLEDGE does no harm; one that skips FEATURES_OK is a
# legacy driver, and this is a modern device.
TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.RESET: {
        Event.ACKNOWLEDGE: State.ACKNOWLEDGED,
        Event.DRIVER: State.DRIVER,
        Event.FAIL: State.FAILED,
        Event.START_RESET: State.RESETTING,
    },
    State.ACKNOWLEDGED: {
        Event.DRIVER: State.DRIVER,
        Event.FAIL: State.FAILED,
        Event.START_RESET: State.RESETTING,
    },
    State.DRIVER: {
        Event.ACKNOWLEDGE: State.DRIVER,
        Event.FEATURES_OK: State.FEATURES_OK,
        Event.FAIL: State.FAILED,
        Event.START_RESET: State.RESETTING,
    },
    State.FEATURES_OK: {
        Event.DRIVER_OK: State.RUNNING,
        Event.FAIL: State.FAILED,
        Event.BREAK: State.NEEDS_RESET,
        Event.START_RESET: State.RESETTING,
    },
    State.RUNNING: {
        Event.FAIL: State.FAILED,
        Event.BREAK: State.NEEDS_RESET,
        Event.START_RESET: State.RESETTING,
    },
    State.NEEDS_RESET: {
        Event.FAIL: State.FAILED,
        Event.START_RESET: State.RESETTING,
    },
    State.FAILED: {
        Event.START_RESET: State.RESETTING,
    },
    State.RESETTING: {
        Event.FINISH_RESET: State.RESET,
    },
}

_BITS: Final = {
    Event.ACKNOWLEDGE: spec.STATUS_ACKNOWLEDGE,
    Event.DRIVER: spec.STATUS_DRIVER,
    Event.FEATURES_OK: spec.STATUS_FEATURES_OK,
    Event.DRIVER_OK: spec.STATUS_DRIVER_OK,
    Event.FAIL: spec.STATUS_FAILED,
    Event.BREAK: spec.STATUS_DEVICE_NEEDS_RESET,
}

# In the order of the initialization sequence: a driver may set several at once.
_DRIVER_EVENTS: Final = (
    Event.ACKNOWLEDGE,
    Event.DRIVER,
    Event.FEATURES_OK,
    Event.DRIVER_OK,
    Event.FAIL,
)


class DeviceStatus:
    """The state, and the status byte that shows it to the driver."""

    __slots__ = ("_byte", "state")

    def __init__(self) -> None:
        self.state = State.RESET
        self._byte = 0

    @property
    def byte(self) -> int:
        """The device status field: not zero before a reset has finished."""
        return self._byte

    def feed(self, event: Event) -> bool:
        """Take one step; return whether the table has it."""
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            return False
        self.state = following
        self._byte |= _BITS.get(event, 0)
        if following is State.RESETTING:
            # A driver that resets a device that shows nothing waits for it all the same.
            self._byte = self._byte or spec.STATUS_DEVICE_NEEDS_RESET
        elif following is State.RESET:
            self._byte = 0
        return True

    @staticmethod
    def events_of(written: int, byte: int) -> list[Event]:
        """Return what a driver means that writes ``written`` over ``byte``.

        Bits that it clears, or that are the device's own, mean nothing: a driver
        must not clear a status bit other than by a reset (2.1.1).
        """
        if not written:
            return [Event.START_RESET]
        return [event for event in _DRIVER_EVENTS if written & ~byte & _BITS[event]]
