"""iommufd's selftest: an IOMMU that exists in memory only, and DMA by software.

Source: Linux 7.2, drivers/iommu/iommufd/iommufd_test.h and selftest.c (CONFIG_IOMMUFD_TEST).
"""

from __future__ import annotations

import ctypes
import enum
import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu_backends.iommufd_viommu import Viommu
from viommu_backends.kernel import ask

if TYPE_CHECKING:
    from viommu_backends.iommufd_context import Iommufd

__all__ = [
    "EVENTS",
    "MOCK_APERTURE",
    "QUEUES",
    "QUEUE_COUNT",
    "VIOMMU",
    "MockDevice",
    "MockViommu",
    "SoftwareDma",
    "TestOp",
    "attach",
    "guest_page_table",
    "mock_domain",
    "report_event",
]

MOCK_APERTURE: Final = (0x0100_0000, 0x8000_0000)
VIOMMU: Final = 0xDEADBEEF  # a kind of vIOMMU, as ARM's or NVIDIA's
QUEUES: Final = 0xDEADBEEF  # a kind of its queues
QUEUE_COUNT: Final = 2  # as many can it have
EVENTS: Final = 0xBEEFBEEF  # a kind of its events
EVENT: Final = struct.Struct("<I")  # virt_id

TEST_CMD: Final = 0x3BA0  # the number of the ioctl
TEST_CMD_SIZE: Final = 72
HEAD: Final = struct.Struct("<IIII")  # size, op, id, reserved
CREATE_ACCESS: Final = struct.Struct("<iI")  # out_access_fd, flags
ACCESS_RW: Final = struct.Struct("<QQQI")  # iova, length, uptr, flags
ACCESS_RW_WRITE: Final = 1 << 0
MOCK_DOMAIN: Final = struct.Struct("<III")  # out_stdev_id, out_hwpt_id, out_idev_id
MOCK_DOMAIN_REPLACE: Final = struct.Struct("<I")  # pt_id
TRIGGER_VEVENT: Final = struct.Struct("<I")  # dev_id

HWPT_DATA: Final = 0xDEAD
HWPT_SELFTEST: Final = struct.Struct("<II")  # iotlb, pagetable_type
IOTLB: Final = 0x0BADBEEF
# in_data, out_data, out_mmap_offset, out_mmap_length
VIOMMU_SELFTEST: Final = struct.Struct("<IIQQ")


class TestOp(enum.IntEnum):
    """Operations of the selftest."""

    __test__ = False  # pytest: not a test case

    MOCK_DOMAIN = 2
    CREATE_ACCESS = 5
    ACCESS_RW = 8
    MOCK_DOMAIN_REPLACE = 10
    TRIGGER_VEVENT = 17


class MockDevice(NamedTuple):
    """A device that doesn't exist: its id for the selftest, its page table, its id as a device."""

    selftest: int
    page_table: int
    device: int


def mock_domain(context: Iommufd, ioas: int) -> MockDevice:
    """Make a device and attach it to ``ioas``; to end it, destroy its ``selftest`` id.

    What is mapped must then be in :data:`MOCK_APERTURE`.

    Raises:
        BackendError: EADDRINUSE, something is mapped elsewhere; EFAULT, to no memory.
    """
    answer = _test(context, TestOp.MOCK_DOMAIN, ioas, b"")
    return MockDevice(*MOCK_DOMAIN.unpack_from(answer))


def attach(context: Iommufd, device: MockDevice, page_table: int) -> None:
    """Attach a device to another page table, or IOAS."""
    payload = MOCK_DOMAIN_REPLACE.pack(page_table)
    _test(context, TestOp.MOCK_DOMAIN_REPLACE, device.selftest, payload)


class MockViommu(Viommu):
    """A vIOMMU with two pages of device memory; the first word in it is ``word``.

    ``offset`` and ``length`` are what has to be mapped, ``echo`` is the word once more.
    """

    def __init__(self, context: Iommufd, device: MockDevice, parent: int, word: int = 0) -> None:
        data = bytearray(VIOMMU_SELFTEST.pack(word, 0, 0, 0))
        super().__init__(context, VIOMMU, device.device, parent, data)
        _, self.echo, self.offset, self.length = VIOMMU_SELFTEST.unpack(data)


def guest_page_table(context: Iommufd, device: MockDevice, parent: int) -> int:
    """Return a page table of a guest, below a vIOMMU or a nest parent."""
    data = HWPT_SELFTEST.pack(IOTLB, 0)
    return context.alloc_page_table(device.device, parent, kind=HWPT_DATA, data=data)


def report_event(context: Iommufd, device: MockDevice) -> None:
    """Have the IOMMU report an event of a device to its vIOMMU.

    Raises:
        BackendError: ENOENT, it is attached to no page table below a vIOMMU that it is a
            device of; EOPNOTSUPP, nobody has asked for events.
    """
    _test(context, TestOp.TRIGGER_VEVENT, 0, TRIGGER_VEVENT.pack(device.device))


class SoftwareDma:
    """Reads and writes through an IOAS, by the kernel, with the rights of the mappings.

    While it is open the IOAS can't be destroyed.
    """

    def __init__(self, context: Iommufd, ioas: int) -> None:
        self._context = context
        answer = _test(context, TestOp.CREATE_ACCESS, ioas, b"")
        self._fd: int = CREATE_ACCESS.unpack_from(answer)[0]

    def read(self, iova: int, size: int) -> bytes:
        """Read; raises BackendError with ENOENT for what isn't mapped, EPERM for not readable."""
        buffer = ctypes.create_string_buffer(size)
        self._move(iova, size, buffer, 0)
        return buffer.raw

    def write(self, iova: int, data: bytes) -> None:
        """Write; raises as :meth:`read`."""
        self._move(iova, len(data), ctypes.create_string_buffer(data), ACCESS_RW_WRITE)

    def close(self) -> None:
        """End it."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _move(self, iova: int, size: int, buffer: ctypes.Array[ctypes.c_char], flags: int) -> None:
        payload = ACCESS_RW.pack(iova, size, ctypes.addressof(buffer), flags)
        _test(self._context, TestOp.ACCESS_RW, self._fd, payload)


def _test(context: Iommufd, operation: TestOp, object_id: int, payload: bytes) -> bytes:
    """Carry out an operation of the selftest and return its payload."""
    command = bytearray(HEAD.pack(TEST_CMD_SIZE, operation, object_id, 0) + payload)
    command += bytes(TEST_CMD_SIZE - len(command))
    ask(context.fileno(), TEST_CMD, command, f"selftest {operation.name}")
    return bytes(command[HEAD.size :])
