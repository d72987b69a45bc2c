"""The registers of ``edu`` in BAR0, QEMU's and our own.

Source: QEMU's ``docs/specs/edu.rst`` for everything below :data:`EXTENSION_START`.
The rest is ours: registers that let a driver hold a transfer open, so that a DMA
in flight can meet an unmap, and see afterwards what happened when.

Below 0x80 accesses are 4 bytes wide, from there on 4 or 8. As in QEMU a 4-byte
access to a 64-bit register concerns its low half and the high half can't be
reached by itself; the high half of *our* registers is 4 bytes further.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = [
    "BAR_SIZE",
    "BUFFER_SIZE",
    "BUFFER_START",
    "DEVICE_ID",
    "EXTENSION_START",
    "IDENTIFICATION",
    "MAX_HOLD_MS",
    "REVISION",
    "VENDOR_ID",
    "WIDE_START",
    "Command",
    "FaultPolicy",
    "Interrupt",
    "Register",
    "Result",
    "StatusBit",
]

VENDOR_ID: Final = 0x1234
DEVICE_ID: Final = 0x11E8
REVISION: Final = 0x10
IDENTIFICATION: Final = 0x010000ED

BAR_SIZE: Final = 1 << 20

# The device's own memory, as its DMA engine addresses it.
BUFFER_START: Final = 0x40000
BUFFER_SIZE: Final = 4096

WIDE_START: Final = 0x80
EXTENSION_START: Final = 0x200

# An unmap waits for a held transfer, a guest CPU waits for the unmap with its
# interrupts off, and Linux's watchdog loses patience after ten seconds.
MAX_HOLD_MS: Final = 5000


class Register(enum.IntEnum):
    """Offsets in BAR0. From ``HOLD`` on they are our own."""

    ID = 0x00  # read-only
    LIVENESS = 0x04  # reads as the inverse of what was written
    FACTORIAL = 0x08  # write n, read n! mod 2**32 once COMPUTING is clear
    STATUS = 0x20
    IRQ_STATUS = 0x24  # read-only
    IRQ_RAISE = 0x60  # write-only
    IRQ_ACK = 0x64  # write-only
    DMA_SOURCE = 0x80
    DMA_DESTINATION = 0x88
    DMA_COUNT = 0x90
    DMA_COMMAND = 0x98

    HOLD = 0x200  # how long later transfers keep their memory exported, milliseconds
    FAULT_POLICY = 0x208  # FaultPolicy of later IOMMU faults
    RESULT = 0x210  # Result of the last transfer, read-only like all that follow
    TRANSFERS = 0x218  # transfers ended since the last reset, well or not
    EXPORTED_AT = 0x220  # when the last one exported its memory, CLOCK_MONOTONIC nanoseconds
    FAULTED_AT = 0x228  # when an IOMMU fault hit it, 0 if none did
    RELEASED_AT = 0x230  # when it released its memory, 0 before


class StatusBit(enum.IntFlag):
    """Bits of :attr:`Register.STATUS`."""

    COMPUTING = 0x01  # read-only
    IRQ_WHEN_COMPUTED = 0x80


class Interrupt(enum.IntFlag):
    """Bits of :attr:`Register.IRQ_STATUS` that the device itself raises."""

    FACTORIAL = 0x001
    DMA = 0x100


class Command(enum.IntFlag):
    """Bits of :attr:`Register.DMA_COMMAND`; ``RUN`` reads as set until the transfer ended."""

    RUN = 0x1
    TO_MEMORY = 0x2
    IRQ = 0x4


class FaultPolicy(enum.IntEnum):
    """What a held transfer does when its memory is unmapped."""

    FINISH = 0  # hold on until the time has passed, then move the data
    RELEASE = 1  # let go at once, the data is not moved


class Result(enum.IntEnum):
    """How the last transfer ended."""

    OK = 0
    TRANSLATION_FAULT = 1  # not mapped, or not for this direction
    BAD_RANGE = 2  # outside the device's buffer, or past the last address
    ABORTED = 3  # by an IOMMU fault, or bus mastering was switched off
    NO_MEMORY = 4  # mapped, but no guest memory there
