"""Resetting a host device: at once, or as soon as the host lets us."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final, Protocol

from viommu.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.loop import Loop, Timer

__all__ = ["HostReset"]

_log: Final = logging.getLogger(__name__)

_BUSY: Final = (errno.EAGAIN, errno.EBUSY)
_PAUSE: Final = 0.02  # seconds
_TRIES: Final = 50


class _Device(Protocol):
    """What is used of a :class:`~viommu_backends.vfio_device.VfioDevice`."""

    name: str

    @property
    def can_reset(self) -> bool:
        """Whether there is a way to reset it."""

    def reset(self) -> None:
        """Reset the function."""


class HostReset:
    """Resets ``device``; while the host has it locked, tries again from the loop.

    ``done`` is called after every reset, whether it worked or not, possibly before
    :meth:`start` returns. ``resets`` counts those that worked, ``failed`` the others;
    a device that the host knows no way to reset is left as it is.
    """

    def __init__(self, device: _Device, loop: Loop, done: Callable[[], None]) -> None:
        self.resets = 0
        self.failed = 0
        self._device = device
        self._loop = loop
        self._done = done
        self._timer: Timer | None = None
        self._left = 0

    @property
    def pending(self) -> bool:
        """Whether a reset was asked for and the host has not let us."""
        return self._timer is not None

    def start(self) -> None:
        """Reset the device, which does no DMA; one that is pending already is the same."""
        if self.pending:
            return
        if not self._device.can_reset:
            self._done()
            return
        self._left = _TRIES
        self._try()

    def give_up(self, why: str) -> None:
        """Leave the device as it is, if a reset is pending."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._end(why)

    def _try(self) -> None:
        self._timer = None
        self._left -= 1
        try:
            self._device.reset()
        except BackendError as error:
            if error.errno in _BUSY and self._left:
                self._timer = self._loop.call_later(_PAUSE, self._try)
            else:
                self._end(str(error))
        else:
            self.resets += 1
            self._done()

    def _end(self, why: str) -> None:
        self.failed += 1
        _log.warning("%s was not reset: %s", self._device.name, why)
        self._done()
