"""A small device for the server's tests: registers, a doorbell and a DMA engine."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from viommu.deferred import Deferred
from viommu.errors import PeerError
from viommu.memory import GuestMemory
from viommu.spec import vfio
from viommu.vfio_user import IrqInfo, RegionInfo

if TYPE_CHECKING:
    from viommu.vfio_user import IrqLines

BAR = 0  # registers
MAPPABLE = 1  # clients may map two areas of it
BIG = 2  # larger than a message
CONFIG = 7
RW = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE

DOORBELL = 0x10  # write a u32: raise that MSI-X vector
DMA_ADDRESS = 0x18  # u64: where the DMA engine writes
DMA_START = 0x20  # write a u32: store it at DMA_ADDRESS
REFUSED = 0x30  # any access is refused with ENXIO
DEFECT = 0x38  # any access hits a bug
SHORT = 0x40  # reads bring one byte less
LATER = 0x48  # any access is done when the test says so

MSIX_VECTORS = 2048


class HeldMemory(GuestMemory):
    """Guest memory that somebody may hold when it is unmapped."""

    def __init__(self) -> None:
        super().__init__()
        self.held = False
        self.releases: list[Deferred[None]] = []

    def unmap(self, gpa: int, size: int) -> Deferred[None] | None:
        super().unmap(gpa, size)
        return self._released()

    def unmap_all(self) -> Deferred[None] | None:
        super().unmap_all()
        return self._released()

    def _released(self) -> Deferred[None] | None:
        if not self.held:
            return None
        self.releases.append(Deferred())
        return self.releases[-1]


class RegisterBank:
    """Nine regions, five kinds of interrupt; what is written is read back."""

    name = "bank"
    num_regions = vfio.PCI_NUM_REGIONS
    num_irqs = vfio.PCI_NUM_IRQS

    def __init__(self) -> None:
        self.held_memory = HeldMemory()
        self.memory: GuestMemory = self.held_memory
        self.irqs: IrqLines | None = None
        self.resets = 0
        #: Whether a reset is done later, and what is to be done: reads, writes, resets.
        self.resets_later = False
        self.reads: list[Deferred[bytes]] = []
        self.writes: list[Deferred[None]] = []
        self.departures = 0
        self.memory_at_departure = 0
        self.store = os.memfd_create("bank", os.MFD_CLOEXEC)
        os.ftruncate(self.store, 0x10000)
        self.infos = {
            BAR: RegionInfo(0x1000, RW),
            MAPPABLE: RegionInfo(
                0x8000,
                RW | vfio.REGION_INFO_FLAG_MMAP,
                self.store,
                0x8000,
                ((0, 0x1000), (0x2000, 0x1000)),
            ),
            BIG: RegionInfo(0x200000, RW),
            CONFIG: RegionInfo(0x1000, RW),
        }
        self.bytes = {index: bytearray(info.size) for index, info in self.infos.items()}

    def close(self) -> None:
        os.close(self.store)

    def region_info(self, index: int) -> RegionInfo:
        return self.infos.get(index, RegionInfo(0, 0))

    def irq_info(self, index: int) -> IrqInfo:
        counts = {
            vfio.PCI_INTX_IRQ_INDEX: 1,
            vfio.PCI_MSIX_IRQ_INDEX: MSIX_VECTORS,
            vfio.PCI_ERR_IRQ_INDEX: 1,
            vfio.PCI_REQ_IRQ_INDEX: 1,
        }
        return IrqInfo(counts.get(index, 0), vfio.IRQ_INFO_EVENTFD)

    def region_read(self, index: int, offset: int, count: int) -> bytes | Deferred[bytes]:
        self._misbehave(index, offset)
        if (index, offset) == (BAR, LATER):
            self.reads.append(Deferred())
            return self.reads[-1]
        data = bytes(self.bytes[index][offset : offset + count])
        assert len(data) == count > 0, "the server checks bounds"
        return data[:-1] if (index, offset) == (BAR, SHORT) else data

    def region_write(self, index: int, offset: int, data: bytes) -> Deferred[None] | None:
        self._misbehave(index, offset)
        assert 0 < len(data) <= len(self.bytes[index]) - offset, "the server checks bounds"
        self.bytes[index][offset : offset + len(data)] = data
        if index == BAR and len(data) == 4:
            if offset == DOORBELL and self.irqs is not None:
                self.irqs.trigger(vfio.PCI_MSIX_IRQ_INDEX, int.from_bytes(data, "little"))
            if offset == DMA_START:
                (gpa,) = struct.unpack_from("<Q", self.bytes[BAR], DMA_ADDRESS)
                self.memory.write(gpa, data)
        return self._later() if (index, offset) == (BAR, LATER) else None

    def connect(self, irqs: IrqLines) -> None:
        assert self.irqs is None, "one client at a time"
        self.irqs = irqs

    def disconnect(self) -> None:
        assert self.irqs is not None
        self.irqs = None
        self.departures += 1
        self.memory_at_departure = len(self.memory.regions())
        for data in self.bytes.values():
            data[:] = bytes(len(data))

    def reset(self) -> Deferred[None] | None:
        self.resets += 1
        return self._later() if self.resets_later else None

    def _later(self) -> Deferred[None]:
        self.writes.append(Deferred())
        return self.writes[-1]

    def _misbehave(self, index: int, offset: int) -> None:
        if (index, offset) == (BAR, REFUSED):
            raise PeerError(6, "no such thing")
        if (index, offset) == (BAR, DEFECT):
            raise RuntimeError("a bug of the device")
