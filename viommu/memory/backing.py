"""What memory is made of: a file that others can map too, or private memory without one.

A backing outlives every place that it is mapped at. It starts with one use, its
creator's; every :meth:`~FileBacking.retain` needs one :meth:`~FileBacking.close`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from typing import Final, NamedTuple

from viommu.errors import PeerError, UsageError
from viommu.memory.counted import Counted

__all__ = ["Backing", "FileBacking", "FileKey", "PrivateBacking"]


class FileKey(NamedTuple):
    """What tells files apart: ``st_dev`` and ``st_ino``, stable while the file is mapped."""

    device: int
    inode: int

    def __str__(self) -> str:
        return f"{self.device:x}:{self.inode}"


class FileBacking(Counted):
    """A file that can be mapped: memfd, hugetlbfs, a VFIO device with its BARs.

    Keeps a duplicate of ``fd``, which stays the caller's. ``writable`` is what
    the file was opened for: it has to be checked here, because iommufd maps a
    file for writing however it was opened, and sealed or not.

    Raises:
        PeerError: ``fd`` is not a file that can be mapped.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            status = os.fstat(fd)
            if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
                raise PeerError(errno.EACCES, f"fd {fd} is not open for reading")
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            raise PeerError(error.errno or errno.EBADF, f"memory file: {error}") from error
        #: What tells files apart, also across descriptors.
        self.key = FileKey(status.st_dev, status.st_ino)
        #: Whether it has a size of its own; what a device file holds, its driver knows.
        self.sized = stat.S_ISREG(status.st_mode)
        self.writable = flags & os.O_ACCMODE == os.O_RDWR and not _write_sealed(self._fd)

    def fileno(self) -> int:
        """Return the descriptor; it is valid until the last use is given back."""
        return self._fd

    def check(self, offset: int, size: int, *, writable: bool) -> None:
        """Raise unless ``[offset, offset + size)`` is in the file and may be used like this.

        Raises:
            PeerError: EINVAL, it passes the end of the file; EACCES, the file is
                read-only or sealed.
        """
        if offset < 0 or size <= 0 or offset + size >= 1 << 63:
            raise PeerError(errno.EINVAL, f"[{offset:#x}, {offset + size:#x}) can't be in a file")
        if writable and not self.writable:
            raise PeerError(errno.EACCES, f"{self} can't be written")
        if self.sized and offset + size > (end := os.fstat(self._fd).st_size):
            raise PeerError(
                errno.EINVAL,
                f"{self} has {end:#x} bytes, [{offset:#x}, {offset + size:#x}) is not in it",
            )

    def _free(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def __str__(self) -> str:
        return f"file {self.key}"


class PrivateBacking(Counted):
    """Memory of this process, ``size`` bytes of zeros: nobody else can map it.

    It is shared memory without a descriptor, so that it can be mapped at several
    places, keeps its contents wherever it is mapped or not, and has no copy made
    of its pages behind the back of a device that does DMA to them.

    Raises:
        UsageError: ``size`` is not a multiple of the page size.
        PeerError: ENOMEM, there isn't as much memory.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size <= 0 or size % mmap.PAGESIZE:
            raise UsageError(f"{size:#x} bytes are not a number of pages")
        try:
            memory = mmap.mmap(-1, size)
            memory.madvise(mmap.MADV_DONTFORK)
            memory.madvise(mmap.MADV_DONTDUMP)
        except (OSError, OverflowError) as error:
            raise PeerError(errno.ENOMEM, f"{size:#x} bytes of private memory: {error}") from error
        self.size = size
        self.view = memoryview(memory)
        #: Where :attr:`view` is mapped, until the last use is given back.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def check(self, offset: int, size: int, *, writable: bool) -> None:
        """Raise unless ``[offset, offset + size)`` is in it; it is always ``writable``.

        Raises:
            PeerError: EINVAL, it passes the end.
        """
        del writable
        if offset < 0 or size <= 0 or offset + size > self.size:
            raise PeerError(
                errno.EINVAL,
                f"{self} has {self.size:#x} bytes, [{offset:#x}, {offset + size:#x}) is not in it",
            )

    def _free(self) -> None:
        # No munmap by hand: the memory goes with the last slice of the view.
        self.view = memoryview(b"")
        self.address = 0

    def __str__(self) -> str:
        return "private memory"


Backing = FileBacking | PrivateBacking


def _write_sealed(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_WRITE | _FUTURE_WRITE))
    except OSError as error:
        if error.errno != errno.EINVAL:  # not a kind of file that has seals
            raise
        return False


# Python has no name for it. Source: <linux/fcntl.h>, F_SEAL_FUTURE_WRITE.
_FUTURE_WRITE: Final = 0x10
