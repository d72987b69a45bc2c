"""A host device as the kernel's VFIO shows it, in memory: configuration space, BARs, interrupts.

What the real kernel does with the same calls is tested in ``guest_tests/l1``.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from viommu.errors import BackendError
from viommu.spec import pci, vfio
from viommu_backends.vfio_device import HostIrq, HostRegion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.backends.fake_kernel import FakeIommufd

CONFIG = vfio.PCI_CONFIG_REGION_INDEX
PM, MSI, MSIX, EXPRESS, AF = 0x40, 0x50, 0x60, 0x70, 0xB0

# BAR 0 has the MSI-X table in its third page and the pending bits in its fourth.
BAR0, BAR2, PORTS, SMALL = 0x8000, 0x10000, 0x20, 0x100
_FLAGS = {0: pci.BAR_MEM_64, 2: pci.BAR_MEM_64 | pci.BAR_PREFETCH, 4: pci.BAR_IO, 5: 0}
_SIZES = {0: BAR0, 2: BAR2, 4: PORTS, 5: SMALL}
_START = {0: 0, 2: BAR0, 4: BAR0 + BAR2, 5: BAR0 + BAR2 + PORTS}
READ_WRITE = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
MAPPABLE = READ_WRITE | vfio.REGION_INFO_FLAG_MMAP
REQUEST = HostIrq(1, vfio.IRQ_INFO_EVENTFD)


class FakeVfioDevice:
    """:class:`~viommu_backends.vfio_device.VfioDevice` without a kernel.

    ``log`` is what was done to it, in order. ``busy`` counts resets that are refused;
    ``refuse`` has the errno for the interrupts that can't be had.
    """

    def __init__(
        self,
        *,
        can_reset: bool = True,
        resizable: bool = True,
        config_size: int = 4096,
        iommufd: FakeIommufd | None = None,
    ) -> None:
        self.name = "0000:04:00.0"
        self.can_reset = can_reset
        self.fd = os.memfd_create("bars")
        os.ftruncate(self.fd, 0x20000)
        self.regions = [HostRegion(0, 0, 0, ())] * 9
        for bar, size in _SIZES.items():
            flags = MAPPABLE if bar in {0, 2} else READ_WRITE
            self.regions[bar] = HostRegion(size, flags, _START[bar], ())
        self.regions[vfio.PCI_ROM_REGION_INDEX] = HostRegion(0x10000, 1, 0, ())
        self.regions[CONFIG] = HostRegion(config_size, READ_WRITE, 0, ())
        fixed = 0 if resizable else vfio.IRQ_INFO_NORESIZE
        self.irqs = [
            HostIrq(1, vfio.IRQ_INFO_EVENTFD),
            HostIrq(1, vfio.IRQ_INFO_EVENTFD | fixed),
            HostIrq(8, vfio.IRQ_INFO_EVENTFD | fixed),
            HostIrq(1, vfio.IRQ_INFO_EVENTFD),
            REQUEST,
        ]
        self.log: list[str] = []
        self.busy = 0
        self.refuse = 0
        self.gone = False
        self.eventfds: dict[int, dict[int, int]] = {}
        self.ioas: int | None = None
        self._iommufd = iommufd
        self._config = bytearray(config_size)
        self._writable = bytearray(config_size)
        self._define()

    # What VfioDevice has.

    def read(self, region: int, offset: int, size: int) -> bytes:
        self._present()
        if region == CONFIG:
            if offset + size > len(self._config):
                raise BackendError(errno.EINVAL, f"config {offset:#x}")
            return bytes(self._config[offset : offset + size])
        self._decoding(region)
        return os.pread(self.fd, size, self.regions[region].offset + offset)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self._present()
        if region == CONFIG:
            before = self.decodes
            for at, byte in enumerate(data, offset):
                mask = self._writable[at]
                self._config[at] = self._config[at] & ~mask | byte & mask
            if before != self.decodes:
                self.log.append("decode" if self.decodes else "decode not")
            return
        self._decoding(region)
        os.pwrite(self.fd, data, self.regions[region].offset + offset)

    def set_irqs(
        self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()
    ) -> None:
        self.log.append(f"irqs {index} {start}+{count} {sum(fd >= 0 for fd in fds)}")
        if not count:
            self._drop(index)
            return
        assert flags == vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
        if self.refuse and start + count > 1:
            raise BackendError(self.refuse, f"interrupts {index}")
        known = self.eventfds.get(index)
        size = self.irqs[index].count
        if start + count > size or (
            known is not None
            and self.irqs[index].flags & vfio.IRQ_INFO_NORESIZE
            and start + count > max(known) + 1
        ):
            raise BackendError(errno.EINVAL, f"interrupts {index} {start}+{count}")
        vectors = self.eventfds.setdefault(index, {})
        for vector, fd in enumerate(fds, start):
            if (old := vectors.pop(vector, -1)) >= 0:
                os.close(old)
            vectors[vector] = os.dup(fd) if fd >= 0 else -1

    def reset(self) -> None:
        if self.busy:
            self.busy -= 1
            raise BackendError(errno.EAGAIN, "reset")
        self.log.append("reset")

    def export_dma_buf(self, region: int, offset: int, size: int) -> int:
        if not self.decodes:
            raise BackendError(errno.ENODEV, f"dma-buf of BAR {region}")
        assert offset + size <= self.regions[region].size
        return os.dup(self.fd)

    def attach(self, number: int) -> int:
        assert self._iommufd is not None
        if number not in self._iommufd.spaces:
            raise BackendError(errno.ENOENT, "attach")
        self.detach()
        self.ioas = number
        self._iommufd.attached[number].add(self)  # type: ignore[arg-type] # one of its devices
        return number

    def detach(self) -> None:
        if self._iommufd is not None and self.ioas is not None:
            self._iommufd.attached[self.ioas].discard(self)
        self.ioas = None

    def close(self) -> None:
        self.detach()
        if self.fd >= 0:
            self.log.append("close")
            os.close(self.fd)
        self.fd = -1
        for index in list(self.eventfds):
            self._drop(index)

    # What tests look at.

    @property
    def decodes(self) -> bool:
        return bool(self._config[pci.COMMAND] & pci.COMMAND_MEMORY)

    @property
    def command(self) -> int:
        return int.from_bytes(self._config[pci.COMMAND : pci.COMMAND + 2], "little")

    def bar(self, bar: int) -> int:
        at = pci.BASE_ADDRESS_0 + 4 * bar
        return int.from_bytes(self._config[at : at + 4], "little")

    def signal(self, index: int, vector: int) -> None:
        """Raise an interrupt, as the kernel does when the device has."""
        os.eventfd_write(self.eventfds[index][vector], 1)

    def _drop(self, index: int) -> None:
        for fd in self.eventfds.pop(index, {}).values():
            if fd >= 0:
                os.close(fd)

    def _present(self) -> None:
        if self.gone or self.fd < 0:
            raise BackendError(errno.EIO, self.name)

    def _decoding(self, bar: int) -> None:
        enable = pci.COMMAND_IO if bar == 4 else pci.COMMAND_MEMORY
        if not self.command & enable:
            raise BackendError(errno.EIO, f"BAR {bar}")

    def _define(self) -> None:
        self._store(pci.VENDOR_ID, b"\x36\x1b\x10\x00")
        self._store(pci.COMMAND, b"\0\0", writable=b"\x07\x04")
        self._store(pci.STATUS, pci.STATUS_CAP_LIST.to_bytes(2, "little"))
        for bar, size in _SIZES.items():
            wide = bool(_FLAGS[bar] & pci.BAR_MEM_64)
            width = 8 if wide else 4
            mask = -size & (1 << 8 * width) - 1
            at = pci.BASE_ADDRESS_0 + 4 * bar
            self._store(at, bytes([_FLAGS[bar]]), writable=mask.to_bytes(width, "little"))
        self._store(pci.ROM_ADDRESS, bytes(4), writable=b"\1\0\xff\xff")
        self._store(pci.INTERRUPT_LINE, b"\0\1", writable=b"\xff\0")
        self._store(pci.CAPABILITY_LIST, bytes([PM]))
        self._store(PM, bytes([pci.CAP_ID_PM, MSI, 3, 0, 8, 0]), writable=bytes(4) + b"\3")
        self._store(MSI, bytes([pci.CAP_ID_MSI, MSIX, 0x80, 0]))
        table, pending = 0x2000, 0x3000
        self._store(MSIX, bytes([pci.CAP_ID_MSIX, EXPRESS]) + pci.MSIX.pack(7, table, pending))
        express = bytes([pci.CAP_ID_EXPRESS, AF, 2, 0]) + pci.EXP_DEVCAP_FLR.to_bytes(4, "little")
        self._store(EXPRESS, express, writable=bytes(8) + b"\xff\xff")
        self._store(AF, bytes([pci.CAP_ID_AF, 0, 6, 3, 0, 0]))

    def _store(self, at: int, data: bytes, *, writable: bytes = b"") -> None:
        self._config[at : at + len(data)] = data
        self._writable[at : at + len(writable)] = writable
