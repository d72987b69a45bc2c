"""The file or block device behind a disk: whole transfers, durable flushes, holes.

Nothing here knows virtio. Offsets and sizes are bytes; ranges are the caller's
to check. Failures are the kernel's own :exc:`OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final

from viommu.errors import UsageError
from viommu.spec.virtio_blk import SECTOR_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["DiskFile"]

# <linux/falloc.h>
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# More buffers than this in one call is EINVAL (<limits.h>, IOV_MAX).
_MAX_BUFFERS: Final = os.sysconf("SC_IOV_MAX")

_ZEROES: Final = memoryview(bytes(64 << 10))


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    if _libc.fallocate(fd, mode, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class DiskFile:
    """An open, locked disk image or block device of fixed size.

    Two users of one image corrupt it, so it is locked (``flock``) exclusively, or
    shared when ``read_only``. The lock also keeps two endpoints of one process apart.

    Raises:
        UsageError: The file can't be opened or locked, is neither a regular file nor
            a block device, is empty, or is no whole number of 512-byte sectors.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._can_zero = self._can_punch = True
        self._fd = _open(path, read_only=read_only)
        try:
            _lock(self._fd, path, shared=read_only)
            self.size = _size_of(self._fd, path)
        except BaseException:
            self.close()
            raise

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill ``views``, one after the other, from ``offset``.

        Raises:
            OSError: EIO when the file has become shorter.
        """
        _transfer(os.preadv, self._fd, views, offset)

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        """Write ``views``, one after the other, at ``offset``."""
        _transfer(os.pwritev, self._fd, views, offset)

    def flush(self) -> None:
        """Return once everything written is on stable storage."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Free the range, which then reads as zeroes; nothing where the file system can't."""
        self._punch(offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make the range read as zeroes, freeing it if ``unmap`` and possible.

        Where the file system can do neither without data, zeroes are written.
        """
        if (unmap and self._punch(offset, size)) or self._zero(offset, size):
            return
        while size:
            count = os.pwrite(self._fd, _ZEROES[:size], offset)
            offset += count
            size -= count

    def close(self) -> None:
        """Close and unlock; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _punch(self, offset: int, size: int) -> bool:
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        self._can_punch = self._can_punch and self._try(mode, offset, size)
        return self._can_punch

    def _zero(self, offset: int, size: int) -> bool:
        mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
        self._can_zero = self._can_zero and self._try(mode, offset, size)
        return self._can_zero

    def _try(self, mode: int, offset: int, size: int) -> bool:
        if not size:
            return True  # the kernel calls that an invalid argument
        try:
            _fallocate(self._fd, mode, offset, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise
            return False
        return True


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    views: Sequence[memoryview],
    offset: int,
) -> None:
    """Call ``preadv`` or ``pwritev`` until every view is done."""
    left = [view for view in views if view]
    start = 0
    while start < len(left):
        count = call(fd, left[start : start + _MAX_BUFFERS], offset)
        if not count:
            raise OSError(errno.EIO, f"the file ends at {offset:#x}, before its size")
        offset += count
        # A short transfer ends inside a view: go on with the rest of it.
        while start < len(left) and count >= len(left[start]):
            count -= len(left[start])
            start += 1
        if count:
            left[start] = left[start][count:]


def _open(path: Path, *, read_only: bool) -> int:
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    try:
        mode = path.stat().st_mode
        if stat.S_ISBLK(mode):
            # The kernel then refuses a device that is mounted.
            flags |= 0 if read_only else os.O_EXCL
        elif not stat.S_ISREG(mode):
            raise UsageError(f"{path}: a disk must be a regular file or a block device")
        return os.open(path, flags)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
            hint = " (readonly=on opens it for reading only)"
        raise UsageError(f"{path}: can't open the disk: {error.strerror}{hint}") from error


def _lock(fd: int, path: Path, *, shared: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: the disk is in use by another process or endpoint (it is locked)"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: can't lock the disk: {error.strerror}") from error


def _size_of(fd: int, path: Path) -> int:
    # Of a block device fstat does not tell the size, its end does.
    size = os.lseek(fd, 0, os.SEEK_END)
    if not size or size % SECTOR_SIZE:
        raise UsageError(
            f"{path}: a disk must be a multiple of {SECTOR_SIZE} bytes and not empty, "
            f"this is {size} bytes long (see truncate(1))"
        )
    return size
