"""Guest memory told to another process: which piece is where in which file.

The server answers page by page, each with at most
:data:`~viommu.ipc.protocol.MAX_FDS` files. Every page counts its files anew, so the
server remembers nothing of a client that reads them.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import Access, ExportError, PeerError
from viommu.ipc.protocol import FILE_NONE, MAX_FDS, SPANS_A_PACKET, Span, encode_spans
from viommu.memory import FileKey, MappedFiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from viommu.memory import GuestMemory, MemoryRegion

__all__ = ["MemoryListing", "memory_page"]

_MAX_FILES: Final = 256


def memory_page(memory: GuestMemory, first: int) -> tuple[bytes, tuple[int, ...]]:
    """Return the body of a LISTED that starts with region number ``first``, and its files.

    The file descriptors are copies, the caller's to close.

    Raises:
        ExportError: This process may open no more file descriptors.
    """
    regions = memory.regions()
    numbers: dict[FileKey, int] = {}
    fds: list[int] = []
    spans: list[Span] = []
    try:
        for region in regions[first : first + SPANS_A_PACKET]:
            file = region.file
            if file is None:
                spans.append(_span(region, FILE_NONE))
                continue
            if file.key not in numbers:
                if len(fds) == MAX_FDS:
                    break
                fds.append(_copy(file.backing.fileno()))
                numbers[file.key] = len(numbers)
            spans.append(_span(region, numbers[file.key]))
    except ExportError:
        _close(fds)
        raise
    left = max(0, len(regions) - first - len(spans))
    return encode_spans(spans, memory.generation, left), tuple(fds)


class MemoryListing:
    """What a client has been told of guest memory, page by page; then its memory is made so.

    A context manager that closes the file descriptors that came.
    """

    def __init__(self) -> None:
        self._wanted: list[_Wanted] = []
        self._fds: dict[FileKey, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _close(list(self._fds.values()))
        self._fds.clear()

    def __len__(self) -> int:
        return len(self._wanted)

    def clear(self) -> None:
        """Forget every page: the memory has changed since the first one."""
        self._wanted.clear()

    def add(self, spans: Sequence[Span], fds: list[int]) -> None:
        """Take a page; its file descriptors become the listing's and leave ``fds``.

        Raises:
            ExportError: More files than a client can be expected to map.
        """
        keys: list[FileKey] = []
        while fds:
            status = os.fstat(fds[0])
            key = FileKey(status.st_dev, status.st_ino)
            keys.append(key)
            if key in self._fds:
                os.close(fds.pop(0))
            elif len(self._fds) < _MAX_FILES:
                self._fds[key] = fds.pop(0)
            else:
                raise ExportError(f"guest memory is in more than {_MAX_FILES} files")
        for span in spans:
            key_of = None if span.file == FILE_NONE else keys[span.file]
            self._wanted.append(_Wanted(*span[:3], span.access, key_of))

    def apply(self, memory: GuestMemory, files: MappedFiles) -> None:
        """Make ``memory`` what was listed; what stays as it is keeps its mapping.

        Raises:
            ExportError: It can't be mapped; what could be is there.
        """
        present = {_key(region): region for region in memory.regions()}
        wanted = dict.fromkeys(self._wanted)
        try:
            for key, region in present.items():
                if key not in wanted:
                    memory.unmap(region.gpa, region.size)
            for piece in wanted:
                if piece not in present:
                    self._map(memory, files, piece)
        except PeerError as error:
            raise ExportError(f"guest memory can't be mapped: {error}") from error

    def _map(self, memory: GuestMemory, files: MappedFiles, piece: _Wanted) -> None:
        readable, writable = Access.READ in piece.access, Access.WRITE in piece.access
        file = None
        if piece.file is not None:
            fd = self._fds[piece.file]
            file = files.get(fd, piece.offset, piece.size, writable=writable)
        try:
            memory.map(
                piece.gpa,
                piece.size,
                readable=readable,
                writable=writable,
                file=file,
                offset=piece.offset,
            )
        except PeerError:
            if file is not None:
                file.close()
            raise


class _Wanted(NamedTuple):
    """A piece of guest memory, with what tells its file from others."""

    gpa: int
    size: int
    offset: int
    access: Access
    file: FileKey | None


def _key(region: MemoryRegion) -> _Wanted:
    key = None if region.file is None else region.file.key
    return _Wanted(region.gpa, region.size, region.offset, _access(region), key)


def _span(region: MemoryRegion, file: int) -> Span:
    return Span(region.gpa, region.size, region.offset, file, _access(region))


def _access(region: MemoryRegion) -> Access:
    access = Access.READ if region.readable else Access.NONE
    return access | Access.WRITE if region.writable else access


def _copy(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError as error:
        raise ExportError(f"no file descriptor for guest memory: {error}") from error


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):  # it is closed all the same, see close(2)
            os.close(fd)
