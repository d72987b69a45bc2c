"""A device that works out the CRC-32 of memory: one register bank, one DMA."""

from __future__ import annotations

import struct
import zlib

from viommu.endpoints import EndpointKind, Place
from viommu.errors import GuestMemoryError, TranslationFault
from viommu.pci import Identity, PciFunction, ResetKind

ADDRESS = 0x00  # where the memory begins, 64 bits
SIZE = 0x08  # how many bytes, 64 bits; a write starts the work
CRC = 0x10  # the result, 32 bits
STATUS = 0x14  # 0 nothing done, 1 done, 2 out of reach; 32 bits
BAR_SIZE = 4096
MAX_SIZE = 1 << 20  # a driver can't keep others waiting with a larger one


class Crc(PciFunction):
    """The function: BAR 0 has the registers, its one MSI vector tells of the end."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.name, place.memory, Identity(0x1234, 0xC4C3, class_code=0x00FF00))
        self.dma = place.dma
        self.registers = bytearray(BAR_SIZE)
        self.add_bar(0, BAR_SIZE, self)
        self.add_msi(1)

    def read(self, offset: int, count: int) -> bytes:
        """Answer a read of BAR 0, which has any width and alignment."""
        return bytes(self.registers[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Take a write to BAR 0."""
        self.registers[offset : offset + len(data)] = data
        if offset == SIZE:
            self.work()

    def work(self) -> None:
        """Read memory by DMA: an address that the driver has no right to is its mistake."""
        address, size = struct.unpack_from("<QQ", self.registers, ADDRESS)
        try:
            result = zlib.crc32(self.dma.read(address, min(size, MAX_SIZE))), 1
        except (TranslationFault, GuestMemoryError):
            result = 0, 2
        struct.pack_into("<II", self.registers, CRC, *result)
        self.raise_msi(0)

    def on_bus_master(self, *, enabled: bool) -> None:
        """Follow COMMAND.BUS_MASTER: without it there is no DMA."""
        self.dma.enabled = enabled

    def on_reset(self, kind: ResetKind) -> None:
        """Be as after power-on, whoever asks."""
        del kind
        self.registers[:] = bytes(BAR_SIZE)


KIND = EndpointKind("a CRC-32 of memory", {}, lambda place, _: Crc(place))
