"""One mapping per file, however many regions point into it.

A VMM sends a fresh duplicate of the same file descriptor with every region, and
hundreds of regions when an IOMMU of its own is on. So files are told apart by
device and inode, each is mapped once, as a whole, and shared by reference count.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from typing import Final

from viommu.errors import PeerError
from viommu.memory.backing import FileBacking, FileKey
from viommu.memory.counted import Counted

__all__ = ["MappedFile", "MappedFiles"]

_MAX_FILES: Final = 256


class MappedFile(Counted):
    """A file mapped as a whole; every :meth:`MappedFiles.get` needs one :meth:`close`."""

    __slots__ = ("_files", "backing", "key", "view", "writable")

    def __init__(
        self,
        files: MappedFiles,
        key: FileKey,
        view: memoryview,
        backing: FileBacking,
        *,
        writable: bool,
    ) -> None:
        super().__init__()
        self._files = files
        self.key = key
        #: The file itself, for those who map it elsewhere: they retain it. Replaced
        #: when a descriptor comes that allows writing.
        self.backing = backing
        #: The whole file as bytes. Replaced, never resized, when the file has
        #: grown; slices of the old one stay valid and see the same memory.
        self.view = view
        self.writable = writable

    @property
    def size(self) -> int:
        """Return how many bytes are mapped."""
        return len(self.view)

    def _free(self) -> None:
        # The file is unmapped with the last slice of the view that somebody looks at.
        self._files._forget(self)  # noqa: SLF001 - one unit: the cache and its entries
        self.view = memoryview(b"")
        self.backing.close()

    def __str__(self) -> str:
        return f"file {self.key}"


class MappedFiles:
    """The files of this process that guest memory lives in.

    At most ``limit`` files are mapped at a time. Lookup is O(1).
    """

    def __init__(self, limit: int = _MAX_FILES) -> None:
        self._limit = limit
        self._files: dict[FileKey, MappedFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def get(self, fd: int, offset: int, size: int, *, writable: bool) -> MappedFile:
        """Return the mapping of the file behind ``fd``, which holds ``[offset, offset + size)``.

        ``fd`` stays the caller's and may be closed at once. Where the file allows
        it (a memfd usually does) it is sealed against shrinking, because touching
        a page that a peer cut off would end this process with SIGBUS. A file that
        can't be sealed is trusted to keep the size it has now.

        Raises:
            PeerError: EINVAL, the file is too short; EACCES, not opened for this
                access; ENODEV, not a file; ENOSPC, too many files; or why mmap failed.
        """
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            mode = flags & os.O_ACCMODE
            # The order of these checks, and their errors, are those of mmap(2).
            if flags & os.O_PATH or mode == os.O_WRONLY or (writable and mode != os.O_RDWR):
                wanted = "reading and writing" if writable else "reading"
                raise PeerError(errno.EACCES, f"memory file is not open for {wanted}")
            _seal(fd)
            status = os.fstat(fd)
        except OSError as error:
            raise PeerError(error.errno or errno.EBADF, f"memory file: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise PeerError(errno.ENODEV, f"mode {status.st_mode:#o} is not that of a memory file")
        if offset < 0 or size < 0 or offset + size > status.st_size or not status.st_size:
            raise PeerError(
                errno.EINVAL,
                f"memory file has {status.st_size:#x} bytes, [{offset:#x}, {offset + size:#x})"
                " is not in it",
            )
        key = FileKey(status.st_dev, status.st_ino)
        file = self._files.get(key)
        if file is None:
            if len(self._files) >= self._limit:
                raise PeerError(errno.ENOSPC, f"more than {self._limit} memory files")
            view = _map(fd, status.st_size, writable=writable)
            backing = FileBacking(fd)
            file = self._files[key] = MappedFile(self, key, view, backing, writable=writable)
            return file
        if offset + size > file.size or (writable and not file.writable):
            view = _map(fd, status.st_size, writable=writable or file.writable)
            if writable and not file.backing.writable:
                before, file.backing = file.backing, FileBacking(fd)
                before.close()
            file.view, file.writable = view, file.writable or writable
        return file.retain()

    def _forget(self, file: MappedFile) -> None:
        del self._files[file.key]


def _seal(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        # Not a memfd, sealed against more seals, or opened read-only.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise


def _map(fd: int, size: int, *, writable: bool) -> memoryview:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
        mapping.madvise(mmap.MADV_DONTDUMP)  # a core dump of ours is no place for guest memory
    except (OSError, ValueError, OverflowError) as error:
        # Python itself refuses a size that the file no longer has.
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        raise PeerError(number, f"can't map {size:#x} bytes of a memory file: {error}") from error
    return memoryview(mapping)
