"""A driver of ``edu`` in Python: its DMA engine above all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu.endpoints.edu_registers import (
    BUFFER_START,
    DEVICE_ID,
    VENDOR_ID,
    Command,
    FaultPolicy,
    Interrupt,
    Register,
    StatusBit,
)
from viommu.errors import UsageError
from viommu.testing.driver import DEFAULT_TIMEOUT
from viommu.testing.pci_driver import PciDriver, wait_for

if TYPE_CHECKING:
    from viommu.vfio_user.client import Client

__all__ = ["EduDriver", "Times"]

_BAR: Final = 0


class Times(NamedTuple):
    """What happened when to the last transfer: CLOCK_MONOTONIC nanoseconds, 0 for never."""

    exported: int
    faulted: int
    released: int


class EduDriver:
    """Drives the ``edu`` behind ``client``. Completion is an MSI; every wait has an end."""

    def __init__(self, client: Client, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.timeout = timeout
        self.pci = PciDriver(client)
        vendor, device = self.pci.config_read(0, 2), self.pci.config_read(2, 2)
        if (vendor, device) != (VENDOR_ID, DEVICE_ID):
            raise UsageError(f"{vendor:04x}:{device:04x} is no edu")
        self.pci.set_bus_master()
        self._event = self.pci.enable_msi()

    def read(self, register: Register) -> int:
        """Read a register: 4 bytes below 0x80, 8 from there on."""
        return self.pci.read(_BAR, register, _width(register))

    def write(self, register: Register, value: int) -> None:
        """Write a register; returns when the device has it."""
        self.pci.write(_BAR, register, value, _width(register))

    def hold(self, milliseconds: int, policy: FaultPolicy = FaultPolicy.FINISH) -> None:
        """Have later transfers keep their memory exported that long."""
        self.write(Register.HOLD, milliseconds)
        self.write(Register.FAULT_POLICY, policy)

    def start_write(self, iova: int, count: int, *, offset: int = 0) -> None:
        """Start a transfer from the device's buffer at ``offset`` to memory; don't wait."""
        self._start(BUFFER_START + offset, iova, count, Command.TO_MEMORY)

    def start_read(self, iova: int, count: int, *, offset: int = 0) -> None:
        """Start a transfer from memory to the device's buffer at ``offset``; don't wait."""
        self._start(iova, BUFFER_START + offset, count, Command(0))

    def write_memory(self, iova: int, count: int, *, offset: int = 0) -> int:
        """Do a transfer to memory and return its result."""
        self.start_write(iova, count, offset=offset)
        return self.wait()

    def read_memory(self, iova: int, count: int, *, offset: int = 0) -> int:
        """Do a transfer from memory and return its result."""
        self.start_read(iova, count, offset=offset)
        return self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the transfer and return its result.

        Raises:
            TimeoutError: It is still running after ``timeout`` seconds, by default
                the driver's.
        """
        wait_for(
            self._event,
            lambda: not self.busy,
            self.timeout if timeout is None else timeout,
            "end of the transfer",
        )
        self.write(Register.IRQ_ACK, Interrupt.DMA)
        return self.read(Register.RESULT)

    @property
    def busy(self) -> bool:
        """Whether a transfer is under way."""
        return bool(self.read(Register.DMA_COMMAND) & Command.RUN)

    @property
    def times(self) -> Times:
        """When the last transfer exported, was hit by an IOMMU fault, and released."""
        return Times(
            self.read(Register.EXPORTED_AT),
            self.read(Register.FAULTED_AT),
            self.read(Register.RELEASED_AT),
        )

    def factorial(self, value: int) -> int:
        """Have the device compute a factorial modulo 2**32, with an interrupt at its end."""
        self.write(Register.STATUS, StatusBit.IRQ_WHEN_COMPUTED)
        self.write(Register.FACTORIAL, value)
        wait_for(
            self._event,
            lambda: not self.read(Register.STATUS) & StatusBit.COMPUTING,
            self.timeout,
            "factorial",
        )
        self.write(Register.IRQ_ACK, Interrupt.FACTORIAL)
        return self.read(Register.FACTORIAL)

    def close(self) -> None:
        """Stop the device's DMA and interrupts."""
        self.pci.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, source: int, destination: int, count: int, direction: Command) -> None:
        self.write(Register.DMA_SOURCE, source)
        self.write(Register.DMA_DESTINATION, destination)
        self.write(Register.DMA_COUNT, count)
        self.write(Register.DMA_COMMAND, Command.RUN | Command.IRQ | direction)


def _width(register: Register) -> int:
    return 8 if register >= Register.DMA_SOURCE else 4
