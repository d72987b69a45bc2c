"""Drains one queue, in batches that a loop can poll or wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.errors import GuestMemoryError, RingError, TranslationFault, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.virtio.device import Transport
    from viommu.virtio.ring import Chain, SplitQueue

__all__ = ["DEFAULT_BUDGET", "QueueRunner"]

DEFAULT_BUDGET: Final = 256

_UNREACHABLE: Final = (GuestMemoryError, TranslationFault)


class QueueRunner:
    """Takes chains from a queue, has them handled, and gives them back a batch at a time.

    Nothing here blocks and nothing a guest does raises: a broken queue, or rings
    that can't be reached, become ``transport.needs_reset``. A loop that waits
    for kicks calls :meth:`serve`; one that polls calls :meth:`has_work` and
    :meth:`run` while it is busy, then :meth:`arm` before it sleeps.

    Args:
        queue: The queue.
        transport: Gets interrupts, at most one a batch, and errors.
        handle: Handles one chain and returns how many bytes it wrote, or ``None``
            to park it: then no further chain is taken before :meth:`resume`. When
            a buffer can't be reached it may let that exception go: the chain is
            given back with nothing written.
    """

    def __init__(
        self, queue: SplitQueue, transport: Transport, handle: Callable[[Chain], int | None]
    ) -> None:
        self.parked: Chain | None = None
        self.broken = False
        self._queue = queue
        self._transport = transport
        self._handle = handle
        self._resumed: tuple[Chain, int] | None = None

    def has_work(self) -> bool:
        """Return whether :meth:`run` would do something."""
        if self.broken or self.parked or not self._transport.active:
            return False
        try:
            return self._resumed is not None or self._queue.has_work()
        except _UNREACHABLE:
            return True  # run() meets it again and says so

    def run(self, budget: int = DEFAULT_BUDGET) -> int:
        """Handle at most ``budget`` chains; return how many.

        Fewer than the budget: the queue is empty, parked or broken.
        """
        if self.broken or not self._transport.active:
            return 0
        done = 0
        try:
            self._give_back_resumed()
            while done < budget and self.parked is None and self._transport.active:
                chain = self._queue.pop()
                if chain is None:
                    break
                try:
                    used = self._handle(chain)
                except _UNREACHABLE:
                    used = 0
                if used is None:
                    self.parked = chain
                else:
                    self._queue.push(chain, used)
                    done += 1
        except (RingError, *_UNREACHABLE) as error:
            self._publish()
            self._break(error)
        else:
            self._publish()
        return done

    def resume(self, chain: Chain, used_length: int) -> None:
        """Give the parked chain back; the queue goes on with the next :meth:`run`.

        While the transport is not active the chain waits until it is.

        Raises:
            UsageError: This chain is not parked.
        """
        if chain is not self.parked:
            raise UsageError(f"{chain} is not parked, {self.parked} is")
        self.parked = None
        self._resumed = (chain, used_length)
        self.run(0)

    def serve(self, budget: int = DEFAULT_BUDGET) -> bool:
        """Answer a kick: run until empty, then ask for the next kick.

        Returns whether the budget ended before the work did: call again, soon.
        """
        if self.broken or not self._transport.active:
            return False
        self._quietly(self._queue.disable_notifications)
        while True:
            budget -= self.run(budget)
            if not budget and self.has_work():
                return True
            if not self.arm():
                return False

    def arm(self) -> bool:
        """Ask the driver to kick; return whether there is work already."""
        if self.broken or self.parked or not self._transport.active:
            return False
        return bool(self._quietly(self._queue.enable_notifications))

    def _give_back_resumed(self) -> None:
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            self._queue.push(*resumed)

    def _publish(self) -> None:
        try:
            wanted = self._queue.publish()
        except _UNREACHABLE as error:
            self._break(error)
            return
        if wanted:
            self._transport.interrupt(self._queue.index)

    def _quietly(self, call: Callable[[], bool | None]) -> bool | None:
        try:
            return call()
        except _UNREACHABLE as error:
            self._break(error)
            return False

    def _break(self, error: Exception) -> None:
        if not self.broken:
            self.broken = True
            self._transport.needs_reset(str(error))
