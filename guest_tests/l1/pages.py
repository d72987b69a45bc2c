"""Memory by address, down to what a page may be used for."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

__all__ = ["PAGE", "DeviceMemory", "Pages"]

PAGE: Final = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED: Final = ctypes.c_void_p(-1).value
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


class Pages:
    """``count`` private pages from :attr:`address` on; a page that nobody may touch follows."""

    def __init__(self, count: int, protection: int = _READ_WRITE) -> None:
        self.size = count * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.address = _map(self.size + PAGE, 0, flags)
        _check(_libc.mprotect(self.address, self.size, protection))

    @property
    def end(self) -> int:
        """The address behind the last page."""
        return self.address + self.size

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes."""
        assert 0 <= offset <= offset + size <= self.size
        return ctypes.string_at(self.address + offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes."""
        assert 0 <= offset <= offset + len(data) <= self.size
        ctypes.memmove(self.address + offset, data, len(data))

    def close(self) -> None:
        """Give them back."""
        _check(_libc.munmap(self.address, self.size + PAGE))


class DeviceMemory:
    """What mmap(2) makes of a device's file; unlike Python's ``mmap`` it can be unmapped in part.

    Raises:
        OSError: The kernel refused.
    """

    def __init__(
        self,
        fd: int,
        offset: int,
        size: int,
        flags: int = mmap.MAP_SHARED,
        protection: int = _READ_WRITE,
    ) -> None:
        self.address = _map(size, protection, flags, fd, offset)

    def unmap(self, first: int, size: int) -> None:
        """Unmap ``size`` bytes from ``first`` on, counted from where it began."""
        _check(_libc.munmap(self.address + first, size))

    def protect(self, first: int, size: int, protection: int) -> None:
        """Change what ``size`` bytes from ``first`` on may be used for."""
        _check(_libc.mprotect(self.address + first, size, protection))


def _map(size: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    address: int = _libc.mmap(None, size, protection, flags, fd, offset)
    _check(-1 if address == _FAILED else 0)
    return address


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
