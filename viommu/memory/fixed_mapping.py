"""Memory mapped at addresses of our choosing: the few calls that Python's ``mmap`` can't make.

Whatever can fail is done aside, and moving the result into its place is the last
step. So the place is never empty in between, where another ``mmap`` of this
process could settle, and no ``fork`` sees memory that isn't meant for children.

Callers have checked every address and size: C types cut off what doesn't fit.
Ranges are (address, size). Source: mmap(2), mremap(2), madvise(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

from viommu.errors import BackendError

__all__ = [
    "MAX_SIZE",
    "checked_page_size",
    "page_size",
    "place_file",
    "place_memory",
    "release",
    "reserve",
    "vacate",
]

#: No range of this process is as large: one bit less than an address has.
MAX_SIZE: Final = 1 << (8 * ctypes.sizeof(ctypes.c_void_p) - 1)

# <linux/mman.h>; Python has no names for these. The values are those of the
# architectures that have VFIO.
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MAP_FIXED_NOREPLACE: Final = 0x100000
_PROT_NONE: Final = 0

_EMPTY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_address = ctypes.c_size_t  # a c_void_p would come back as None for 0
_libc.mmap.restype = _address
_libc.mmap.argtypes = (
    _address, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t,
)  # fmt: skip
_libc.mremap.restype = _address
_libc.mremap.argtypes = (_address, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, _address)
_libc.mprotect.argtypes = (_address, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (_address, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (_address, ctypes.c_size_t)
_FAILED: Final = ctypes.c_size_t(-1).value


def page_size() -> int:
    """Return the size of a page of this host.

    Raises:
        BackendError: The host says something that can't be.
    """
    return checked_page_size(os.sysconf("SC_PAGE_SIZE"))


def checked_page_size(size: int) -> int:
    """Return ``size`` if it can be the size of a page: sysconf(3) answers -1 when in doubt.

    Raises:
        BackendError: It is not a power of two.
    """
    if size <= 0 or size & (size - 1):
        raise BackendError(errno.EINVAL, f"the host says that a page has {size} bytes")
    return size


def reserve(size: int, alignment: int) -> int:
    """Reserve ``size`` bytes of addresses, without memory, and return the first one.

    Raises:
        BackendError: There is no such range free.
    """
    asked = size + alignment
    address = _mmap(0, asked, _PROT_NONE, _EMPTY)
    base = -(-address // alignment) * alignment
    # What the alignment cost goes back: before the range, and behind it.
    for start, end in ((address, base), (base + size, address + asked)):
        if start < end:
            _check(_libc.munmap(start, end - start), "munmap", start, end - start)
    _keep_to_ourselves(base, size)
    return base


def place_file(address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
    """Map ``size`` bytes of a file from ``offset`` at ``address``, over what is reserved there.

    Raises:
        BackendError: The host refused; the reservation is as it was.
    """
    aside = _mmap(0, size, _protection(writable=writable), mmap.MAP_SHARED, fd=fd, offset=offset)
    try:
        _move(aside, size, address)
    except BackendError:
        _check(_libc.munmap(aside, size), "munmap", aside, size)
        raise


def place_memory(address: int, size: int, source: int, *, writable: bool) -> None:
    """Map ``size`` bytes of shared memory, mapped at ``source``, once more at ``address``.

    Raises:
        BackendError: The host refused; the reservation is as it was.
    """
    # An old size of 0 leaves the source where it is: both then show the same pages.
    aside = _check(_libc.mremap(source, 0, size, _MREMAP_MAYMOVE, 0), "mremap", source, size)
    try:
        protection = _protection(writable=writable)
        _check(_libc.mprotect(aside, size, protection), "mprotect", aside, size)
        _move(aside, size, address)
    except BackendError:
        _check(_libc.munmap(aside, size), "munmap", aside, size)
        raise


def vacate(address: int, size: int) -> None:
    """Take away what is mapped in a part of a reservation, which stays reserved all the time.

    Raises:
        BackendError: The host refused; what was mapped still is.
    """
    _mmap(address, size, _PROT_NONE, _EMPTY | _MAP_FIXED)
    _keep_to_ourselves(address, size)


def release(address: int, size: int) -> None:
    """Give a whole reservation back, and with it what is mapped there.

    Raises:
        BackendError: The host refused.
    """
    _check(_libc.munmap(address, size), "munmap", address, size)


def _move(aside: int, size: int, address: int) -> None:
    """Move a mapping to where it belongs; the host counts mappings before it touches any."""
    _keep_to_ourselves(aside, size)
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    try:
        _check(_libc.mremap(aside, size, size, flags, address), "mremap", address, size)
    except BackendError:
        # Out of kernel memory it may have made room already. Where it hasn't,
        # EEXIST says that the reservation is still there.
        _libc.mmap(address, size, _PROT_NONE, _EMPTY | _MAP_FIXED_NOREPLACE, -1, 0)
        raise


def _keep_to_ourselves(address: int, size: int) -> None:
    """Keep memory away from children and from core dumps.

    A child would keep files and devices busy, and its writes would make the
    parent's private pages others than those that a device writes to.
    """
    for advice in (mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP):
        _check(_libc.madvise(address, size, advice), "madvise", address, size)


def _protection(*, writable: bool) -> int:
    return mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)


def _mmap(
    address: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0
) -> int:
    return _check(_libc.mmap(address, size, protection, flags, fd, offset), "mmap", address, size)


def _check(result: int, call: str, address: int, size: int) -> int:
    """Return what a call returned, unless it was an error (-1, as an int or as an address)."""
    if result in (-1, _FAILED):
        raise BackendError(ctypes.get_errno(), f"{call} of {size:#x} bytes at {address:#x}")
    return result
