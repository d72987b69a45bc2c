"""The DMA engine of ``edu``: one transfer at a time between its buffer and an IOVA.

A transfer exports its memory when it starts and moves the data when its hold
time has passed, right before it releases. Between the two an unmap has to wait.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from viommu.endpoints.edu_registers import (
    BUFFER_SIZE,
    BUFFER_START,
    MAX_HOLD_MS,
    Command,
    FaultPolicy,
    Result,
)
from viommu.errors import Access, ExportError, GuestMemoryError, TranslationFault
from viommu.iova import ADDRESS_SPACE_END

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.endpoints.dma import EndpointDma
    from viommu.export import ExportedRegion
    from viommu.loop import Loop, Timer

__all__ = ["DmaEngine"]


class DmaEngine:
    """Registers and state of the transfers; ``on_done`` is called when one with IRQ ends.

    ``hold_ms`` is the hold time after a reset. Addresses and the count are as
    the driver wrote them, validated when a transfer starts.
    """

    def __init__(
        self, dma: EndpointDma, loop: Loop, on_done: Callable[[], None], *, hold_ms: int = 0
    ) -> None:
        self._dma = dma
        self._loop = loop
        self._on_done = on_done
        self._initial_hold_ms = min(hold_ms, MAX_HOLD_MS)
        self._region: ExportedRegion | None = None
        self._timer: Timer | None = None
        self.reset()
        dma.on_fault(self._faulted)

    @property
    def running(self) -> bool:
        """Whether a transfer is under way; its registers can't be written meanwhile."""
        return bool(self.command & Command.RUN)

    @property
    def hold_ms(self) -> int:
        """How long a transfer that starts now is held, milliseconds."""
        return self._hold_ms

    @hold_ms.setter
    def hold_ms(self, value: int) -> None:
        self._hold_ms = min(value, MAX_HOLD_MS)

    def start(self, command: int) -> None:
        """Start a transfer with the registers as they are; ignored while one is running."""
        if self.running or not command & Command.RUN:
            return
        self.command = command
        self.faulted_at = self.released_at = 0
        self.exported_at = self._now()
        failure = self._export()
        delay = 0.0 if failure else self._hold_ms / 1000
        self._timer = self._loop.call_later(delay, partial(self._finish, failure))

    def abort(self) -> None:
        """End a transfer under way without moving data; its memory is released on return."""
        if self.running:
            self._complete(Result.ABORTED)

    def reset(self) -> None:
        """Release everything and return to the state after power-on, buffer included."""
        self._let_go()
        self.buffer = bytearray(BUFFER_SIZE)
        self.source = self.destination = self.count = 0
        self.command = 0
        self._hold_ms = self._initial_hold_ms
        self.fault_policy: int = FaultPolicy.FINISH
        self.result = Result.OK
        self.transfers = 0
        self.exported_at = self.faulted_at = self.released_at = 0

    def _export(self) -> Result:
        to_memory = self.command & Command.TO_MEMORY
        local, iova = (
            (self.source, self.destination) if to_memory else (self.destination, self.source)
        )
        if not BUFFER_START <= local <= local + self.count <= BUFFER_START + BUFFER_SIZE:
            return Result.BAD_RANGE
        if iova + self.count > ADDRESS_SPACE_END:
            return Result.BAD_RANGE
        if not self.count:
            return Result.OK
        try:
            self._region = self._dma.export(
                iova, self.count, Access.WRITE if to_memory else Access.READ
            )
        except (TranslationFault, ExportError):
            return Result.TRANSLATION_FAULT
        return Result.OK

    def _finish(self, result: Result) -> None:
        if self._region is not None:
            try:
                self._move(self._region)
            except GuestMemoryError:
                result = Result.NO_MEMORY
        self._complete(result)

    def _move(self, region: ExportedRegion) -> None:
        if self.command & Command.TO_MEMORY:
            start = self.source - BUFFER_START
            region.write(memoryview(self.buffer)[start : start + self.count])
        else:
            start = self.destination - BUFFER_START
            self.buffer[start : start + self.count] = region.read()

    def _complete(self, result: Result) -> None:
        self._let_go()
        self.result = result
        self.transfers += 1
        self.command &= ~Command.RUN
        if self.command & Command.IRQ:
            self._on_done()

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._region is not None:
            # Before the release, which is what lets an unmap go on: nothing that the
            # unmap allows can then have an earlier time.
            self.released_at = self._now()
            self._region.release()
            self._region = None

    def _faulted(self) -> None:
        if self._region is None:
            return
        self.faulted_at = self._now()
        if self.fault_policy == FaultPolicy.RELEASE:
            self._complete(Result.ABORTED)

    def _now(self) -> int:
        return int(self._loop.clock() * 1e9)
