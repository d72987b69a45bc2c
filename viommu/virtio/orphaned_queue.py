"""A request queue of a disk that is gone: every request in it ends with an I/O error."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.errors import GuestMemoryError, RingError, TranslationFault, ViommuError
from viommu.spec.virtio_blk import STATUS_SIZE, Status

if TYPE_CHECKING:
    from viommu.virtio.ring import Chain, SplitQueue
    from viommu.virtio.ring_memory import RingMemory

__all__ = ["OrphanedQueue"]

_log: Final = logging.getLogger(__name__)

_IOERR: Final = bytes([Status.IOERR])


class OrphanedQueue:
    """Ends the requests of ``queue``: first those that the device had, then all that come.

    What a guest has unmapped, or never had, is left alone: a request whose status
    can't be written stays as it is, as with any device that is gone, and rings that
    can't be reached are given up. ``ended`` counts requests.
    """

    def __init__(self, queue: SplitQueue, memory: RingMemory) -> None:
        self.ended = 0
        self.broken = False
        self._queue = queue
        self._memory = memory
        self._left: list[int] | None = None  # heads that the device had, the next one last

    def serve(self, budget: int) -> tuple[bool, bool]:
        """End at most ``budget`` requests; never raises.

        Returns whether there may be more, and whether the driver is to be interrupted.
        """
        if self.broken:
            return False, False
        more = wanted = False
        try:
            if self._left is None:
                self._left = self._queue.take_over()[::-1]
                wanted = True  # the device may have died between a result and its interrupt
            more = self._run(budget)
        except ViommuError as error:
            self._break(error)
        try:
            wanted = self._queue.publish() or wanted
            # One that was added meanwhile would not be announced.
            more = more or (not self.broken and self._queue.enable_notifications())
        except ViommuError as error:
            self._break(error)
            more = False
        return more, wanted

    def _run(self, budget: int) -> bool:
        """Return whether the budget ended before the requests did."""
        while budget:
            chain = self._next()
            if chain is None:
                return False
            budget -= 1
            try:
                length = self._fail(chain)
            except (GuestMemoryError, TranslationFault):
                continue  # without a status it would look like one that succeeded
            self._queue.push(chain, length)
            self.ended += 1
        return True

    def _next(self) -> Chain | None:
        while self._left:
            try:
                return self._queue.chain(self._left.pop())
            except RingError:
                continue  # the driver has written over it, and can't want it back
        return self._queue.pop()

    def _fail(self, chain: Chain) -> int:
        """Write the status; return the used length, which counts from the buffer's start."""
        if not chain.writable:
            raise GuestMemoryError(0, 0, f"{chain} has no room for a status")
        address, length = chain.writable[-1]
        self._memory.write(address + length - STATUS_SIZE, _IOERR)
        return STATUS_SIZE if chain.writable_size == STATUS_SIZE else 0

    def _break(self, error: ViommuError) -> None:
        self.broken = True
        _log.info("requests can't be ended: %s", error)
