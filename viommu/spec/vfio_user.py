"""vfio-user: header, commands and payloads of messages on a UNIX stream socket.

Source: QEMU, ``docs/interop/vfio-user.rst``. Host byte order, which is
little-endian wherever this package runs. Payloads that vfio-user shares with
the kernel (region and interrupt information) are in :mod:`viommu.spec.vfio`.
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "DEVICE_INFO",
    "DMA_ACCESS",
    "DMA_MAP",
    "DMA_MAP_F_FILE_IO",
    "DMA_MAP_F_MMAP",
    "DMA_MAP_F_READ",
    "DMA_MAP_F_WRITE",
    "DMA_UNMAP",
    "DMA_UNMAP_F_ALL",
    "DMA_UNMAP_F_GET_DIRTY_BITMAP",
    "F_ERROR",
    "F_NO_REPLY",
    "F_TYPE_COMMAND",
    "F_TYPE_MASK",
    "F_TYPE_REPLY",
    "HEADER",
    "HEADER_SIZE",
    "MAX_DATA_TRANSFER",
    "MAX_MESSAGE",
    "REGION_ACCESS",
    "REGION_IO_FDS",
    "VERSION",
    "VERSION_MAJOR",
    "VERSION_MINOR",
    "Command",
    "DeviceInfo",
    "DmaAccess",
    "DmaMap",
    "DmaUnmap",
    "Header",
    "RegionAccess",
    "RegionIoFds",
    "Version",
]

VERSION_MAJOR: Final = 0
# 0.1 is what Cloud Hypervisor proposes; QEMU proposes 0.0.
VERSION_MINOR: Final = 1

# ``flags`` of a header: bits 0 to 3 are the type.
F_TYPE_MASK: Final = 0xF
F_TYPE_COMMAND: Final = 0
F_TYPE_REPLY: Final = 1
F_NO_REPLY: Final = 1 << 4
F_ERROR: Final = 1 << 5

DMA_MAP_F_READ: Final = 1 << 0
DMA_MAP_F_WRITE: Final = 1 << 1
# The last two are libvfio-user's; without either, a region with an fd is to be mmapped.
DMA_MAP_F_MMAP: Final = 1 << 2
DMA_MAP_F_FILE_IO: Final = 1 << 3

DMA_UNMAP_F_GET_DIRTY_BITMAP: Final = 1 << 0
DMA_UNMAP_F_ALL: Final = 1 << 1


class Command(enum.IntEnum):
    """``command`` of a header; DMA_READ and DMA_WRITE go from server to client."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Header(Struct):
    """The 16 bytes before every payload; ``size`` includes them."""

    if TYPE_CHECKING:
        id: int
        command: int
        size: int
        flags: int
        error: int
    else:
        _fields_ = (
            ("id", c_uint16),
            ("command", c_uint16),
            ("size", c_uint32),
            ("flags", c_uint32),
            ("error", c_uint32),
        )


class Version(Struct):
    """VERSION; NUL-terminated JSON may follow."""

    if TYPE_CHECKING:
        major: int
        minor: int
    else:
        _fields_ = (("major", c_uint16), ("minor", c_uint16))


class DmaMap(Struct):
    """DMA_MAP, 32 bytes; ``offset`` is into the file that comes with the message."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        offset: int
        address: int
        size: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("offset", c_uint64),
            ("address", c_uint64),
            ("size", c_uint64),
        )


class DmaUnmap(Struct):
    """DMA_UNMAP, 24 bytes; the reply echoes it."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        address: int
        size: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("address", c_uint64),
            ("size", c_uint64),
        )


class DeviceInfo(Struct):
    """DEVICE_GET_INFO, 16 bytes: the first fields of ``struct vfio_device_info``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        num_regions: int
        num_irqs: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("num_regions", c_uint32),
            ("num_irqs", c_uint32),
        )


class RegionIoFds(Struct):
    """DEVICE_GET_REGION_IO_FDS, 16 bytes; entries may follow in a reply."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        index: int
        count: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("index", c_uint32),
            ("count", c_uint32),
        )


class RegionAccess(Struct):
    """REGION_READ and REGION_WRITE, 16 bytes; data follows where there is some."""

    if TYPE_CHECKING:
        offset: int
        region: int
        count: int
    else:
        _fields_ = (("offset", c_uint64), ("region", c_uint32), ("count", c_uint32))


class DmaAccess(Struct):
    """DMA_READ and DMA_WRITE, 16 bytes; data follows where there is some."""

    if TYPE_CHECKING:
        address: int
        count: int
    else:
        _fields_ = (("address", c_uint64), ("count", c_uint64))


# Messages are decoded with struct; tests prove these equal to the structures.
HEADER: Final = struct.Struct("<HHIII")  # id, command, size, flags, error
VERSION: Final = struct.Struct("<HH")  # major, minor
DMA_MAP: Final = struct.Struct("<IIQQQ")  # argsz, flags, offset, address, size
DMA_UNMAP: Final = struct.Struct("<IIQQ")  # argsz, flags, address, size
DEVICE_INFO: Final = struct.Struct("<IIII")  # argsz, flags, num_regions, num_irqs
REGION_IO_FDS: Final = struct.Struct("<IIII")  # argsz, flags, index, count
REGION_ACCESS: Final = struct.Struct("<QII")  # offset, region, count
DMA_ACCESS: Final = struct.Struct("<QQ")  # address, count

HEADER_SIZE: Final = HEADER.size
MAX_DATA_TRANSFER: Final = 1 << 20  # what a peer may assume when the other side names none
MAX_MESSAGE: Final = HEADER_SIZE + REGION_ACCESS.size + MAX_DATA_TRANSFER
