"""An endpoint's surroundings made of the real parts: memory, mapper, DMA port and a clock."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from viommu.basic import BasicMemoryMapper
from viommu.endpoints.dma import EndpointDma
from viommu.errors import Access, GuestMemoryError
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory.by_message import MessageMemory
from viommu.memory.files import MappedFiles
from viommu.memory.guest import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.errors import TranslationFault
    from viommu.events import Event

__all__ = ["MEMORY_KINDS", "PAGE", "RAM_SIZE", "READ_WRITE", "Port", "Rig", "make_rig"]

PAGE: Final = 4096
RAM_SIZE: Final = 4 << 20
READ_WRITE: Final = Access.READ | Access.WRITE
MEMORY_KINDS: Final = ["shared", "by message"]


class Port:
    """A VMM that reads and writes its memory for the device, unless it refuses."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.refused: range = range(0)
        self.written: list[int] = []

    def read(self, gpa: int, size: int) -> bytes:
        self._check(gpa, size)
        return self.memory.read(gpa, size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self._check(gpa, len(data))
        self.memory.write(gpa, data)
        self.written.append(gpa)

    def _check(self, gpa: int, size: int) -> None:
        if gpa < self.refused.stop and self.refused.start < gpa + size:
            raise GuestMemoryError(gpa, size, "the VMM refuses")


class Rig:
    """Guest memory at GPA 0, a mapper with nothing mapped, and a clock that tests turn.

    ``memory`` is the guest's. The device reaches the same, or another that is its
    like ``by message``.
    """

    def __init__(self, kind: str = "shared") -> None:
        self.now = 1000.0
        self.loop = Loop(clock=lambda: self.now)
        self.files = MappedFiles()
        self.memory = GuestMemory()
        fd = os.memfd_create("guest")
        os.ftruncate(fd, RAM_SIZE)
        file = self.files.get(fd, 0, RAM_SIZE, writable=True)
        os.close(fd)
        self.memory.map(0, RAM_SIZE, readable=True, writable=True, file=file, offset=0)
        self.port = Port(self.memory)
        self.device_memory = self.memory
        if kind == "by message":
            self.device_memory = behind = MessageMemory()
            behind.map(0, RAM_SIZE, readable=True, writable=True, file=None)
            behind.port = self.port
        self.mapper = BasicMemoryMapper()
        self.faults: list[TranslationFault] = []
        self.dma = EndpointDma(self.mapper, self.device_memory, self.faults.append, self.loop)
        self.dma.enabled = True
        self._resolutions: list[Event] = []

    def map(self, iova: int, gpa: int, size: int, access: Access = READ_WRITE) -> None:
        """Map as the guest would."""
        self.mapper.add_map(MappingInfo(iova, gpa, size, access))

    def unmap(self, iova: int, size: int) -> Event | None:
        """Unmap as the guest would; return what its reply waits for."""
        result = self.mapper.remove_map(iova, size)
        assert result.ok
        if result.resolution is not None:
            self._resolutions.append(result.resolution)
        return result.resolution

    def advance(self, seconds: float) -> None:
        """Let time pass, then run what is due."""
        self.now += seconds
        self.loop.turn(0)

    @property
    def exports(self) -> int:
        """How many ranges are exported."""
        return self.mapper.exports.total

    def close(self) -> None:
        """Release everything."""
        # A caught fault keeps the frames that it passed, and they keep views of memory.
        self.faults.clear()
        self.dma.close()
        self.device_memory.close()
        self.memory.close()
        self.loop.close()
        for event in self._resolutions:
            event.close()


@contextmanager
def make_rig(kind: str = "shared") -> Iterator[Rig]:
    """A rig that is closed, and found without a leaked export, at the end."""
    rig = Rig(kind)
    try:
        yield rig
        rig.dma.drop_views()
        assert not rig.exports
    finally:
        rig.close()
