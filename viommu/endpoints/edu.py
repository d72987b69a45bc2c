"""``edu``: QEMU's educational PCI device, with a DMA engine that can be held.

Source: QEMU's ``docs/specs/edu.rst``. Differences: a DMA outside the device's
buffer is an error instead of undefined, addresses have 64 bits, the interrupt is
MSI only (no pin), a transfer takes no 100 ms, and there are the registers from
:data:`~viommu.endpoints.edu_registers.EXTENSION_START` on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from viommu.endpoints.edu_dma import DmaEngine
from viommu.endpoints.edu_registers import (
    BAR_SIZE,
    DEVICE_ID,
    EXTENSION_START,
    IDENTIFICATION,
    REVISION,
    VENDOR_ID,
    WIDE_START,
    Interrupt,
    Register,
    StatusBit,
)
from viommu.pci.config_space import Identity
from viommu.pci.function import PciFunction

if TYPE_CHECKING:
    from viommu.endpoints.dma import EndpointDma
    from viommu.loop import Loop
    from viommu.memory import GuestMemory
    from viommu.pci.function import ResetKind

__all__ = ["EduFunction"]

_CLASS_OTHERS: Final = 0x00FF00
_MASK_32: Final = 0xFFFF_FFFF

# 34! is the first factorial that 2**32 divides: it and all later ones are 0 here.
_FACTORIAL_IS_ZERO: Final = 34


class EduFunction(PciFunction):
    """The device: registers in BAR0, one MSI vector, one DMA engine.

    ``hold_ms`` is how long transfers keep their memory exported unless the
    driver says otherwise.
    """

    def __init__(
        self, name: str, memory: GuestMemory, dma: EndpointDma, loop: Loop, *, hold_ms: int = 0
    ) -> None:
        super().__init__(
            name, memory, Identity(VENDOR_ID, DEVICE_ID, _CLASS_OTHERS, revision=REVISION)
        )
        self.dma = dma
        self.engine = DmaEngine(dma, loop, self._dma_done, hold_ms=hold_ms)
        self._loop = loop
        self._forget()
        self.add_msi(1)
        self.add_bar(0, BAR_SIZE, self)

    def read(self, offset: int, count: int) -> bytes:
        """Read a register; what is not there, or too wide or narrow, reads as ones."""
        if count == 4 or (count == 8 and offset >= WIDE_START):
            if (value := self._load(offset)) is not None:
                return (value & (1 << 8 * count) - 1).to_bytes(count, "little")
            if offset > EXTENSION_START and offset % 8 == 4 and count == 4:
                value = self._load(offset - 4)
                if value is not None:
                    return (value >> 32).to_bytes(count, "little")
        return b"\xff" * count

    def write(self, offset: int, data: bytes) -> None:
        """Write a register; what is not there, or too wide or narrow, is ignored."""
        if len(data) == 4 or (len(data) == 8 and offset >= WIDE_START):
            self._store(offset, int.from_bytes(data, "little"))

    def on_bus_master(self, *, enabled: bool) -> None:
        """Allow or forbid DMA; a transfer under way ends."""
        if not enabled:
            self.engine.abort()
        self.dma.enabled = enabled

    def on_reset(self, kind: ResetKind) -> None:
        """Return to the state after power-on, whoever asks."""
        del kind
        self.engine.reset()
        self._forget()

    def _forget(self) -> None:
        self._liveness = 0
        self._factorial = 0
        self._status = 0
        self._irq_status = 0

    def _load(self, offset: int) -> int | None:
        engine = self.engine
        match offset:
            case Register.ID:
                return IDENTIFICATION
            case Register.LIVENESS:
                return self._liveness
            case Register.FACTORIAL:
                return self._factorial
            case Register.STATUS:
                return self._status
            case Register.IRQ_STATUS:
                return self._irq_status
            case Register.DMA_SOURCE:
                return engine.source
            case Register.DMA_DESTINATION:
                return engine.destination
            case Register.DMA_COUNT:
                return engine.count
            case Register.DMA_COMMAND:
                return engine.command
            case Register.HOLD:
                return engine.hold_ms
            case Register.FAULT_POLICY:
                return engine.fault_policy
            case Register.RESULT:
                return engine.result
            case Register.TRANSFERS:
                return engine.transfers
            case Register.EXPORTED_AT:
                return engine.exported_at
            case Register.FAULTED_AT:
                return engine.faulted_at
            case Register.RELEASED_AT:
                return engine.released_at
            case _:
                return None

    def _store(self, offset: int, value: int) -> None:
        engine = self.engine
        match offset:
            case Register.LIVENESS:
                self._liveness = ~value & _MASK_32
            case Register.FACTORIAL:
                self._compute(value)
            case Register.STATUS:
                kept = self._status & ~StatusBit.IRQ_WHEN_COMPUTED
                self._status = kept | value & StatusBit.IRQ_WHEN_COMPUTED
            case Register.IRQ_RAISE:
                self._interrupt(value)
            case Register.IRQ_ACK:
                self._irq_status &= ~value
            case Register.HOLD:
                engine.hold_ms = value
            case Register.FAULT_POLICY:
                engine.fault_policy = value
            case _ if engine.running:
                pass  # the registers of a transfer under way can't be written
            case Register.DMA_SOURCE:
                engine.source = value
            case Register.DMA_DESTINATION:
                engine.destination = value
            case Register.DMA_COUNT:
                engine.count = value
            case Register.DMA_COMMAND:
                engine.start(value)
            case _:
                pass

    def _compute(self, value: int) -> None:
        """Start a factorial; drivers must see the device compute, so it takes a turn."""
        if self._status & StatusBit.COMPUTING:
            return
        self._factorial = value
        self._status |= StatusBit.COMPUTING
        self._loop.call_soon(self._computed)

    def _computed(self) -> None:
        if not self._status & StatusBit.COMPUTING:
            return  # a reset came first
        value = self._factorial
        self._factorial = math.factorial(value) & _MASK_32 if value < _FACTORIAL_IS_ZERO else 0
        self._status &= ~StatusBit.COMPUTING
        if self._status & StatusBit.IRQ_WHEN_COMPUTED:
            self._interrupt(Interrupt.FACTORIAL)

    def _dma_done(self) -> None:
        self._interrupt(Interrupt.DMA)

    def _interrupt(self, bits: int) -> None:
        self._irq_status |= bits
        if self._irq_status:
            self.raise_msi(0)
