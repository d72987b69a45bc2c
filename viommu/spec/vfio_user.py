"""vfio-user: header, commands and payloads of messages on a UNIX stream socket.

Source: QEMU, ``docs/interop/vfio-user.rst``. Host byte order, which is
little-endian wherever this package runs. Payloads that vfio-user shares with
the kernel (region and interrupt information) are in :mod:`viommu.spec.vfio`.
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_char, c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "DEVICE_FEATURE",
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
    "IO_FD_NONE",
    "MAX_DATA_TRANSFER",
    "MAX_MESSAGE",
    "MIG_DATA",
    "MULTI_WRITE",
    "MULTI_WRITES",
    "MULTI_WRITE_DATA",
    "REGION_ACCESS",
    "REGION_IO_FDS",
    "SHADOW_SUB_REGION",
    "SUB_REGION",
    "VERSION",
    "VERSION_MAJOR",
    "VERSION_MINOR",
    "Command",
    "DeviceInfo",
    "DmaAccess",
    "DmaMap",
    "DmaUnmap",
    "Header",
    "IoFdType",
    "MigData",
    "MultiWrite",
    "RegionAccess",
    "RegionIoFds",
    "ShadowSubRegion",
    "SubRegion",
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

IO_FD_NONE: Final = 0xFFFFFFFF  # ``fd_index`` of a sub-region without a file descriptor
MULTI_WRITE_DATA: Final = 8  # bytes, of which a write in REGION_WRITE_MULTI uses its count


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


class IoFdType(enum.IntEnum):
    """``type`` of a sub-region; the last is libvfio-user's."""

    IOEVENTFD = 0
    IOREGIONFD = 1
    IOEVENTFD_SHADOW = 2


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


class SubRegion(Struct):
    """What one file descriptor of DEVICE_GET_REGION_IO_FDS stands for, 40 bytes.

    ``data`` is ``datamatch`` of an ioeventfd, ``user_data`` of an ioregionfd.
    """

    if TYPE_CHECKING:
        offset: int
        size: int
        fd_index: int
        type: int
        flags: int
        reserved: int
        data: int
    else:
        _fields_ = (
            ("offset", c_uint64),
            ("size", c_uint64),
            ("fd_index", c_uint32),
            ("type", c_uint32),
            ("flags", c_uint32),
            ("reserved", c_uint32),
            ("data", c_uint64),
        )


class ShadowSubRegion(Struct):
    """The same as libvfio-user has it, 48 bytes; not in the specification.

    The last two are those of an ioeventfd. An ioregionfd is a :class:`SubRegion`
    here too, and 8 bytes.
    """

    if TYPE_CHECKING:
        offset: int
        size: int
        fd_index: int
        type: int
        flags: int
        shadow_fd_index: int
        shadow_offset: int
        data: int
    else:
        _fields_ = (
            ("offset", c_uint64),
            ("size", c_uint64),
            ("fd_index", c_uint32),
            ("type", c_uint32),
            ("flags", c_uint32),
            ("shadow_fd_index", c_uint32),
            ("shadow_offset", c_uint64),
            ("data", c_uint64),
        )


class RegionAccess(Struct):
    """REGION_READ and REGION_WRITE, 16 bytes; data follows where there is some."""

    if TYPE_CHECKING:
        offset: int
        region: int
        count: int
    else:
        _fields_ = (("offset", c_uint64), ("region", c_uint32), ("count", c_uint32))


class MultiWrite(Struct):
    """One write of REGION_WRITE_MULTI, 24 bytes; a count of writes (u64) is before the first."""

    if TYPE_CHECKING:
        offset: int
        region: int
        count: int
        data: bytes
    else:
        _fields_ = (
            ("offset", c_uint64),
            ("region", c_uint32),
            ("count", c_uint32),
            ("data", c_char * MULTI_WRITE_DATA),
        )


class MigData(Struct):
    """MIG_DATA_READ and MIG_DATA_WRITE, 8 bytes; data follows where there is some."""

    if TYPE_CHECKING:
        argsz: int
        size: int
    else:
        _fields_ = (("argsz", c_uint32), ("size", c_uint32))


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
SUB_REGION: Final = struct.Struct("<QQIIIIQ")  # offset, size, fd, type, flags, reserved, data
# offset, size, fd, type, flags, shadow fd, shadow offset, data
SHADOW_SUB_REGION: Final = struct.Struct("<QQIIIIQQ")
REGION_ACCESS: Final = struct.Struct("<QII")  # offset, region, count
MULTI_WRITES: Final = struct.Struct("<Q")  # how many
MULTI_WRITE: Final = struct.Struct("<QII8s")  # offset, region, count, data
# argsz, flags; data follows. The kernel's :class:`~viommu.spec.vfio_host.DeviceFeature`.
DEVICE_FEATURE: Final = struct.Struct("<II")
MIG_DATA: Final = struct.Struct("<II")  # argsz, size
DMA_ACCESS: Final = struct.Struct("<QQ")  # address, count

HEADER_SIZE: Final = HEADER.size
MAX_DATA_TRANSFER: Final = 1 << 20  # what a peer may assume when the other side names none
MAX_MESSAGE: Final = HEADER_SIZE + REGION_ACCESS.size + MAX_DATA_TRANSFER
