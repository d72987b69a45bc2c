"""Memory by address, down to what a page may be used for."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

__all__ = ["PAGE", "Pages"]

PAGE: Final = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED: Final = ctypes.c_void_p(-1).value


class Pages:
    """``count`` private pages from :attr:`address` on; a page that nobody may touch follows."""

    def __init__(self, count: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        self.size = count * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, self.size + PAGE, 0, flags, -1, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address: int = address
        if _libc.mprotect(address, self.size, protection):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

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
        _libc.munmap(self.address, self.size + PAGE)
