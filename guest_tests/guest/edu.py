"""The ``edu`` device from user space: registers and transfers.

Source: QEMU's docs/specs/edu.rst, and viommu/endpoints/edu_registers.py from 0x200 on.
"""

from __future__ import annotations

import time
from typing import Protocol

__all__: list[str] = []

BUFFER = 0x40000  # the device's own memory, as its DMA engine addresses it
BUFFER_SIZE = 4096

FINISH, RELEASE = 0, 1  # what a held transfer does when its memory is unmapped

_ID = 0x00
_LIVENESS = 0x04
_SOURCE = 0x80
_DESTINATION = 0x88
_COUNT = 0x90
_COMMAND = 0x98
_HOLD = 0x200
_FAULT_POLICY = 0x208
_RESULT = 0x210
_TIMES = {"exported": 0x220, "faulted": 0x228, "released": 0x230}

_IDENTIFICATION = 0x010000ED
_RUN = 1
_TO_MEMORY = 2
RESULTS = {0: "ok", 1: "translation fault", 2: "bad range", 3: "aborted", 4: "no memory"}
UNKNOWN = "not told"  # QEMU's own edu has no such register


class Registers(Protocol):
    """What is needed of a PCI function: its BAR 0, by words of either width."""

    @property
    def registers32(self) -> memoryview: ...

    @property
    def registers64(self) -> memoryview: ...

    def enable(self) -> None: ...


class Edu:
    """An ``edu`` function that decodes its BAR and may do DMA."""

    def __init__(self, device: Registers) -> None:
        self._words = device.registers32
        self._quads = device.registers64
        device.enable()
        assert self._words[_ID // 4] == _IDENTIFICATION, f"{self._words[_ID // 4]:#x} is no edu"
        self._words[_LIVENESS // 4] = 0x12345678
        assert self._words[_LIVENESS // 4] == 0xEDCBA987, "the edu isn't alive"
        if self.result() != UNKNOWN:
            self.hold(0)

    def read(self, iova: int, count: int, local: int = 0) -> str:
        """Let the device read ``count`` bytes at ``iova`` into its buffer; return the result."""
        self._start(iova, BUFFER + local, count, _RUN)
        return self.wait()

    def write(self, iova: int, count: int, local: int = 0) -> str:
        """Let the device write ``count`` bytes of its buffer to ``iova``; return the result."""
        self.start_write(iova, count, local)
        return self.wait()

    def start_write(self, iova: int, count: int, local: int = 0) -> None:
        """Start what :meth:`write` does, and return as soon as it has begun."""
        self._start(BUFFER + local, iova, count, _RUN | _TO_MEMORY)
        self.result()  # a read: what was written before it, and perhaps posted, has been done then

    def wait(self, timeout: float = 20.0) -> str:
        """Wait for the end of a transfer; return how it ended."""
        deadline = time.monotonic() + timeout
        while self._words[_COMMAND // 4] & _RUN:
            assert time.monotonic() < deadline, f"a transfer didn't end within {timeout} s"
            time.sleep(0.001)
        return self.result()

    def result(self) -> str:
        """Return how the last transfer ended."""
        return RESULTS.get(self._words[_RESULT // 4], UNKNOWN)

    def hold(self, milliseconds: int, policy: int = FINISH) -> None:
        """Let later transfers keep their memory exported for so long."""
        self._words[_HOLD // 4] = milliseconds
        self._words[_FAULT_POLICY // 4] = policy

    def times(self) -> dict[str, int]:
        """Return when the last transfer did what, nanoseconds of the host's clock, 0: never."""
        return {name: self._quads[register // 8] for name, register in _TIMES.items()}

    def _start(self, source: int, destination: int, count: int, command: int) -> None:
        self._quads[_SOURCE // 8] = source
        self._quads[_DESTINATION // 8] = destination
        self._quads[_COUNT // 8] = count
        self._quads[_COMMAND // 8] = command
