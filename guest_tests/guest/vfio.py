"""VFIO with a type 1 container: what a driver in user space needs, and no more.

Source: linux/vfio.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from typing import TYPE_CHECKING, Self

from guest_tests.guest import pci

if TYPE_CHECKING:
    from types import TracebackType

__all__: list[str] = []

_SET_IOMMU = 0x3B66  # VFIO_SET_IOMMU and so on: _IO(';', 100 + 2)
_GROUP_GET_STATUS = 0x3B67
_GROUP_SET_CONTAINER = 0x3B68
_GROUP_GET_DEVICE_FD = 0x3B6A
_DEVICE_GET_REGION_INFO = 0x3B6C
_IOMMU_MAP_DMA = 0x3B71
_IOMMU_UNMAP_DMA = 0x3B72

_TYPE1V2_IOMMU = 3
_GROUP_VIABLE = 1
_MAP_READ = 1
_MAP_WRITE = 2
_CONFIG_REGION = 7

_COMMAND = 4  # in configuration space
_COMMAND_MEMORY = 2
_COMMAND_MASTER = 4

_STATUS = struct.Struct("=II")  # argsz, flags
_REGION = struct.Struct("=IIIIQQ")  # argsz, flags, index, cap_offset, size, offset
_MAP = struct.Struct("=IIQQQ")  # argsz, flags, vaddr, iova, size
_UNMAP = struct.Struct("=IIQQ")  # argsz, flags, iova, size


class Memory:
    """Anonymous memory of ``size`` bytes, with an address that stays."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __getitem__(self, where: slice) -> bytes:
        """Return the bytes there."""
        return self._map[where]

    def __setitem__(self, where: slice, data: bytes) -> None:
        """Store bytes."""
        self._map[where] = data


class Device:
    """A PCI function in our hands: its configuration space and its BAR 0."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._config = self._region(_CONFIG_REGION)[1]
        size, offset = self._region(0)
        # A function without BAR 0 can still be moved about: give it something to look at.
        self._bar = mmap.mmap(fd, size, offset=offset) if size else mmap.mmap(-1, mmap.PAGESIZE)
        # One store or load of its width each: a register must not be touched byte by byte.
        self.registers32 = memoryview(self._bar).cast("I")
        self.registers64 = memoryview(self._bar).cast("Q")

    def enable(self, *, master: bool = True) -> None:
        """Let the function decode its BARs, and do DMA if ``master``."""
        command = _COMMAND_MEMORY | (_COMMAND_MASTER if master else 0)
        os.pwrite(self._fd, struct.pack("<H", command), self._config + _COMMAND)

    def close(self) -> None:
        """Give it back."""
        self.registers32.release()
        self.registers64.release()
        self._bar.close()
        os.close(self._fd)

    def _region(self, index: int) -> tuple[int, int]:
        """Return size and offset in the file of a region."""
        info = bytearray(_REGION.pack(_REGION.size, 0, index, 0, 0, 0))
        fcntl.ioctl(self._fd, _DEVICE_GET_REGION_INFO, info)
        *_, size, offset = _REGION.unpack(info)
        return size, offset


class Container:
    """One IOVA space for the functions ``bdfs``, which are bound to vfio-pci for it.

    A context manager: at its end functions and mappings are gone.
    """

    def __init__(self, *bdfs: str) -> None:
        self._closing = contextlib.ExitStack()
        self._fd = self._open("/dev/vfio/vfio")
        self.devices: dict[str, Device] = {}
        try:
            for bdf in bdfs:
                self.add(bdf)
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close everything."""
        self._closing.close()

    def add(self, bdf: str) -> None:
        """Bind a function to vfio-pci and move its group into this container."""
        pci.bind(bdf, "vfio-pci")
        group = self._open(f"/dev/vfio/{pci.group(bdf)}")
        status = bytearray(_STATUS.pack(_STATUS.size, 0))
        fcntl.ioctl(group, _GROUP_GET_STATUS, status)
        assert _STATUS.unpack(status)[1] & _GROUP_VIABLE, f"the group of {bdf} isn't ours alone"
        fcntl.ioctl(group, _GROUP_SET_CONTAINER, struct.pack("=i", self._fd))
        if not self.devices:
            fcntl.ioctl(self._fd, _SET_IOMMU, _TYPE1V2_IOMMU)
        # Only a mutable argument makes Python return what the call returned.
        name = bytearray(f"0000:{bdf}\0".encode())
        device = Device(fcntl.ioctl(group, _GROUP_GET_DEVICE_FD, name))
        self._closing.callback(device.close)
        self.devices[bdf] = device

    def map(
        self, iova: int, memory: Memory, *, offset: int = 0, size: int = 0, write: bool = True
    ) -> None:
        """Map ``size`` bytes (0: all) of ``memory`` at ``iova``, read-only unless ``write``."""
        flags = _MAP_READ | (_MAP_WRITE if write else 0)
        address = memory.address + offset
        request = _MAP.pack(_MAP.size, flags, address, iova, size or memory.size)
        fcntl.ioctl(self._fd, _IOMMU_MAP_DMA, request)

    def unmap(self, iova: int, size: int) -> int:
        """Remove what is mapped in the range; return how many bytes that were."""
        request = bytearray(_UNMAP.pack(_UNMAP.size, 0, iova, size))
        fcntl.ioctl(self._fd, _IOMMU_UNMAP_DMA, request)
        return int(_UNMAP.unpack(request)[3])

    def _open(self, path: str) -> int:
        fd = os.open(path, os.O_RDWR)
        self._closing.callback(os.close, fd)
        return fd
