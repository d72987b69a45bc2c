"""The kernel's VFIO: ioctl numbers, the type1 container, groups and devices.

Source: ``<linux/vfio.h>``. Every number is ``_IO(';', 100 + n)``, without size or
direction, and is used again for other kinds of fd. What VFIO says of regions and
interrupts is shared with vfio-user and is in :mod:`viommu.spec.vfio`.
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_int32, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "API_VERSION",
    "ATTACH_IOMMUFD_PT",
    "BIND_IOMMUFD",
    "CAP_DMA_AVAIL",
    "CAP_IOVA_RANGE",
    "CAP_MIGRATION",
    "DETACH_IOMMUFD_PT",
    "DEVICE_FEATURE_DMA_BUF",
    "DEVICE_FEATURE_GET",
    "DEVICE_FEATURE_PROBE",
    "DEVICE_FEATURE_SET",
    "DEVICE_INFO",
    "DMA_AVAIL",
    "DMA_BUF",
    "DMA_MAP",
    "DMA_MAP_FLAG_READ",
    "DMA_MAP_FLAG_WRITE",
    "DMA_UNMAP",
    "DMA_UNMAP_FLAG_ALL",
    "GROUP_FLAGS_CONTAINER_SET",
    "GROUP_FLAGS_VIABLE",
    "GROUP_STATUS",
    "IOVA_RANGE",
    "IOVA_RANGES",
    "TYPE1_INFO",
    "TYPE1_INFO_CAPS",
    "TYPE1_INFO_PGSIZES",
    "AttachIommufdPt",
    "BindIommufd",
    "DetachIommufdPt",
    "DeviceFeature",
    "DeviceFeatureDmaBuf",
    "DeviceInfo",
    "Extension",
    "GroupStatus",
    "Ioctl",
    "IovaRange",
    "Type1DmaMap",
    "Type1DmaUnmap",
    "Type1Info",
]

API_VERSION: Final = 0

_BASE: Final = ord(";") << 8 | 100


class Ioctl(enum.IntEnum):
    """What the numbers mean, by the kind of fd they are for."""

    # a container
    GET_API_VERSION = _BASE
    CHECK_EXTENSION = _BASE + 1
    SET_IOMMU = _BASE + 2
    IOMMU_GET_INFO = _BASE + 12
    IOMMU_MAP_DMA = _BASE + 13
    IOMMU_UNMAP_DMA = _BASE + 14
    # a group
    GROUP_GET_STATUS = _BASE + 3
    GROUP_SET_CONTAINER = _BASE + 4
    GROUP_UNSET_CONTAINER = _BASE + 5
    GROUP_GET_DEVICE_FD = _BASE + 6
    # a device
    DEVICE_GET_INFO = _BASE + 7
    DEVICE_GET_REGION_INFO = _BASE + 8
    DEVICE_GET_IRQ_INFO = _BASE + 9
    DEVICE_SET_IRQS = _BASE + 10
    DEVICE_RESET = _BASE + 11
    DEVICE_FEATURE = _BASE + 17
    DEVICE_BIND_IOMMUFD = _BASE + 18
    DEVICE_ATTACH_IOMMUFD_PT = _BASE + 19
    DEVICE_DETACH_IOMMUFD_PT = _BASE + 20


class Extension(enum.IntEnum):
    """For CHECK_EXTENSION and SET_IOMMU."""

    TYPE1 = 1
    TYPE1V2 = 3
    DMA_CC = 4
    NOIOMMU = 8
    UNMAP_ALL = 9


GROUP_FLAGS_VIABLE: Final = 1 << 0
GROUP_FLAGS_CONTAINER_SET: Final = 1 << 1

TYPE1_INFO_PGSIZES: Final = 1 << 0
TYPE1_INFO_CAPS: Final = 1 << 1

CAP_IOVA_RANGE: Final = 1
CAP_MIGRATION: Final = 2
CAP_DMA_AVAIL: Final = 3

DMA_MAP_FLAG_READ: Final = 1 << 0
DMA_MAP_FLAG_WRITE: Final = 1 << 1
DMA_UNMAP_FLAG_ALL: Final = 1 << 1

# The low 16 bits of a feature's flags are its number.
DEVICE_FEATURE_GET: Final = 1 << 16
DEVICE_FEATURE_SET: Final = 1 << 17
DEVICE_FEATURE_PROBE: Final = 1 << 18
DEVICE_FEATURE_DMA_BUF: Final = 11


class GroupStatus(Struct):
    """``struct vfio_group_status``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
    else:
        _fields_ = (("argsz", c_uint32), ("flags", c_uint32))


class DeviceInfo(Struct):
    """``struct vfio_device_info``; the padding at its end is newer than some headers."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        num_regions: int
        num_irqs: int
        cap_offset: int
        pad: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("num_regions", c_uint32),
            ("num_irqs", c_uint32),
            ("cap_offset", c_uint32),
            ("pad", c_uint32),
        )


class Type1Info(Struct):
    """``struct vfio_iommu_type1_info``; capabilities may follow."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        iova_pgsizes: int
        cap_offset: int
        pad: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("iova_pgsizes", c_uint64),
            ("cap_offset", c_uint32),
            ("pad", c_uint32),
        )


class IovaRange(Struct):
    """``struct vfio_iova_range``; ``end`` is inclusive."""

    if TYPE_CHECKING:
        start: int
        end: int
    else:
        _fields_ = (("start", c_uint64), ("end", c_uint64))


class Type1DmaMap(Struct):
    """``struct vfio_iommu_type1_dma_map``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        vaddr: int
        iova: int
        size: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("vaddr", c_uint64),
            ("iova", c_uint64),
            ("size", c_uint64),
        )


class Type1DmaUnmap(Struct):
    """``struct vfio_iommu_type1_dma_unmap``; the kernel answers in ``size``."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        iova: int
        size: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("iova", c_uint64),
            ("size", c_uint64),
        )


class BindIommufd(Struct):
    """``struct vfio_device_bind_iommufd`` as of Linux 6.6, 16 bytes."""

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


class AttachIommufdPt(Struct):
    """``struct vfio_device_attach_iommufd_pt`` as of Linux 6.6, 12 bytes."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        pt_id: int
    else:
        _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("pt_id", c_uint32))


class DetachIommufdPt(Struct):
    """``struct vfio_device_detach_iommufd_pt`` as of Linux 6.6, 8 bytes."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
    else:
        _fields_ = (("argsz", c_uint32), ("flags", c_uint32))


class DeviceFeature(Struct):
    """``struct vfio_device_feature``; the feature's data follows."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
    else:
        _fields_ = (("argsz", c_uint32), ("flags", c_uint32))


class DeviceFeatureDmaBuf(Struct):
    """``struct vfio_device_feature_dma_buf`` (Linux 6.19); offset and length pairs follow."""

    if TYPE_CHECKING:
        region_index: int
        open_flags: int
        flags: int
        nr_ranges: int
    else:
        _fields_ = (
            ("region_index", c_uint32),
            ("open_flags", c_uint32),
            ("flags", c_uint32),
            ("nr_ranges", c_uint32),
        )


GROUP_STATUS: Final = struct.Struct("<II")
DEVICE_INFO: Final = struct.Struct("<IIIIII")
TYPE1_INFO: Final = struct.Struct("<IIQII")
IOVA_RANGES: Final = struct.Struct("<HHIII")  # id, version, next, nr_iovas, reserved
IOVA_RANGE: Final = struct.Struct("<QQ")
DMA_AVAIL: Final = struct.Struct("<HHII")  # id, version, next, avail
DMA_MAP: Final = struct.Struct("<IIQQQ")
DMA_UNMAP: Final = struct.Struct("<IIQQ")
BIND_IOMMUFD: Final = struct.Struct("<IIiI")
ATTACH_IOMMUFD_PT: Final = struct.Struct("<III")
DETACH_IOMMUFD_PT: Final = struct.Struct("<II")
DMA_BUF: Final = struct.Struct("<IIIIIIQQ")  # feature head, dma_buf, one range
