"""iommufd's selftest: DMA by software to whatever is mapped in an IOAS, no device needed.

Source: Linux, drivers/iommu/iommufd/iommufd_test.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, Final, Self

from viommu.spec.iommufd import TEST_ACCESS_RW_WRITE, TEST_CMD_SIZE, Ioctl, TestOp
from viommu_backends.kernel import ask

if TYPE_CHECKING:
    from viommu_backends.iommufd_context import Iommufd

__all__ = ["MOCK_APERTURE", "SoftwareDma", "mock_domain"]

MOCK_APERTURE: Final = (0x0100_0000, 0x8000_0000)

_HEAD: Final = struct.Struct("<IIII")  # size, op, id, reserved
_CREATE_ACCESS: Final = struct.Struct("<iI")  # out_access_fd, flags
_ACCESS_RW: Final = struct.Struct("<QQQI")  # iova, length, uptr, flags
_MOCK_DOMAIN: Final = struct.Struct("<III")  # out: device of the selftest, page table, device


def mock_domain(context: Iommufd, ioas: int) -> int:
    """Make a device that doesn't exist and attach it to ``ioas``; return it, to be destroyed.

    What is mapped must then be in :data:`MOCK_APERTURE`.

    Raises:
        BackendError: EADDRINUSE, something is mapped elsewhere; EFAULT, to no memory.
    """
    answer = _test(context, TestOp.MOCK_DOMAIN, ioas, b"")
    device: int = _MOCK_DOMAIN.unpack_from(answer)[0]
    return device


class SoftwareDma:
    """Reads and writes through an IOAS, by the kernel, with the rights of the mappings.

    While it is open the IOAS can't be destroyed.
    """

    def __init__(self, context: Iommufd, ioas: int) -> None:
        self._context = context
        answer = _test(context, TestOp.CREATE_ACCESS, ioas, b"")
        self._fd: int = _CREATE_ACCESS.unpack_from(answer)[0]

    def read(self, iova: int, size: int) -> bytes:
        """Read; raises BackendError with ENOENT for what isn't mapped, EPERM for not readable."""
        buffer = ctypes.create_string_buffer(size)
        self._move(iova, size, buffer, 0)
        return buffer.raw

    def write(self, iova: int, data: bytes) -> None:
        """Write; raises as :meth:`read`."""
        self._move(iova, len(data), ctypes.create_string_buffer(data), TEST_ACCESS_RW_WRITE)

    def close(self) -> None:
        """End it."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _move(self, iova: int, size: int, buffer: ctypes.Array[ctypes.c_char], flags: int) -> None:
        payload = _ACCESS_RW.pack(iova, size, ctypes.addressof(buffer), flags)
        _test(self._context, TestOp.ACCESS_RW, self._fd, payload)


def _test(context: Iommufd, operation: TestOp, object_id: int, payload: bytes) -> bytes:
    """Carry out an operation of the selftest and return its payload."""
    command = bytearray(_HEAD.pack(TEST_CMD_SIZE, operation, object_id, 0) + payload)
    command += bytes(TEST_CMD_SIZE - len(command))
    ask(context.fileno(), Ioctl.TEST_CMD, command, f"selftest {operation.name}")
    return bytes(command[_HEAD.size :])
