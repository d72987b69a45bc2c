"""vfio-user's iommufd commands: I/O address spaces (IOAS) that a client programs by name.

Source: ``include/vfio-user.h`` of libvfio-user pull request 833, commit 304407498bfd,
which is not merged. Names and layouts follow Linux's ``<linux/iommufd.h>``; the bits of
flags do **not**: here WRITEABLE comes first and READABLE second, the other way round
than in DMA_MAP. ``FIXED_IOVA`` is viommu's own, far from what upstream may number next,
and only understood where the capability :data:`CAPABILITY_OF_VIOMMU` was negotiated.
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_int32, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "ALLOC_IOAS",
    "ATTACH_PT",
    "ATTACH_PT_F_PASID",
    "BIND",
    "CAPABILITY",
    "CAPABILITY_OF_VIOMMU",
    "DESTROY_IOAS",
    "DETACH_PT",
    "DETACH_PT_F_PASID",
    "IOAS_COPY",
    "IOAS_MAP",
    "IOAS_UNMAP",
    "IOAS_UNMAP_F_ALL",
    "MAP_F_FIXED_IOVA",
    "MAP_F_READABLE",
    "MAP_F_WRITEABLE",
    "AllocIoas",
    "AttachPt",
    "Bind",
    "DestroyIoas",
    "DetachPt",
    "IoasCopy",
    "IoasMap",
    "IoasUnmap",
    "IommufdCommand",
]

# Names of capabilities in the JSON of VERSION.
CAPABILITY: Final = "iommufd"  # {"supported": true}
CAPABILITY_OF_VIOMMU: Final = "viommu"  # {"fixed_iova": true}

# IOAS_MAP; viommu takes the same for IOAS_COPY, for which upstream defines no flags.
MAP_F_WRITEABLE: Final = 1 << 0
MAP_F_READABLE: Final = 1 << 1
MAP_F_FIXED_IOVA: Final = 1 << 31

IOAS_UNMAP_F_ALL: Final = 1 << 0
ATTACH_PT_F_PASID: Final = 1 << 0
DETACH_PT_F_PASID: Final = 1 << 0


class IommufdCommand(enum.IntEnum):
    """``command`` of a header; all of them go from client to server."""

    ALLOC_IOAS = 19
    DESTROY_IOAS = 20
    IOAS_MAP = 21
    IOAS_UNMAP = 22
    IOAS_COPY = 23
    BIND = 24
    ATTACH_PT = 25
    DETACH_PT = 26


class AllocIoas(Struct):
    """ALLOC_IOAS, 16 bytes; the reply has ``out_ioas_id``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        out_ioas_id: int
        reserved: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("out_ioas_id", c_uint32),
            ("reserved", c_uint32),
        )


class DestroyIoas(Struct):
    """DESTROY_IOAS, 16 bytes."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        ioas_id: int
        reserved: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("ioas_id", c_uint32),
            ("reserved", c_uint32),
        )


class IoasMap(Struct):
    """IOAS_MAP, 48 bytes; ``offset`` is into the file that comes with the message.

    The reply has ``iova``; in the request it counts with FIXED_IOVA only.
    """

    if TYPE_CHECKING:
        argsz: int
        flags: int
        ioas_id: int
        reserved: int
        user_va: int
        length: int
        iova: int
        offset: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("ioas_id", c_uint32),
            ("reserved", c_uint32),
            ("user_va", c_uint64),
            ("length", c_uint64),
            ("iova", c_uint64),
            ("offset", c_uint64),
        )


class IoasUnmap(Struct):
    """IOAS_UNMAP, 32 bytes."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        ioas_id: int
        reserved: int
        iova: int
        length: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("ioas_id", c_uint32),
            ("reserved", c_uint32),
            ("iova", c_uint64),
            ("length", c_uint64),
        )


class IoasCopy(Struct):
    """IOAS_COPY, 40 bytes; the reply has ``dst_iova``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        src_ioas_id: int
        dst_ioas_id: int
        src_iova: int
        dst_iova: int
        length: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("src_ioas_id", c_uint32),
            ("dst_ioas_id", c_uint32),
            ("src_iova", c_uint64),
            ("dst_iova", c_uint64),
            ("length", c_uint64),
        )


class Bind(Struct):
    """BIND, 16 bytes; the reply has ``out_devid``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        iommufd: int
        out_devid: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("iommufd", c_int32),
            ("out_devid", c_uint32),
        )


class AttachPt(Struct):
    """ATTACH_PT, 16 bytes; ``pt_id`` is an IOAS."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        pt_id: int
        pasid: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("pt_id", c_uint32),
            ("pasid", c_uint32),
        )


class DetachPt(Struct):
    """DETACH_PT, 16 bytes."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        pasid: int
        reserved: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("pasid", c_uint32),
            ("reserved", c_uint32),
        )


# Messages are decoded with struct; tests prove these equal to the structures.
ALLOC_IOAS: Final = struct.Struct("<IIII")  # argsz, flags, out_ioas_id, reserved
DESTROY_IOAS: Final = struct.Struct("<IIII")  # argsz, flags, ioas_id, reserved
# argsz, flags, ioas_id, reserved, user_va, length, iova, offset
IOAS_MAP: Final = struct.Struct("<IIIIQQQQ")
IOAS_UNMAP: Final = struct.Struct("<IIIIQQ")  # argsz, flags, ioas_id, reserved, iova, length
# argsz, flags, src_ioas_id, dst_ioas_id, src_iova, dst_iova, length
IOAS_COPY: Final = struct.Struct("<IIIIQQQ")
BIND: Final = struct.Struct("<IIiI")  # argsz, flags, iommufd, out_devid
ATTACH_PT: Final = struct.Struct("<IIII")  # argsz, flags, pt_id, pasid
DETACH_PT: Final = struct.Struct("<IIII")  # argsz, flags, pasid, reserved
