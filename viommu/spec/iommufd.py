"""The kernel's iommufd: ioctl numbers and structures.

Source: ``<linux/iommufd.h>`` of Linux 7.2, and ``iommufd_test.h`` of the same for
the selftest. Every number is ``_IO(';', 0x80 + n)``; every structure begins with
its own size. Ranges end inclusive where the field is called ``last``.
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
    "SELFTEST_TYPE",
    "TEST_ACCESS_RW_WRITE",
    "TEST_CMD_SIZE",
    "TEST_VEVENTQ_TYPE",
    "UNMAP_ALL_LENGTH",
    "VDEVICE_ALLOC",
    "VEVENTQ_ALLOC",
    "VIOMMU_ALLOC",
    "VIOMMU_SELFTEST",
    "Ioctl",
    "TestOp",
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
    TEST_CMD = _BASE + 0x20


IOAS_MAP_FIXED_IOVA: Final = 1 << 0
IOAS_MAP_WRITEABLE: Final = 1 << 1
IOAS_MAP_READABLE: Final = 1 << 2

UNMAP_ALL_LENGTH: Final = (1 << 64) - 1

HWPT_FLAG_NEST_PARENT: Final = 1 << 0

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
# size, flags, viommu_id, type, index, out_hw_queue_id, nesting_parent_iova, length
HW_QUEUE_ALLOC: Final = struct.Struct("<IIIIIIQQ")

# The selftest (CONFIG_IOMMUFD_TEST): a mock IOMMU that exists in memory only.
TEST_CMD_SIZE: Final = 72  # size, op, id, reserved, then 56 bytes of the operation's own
TEST_ACCESS_RW_WRITE: Final = 1 << 0
SELFTEST_TYPE: Final = 0xDEADBEEF  # of a vIOMMU and a hardware queue
TEST_VEVENTQ_TYPE: Final = 0xBEEFBEEF
# in_data, out_data, out_mmap_offset, out_mmap_length
VIOMMU_SELFTEST: Final = struct.Struct("<IIQQ")


class TestOp(enum.IntEnum):
    """Operations of the selftest."""

    __test__ = False  # pytest: not a test case

    ADD_RESERVED = 1
    MOCK_DOMAIN = 2
    CREATE_ACCESS = 5
    ACCESS_RW = 8
    MOCK_DOMAIN_REPLACE = 10
    TRIGGER_VEVENT = 17
