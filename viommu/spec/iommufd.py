"""The kernel's iommufd: ioctl numbers and structures.

Source: ``<linux/iommufd.h>`` of Linux 7.2. Every number is ``_IO(';', 0x80 + n)``;
every structure that is passed to an ioctl begins with its own size. Ranges end
inclusive where the field is called ``last``.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

__all__ = [
    "DESTROY",
    "HWPT_ALLOC",
    "HWPT_FLAG_NEST_PARENT",
    "HW_QUEUE_ALLOC",
    "IOAS_ALLOC",
    "IOAS_COPY",
    "IOAS_IOVA_RANGES",
    "IOAS_MAP",
    "IOAS_MAP_FILE",
    "IOAS_MAP_FIXED_IOVA",
    "IOAS_MAP_READABLE",
    "IOAS_MAP_WRITEABLE",
    "IOAS_UNMAP",
    "IOVA_RANGE",
    "UNMAP_ALL_LENGTH",
    "VDEVICE_ALLOC",
    "VEVENTQ_ALLOC",
    "VEVENTQ_FLAG_LOST_EVENTS",
    "VEVENT_HEADER",
    "VEVENT_SEQUENCES",
    "VIOMMU_ALLOC",
    "HwQueueType",
    "Ioctl",
    "VeventqType",
    "ViommuType",
]

_BASE: Final = ord(";") << 8 | 0x80


class Ioctl(enum.IntEnum):
    """What can be asked of ``/dev/iommu``; unknown to older kernels: ENOTTY."""

    DESTROY = _BASE
    IOAS_ALLOC = _BASE + 0x1
    IOAS_ALLOW_IOVAS = _BASE + 0x2
    IOAS_COPY = _BASE + 0x3
    IOAS_IOVA_RANGES = _BASE + 0x4
    IOAS_MAP = _BASE + 0x5
    IOAS_UNMAP = _BASE + 0x6
    OPTION = _BASE + 0x7
    HWPT_ALLOC = _BASE + 0x9
    GET_HW_INFO = _BASE + 0xA
    IOAS_MAP_FILE = _BASE + 0xF
    VIOMMU_ALLOC = _BASE + 0x10
    VDEVICE_ALLOC = _BASE + 0x11
    VEVENTQ_ALLOC = _BASE + 0x13
    HW_QUEUE_ALLOC = _BASE + 0x14


IOAS_MAP_FIXED_IOVA: Final = 1 << 0
IOAS_MAP_WRITEABLE: Final = 1 << 1
IOAS_MAP_READABLE: Final = 1 << 2

UNMAP_ALL_LENGTH: Final = (1 << 64) - 1

HWPT_FLAG_NEST_PARENT: Final = 1 << 0

VEVENTQ_FLAG_LOST_EVENTS: Final = 1 << 0
VEVENT_SEQUENCES: Final = 1 << 31  # as many; the first one follows the last one


class ViommuType(enum.IntEnum):
    """Drivers that can give a guest its own part of an IOMMU (``enum iommu_viommu_type``)."""

    ARM_SMMUV3 = 1
    TEGRA241_CMDQV = 2


class VeventqType(enum.IntEnum):
    """What a queue of events reports (``enum iommu_veventq_type``)."""

    ARM_SMMUV3 = 1
    TEGRA241_CMDQV = 2


class HwQueueType(enum.IntEnum):
    """Queues that hardware reads from guest memory (``enum iommu_hw_queue_type``)."""

    TEGRA241_CMDQV = 1


DESTROY: Final = struct.Struct("<II")  # size, id
IOAS_ALLOC: Final = struct.Struct("<III")  # size, flags, out_ioas_id
# size, flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova
IOAS_COPY: Final = struct.Struct("<IIIIQQQ")
# size, ioas_id, num_iovas, reserved, allowed_iovas, out_iova_alignment
IOAS_IOVA_RANGES: Final = struct.Struct("<IIIIQQ")
IOVA_RANGE: Final = struct.Struct("<QQ")  # start, last
IOAS_MAP: Final = struct.Struct("<IIIIQQQ")  # size, flags, ioas_id, reserved, user_va, length, iova
IOAS_MAP_FILE: Final = struct.Struct("<IIIiQQQ")  # size, flags, ioas_id, fd, start, length, iova
IOAS_UNMAP: Final = struct.Struct("<IIQQ")  # size, ioas_id, iova, length (in and out)
# size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len, data_uptr, fault_id, pad
HWPT_ALLOC: Final = struct.Struct("<IIIIIIIIQII")
# size, flags, type, dev_id, hwpt_id, out_viommu_id, data_len, reserved, data_uptr
VIOMMU_ALLOC: Final = struct.Struct("<IIIIIIIIQ")
VDEVICE_ALLOC: Final = struct.Struct("<IIIIQ")  # size, viommu_id, dev_id, out_vdevice_id, virt_id
# size, flags, viommu_id, type, depth, out_veventq_id, out_veventq_fd, reserved
VEVENTQ_ALLOC: Final = struct.Struct("<IIIIIIII")
VEVENT_HEADER: Final = struct.Struct("<II")  # flags, sequence
# size, flags, viommu_id, type, index, out_hw_queue_id, nesting_parent_iova, length
HW_QUEUE_ALLOC: Final = struct.Struct("<IIIIIIQQ")
