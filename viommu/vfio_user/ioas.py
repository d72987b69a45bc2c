"""One I/O address space: what a client has mapped there, by IOVA (half-open ranges).

An IOVA is an index into the space and nothing else: where this process has mapped
the file behind it stays unknown to the client and to the device.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import Access, InternalError, PeerError
from viommu.iova import ADDRESS_SPACE_END, IntervalMap
from viommu.mapper import MappingInfo
from viommu.memory import MemoryRegion
from viommu.memory.fixed_mapping import page_size
from viommu.vfio_user.free_iova import FreeIova

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.memory import MappedFile

__all__ = ["Ioas", "IoasMapping"]

_PAGE_MASK: Final = page_size() - 1


class IoasMapping(NamedTuple):
    """``[iova, iova + size)`` is ``file`` from ``offset`` on; one use of ``file`` is its own."""

    iova: int
    size: int
    readable: bool
    writable: bool
    file: MappedFile
    offset: int


class Ioas:
    """An I/O address space, with IOVAs from ``apertures`` for those who don't choose their own.

    Mappings are kept in an interval map: to find one, or an overlap, takes
    `O(log(n))` however many there are.
    """

    def __init__(self, ident: int, apertures: Iterable[tuple[int, int]]) -> None:
        self.id = ident
        self._space = IntervalMap()  # IOVA -> offset in the file
        self._mappings: dict[int, IoasMapping] = {}  # the same by IOVA, with the file
        self._free = FreeIova(apertures)

    def __len__(self) -> int:
        return len(self._mappings)

    def regions(self) -> list[MemoryRegion]:
        """Return what is mapped, lowest IOVA first, as a device's memory is told of it."""
        return [MemoryRegion(*self._mappings[info.iova]) for info in self._space]

    def map(
        self,
        size: int,
        file: MappedFile,
        offset: int,
        *,
        readable: bool,
        writable: bool,
        iova: int | None = None,
    ) -> int:
        """Map ``[offset, offset + size)`` of ``file``, which is in it, and return the IOVA.

        Without ``iova`` it is where whole pages are free, and begins as far into its
        page as ``offset`` does. On success the use of ``file`` becomes the mapping's
        and goes back with :meth:`unmap`; on failure it stays the caller's.

        Raises:
            PeerError: ENOSPC, no such range is free; for an ``iova``: EEXIST, an
                overlap with another mapping; EINVAL, past the end of the space.
        """
        if iova is None:
            iova = self._allocate(size, offset & _PAGE_MASK)
        elif iova + size > ADDRESS_SPACE_END:
            raise PeerError(errno.EINVAL, f"{size:#x} bytes at {iova:#x} pass the end of the space")
        access = Access.READ if readable else Access.NONE
        access |= Access.WRITE if writable else Access.NONE
        if not self._space.add(MappingInfo(iova, offset, size, access)):
            raise PeerError(errno.EEXIST, f"[{iova:#x}, {iova + size:#x}) overlaps a mapping")
        self._mappings[iova] = IoasMapping(iova, size, readable, writable, file, offset)
        self._free.take(*_pages(iova, size))
        return iova

    def unmap(self, iova: int, size: int) -> IoasMapping:
        """Remove and return the mapping that is exactly ``[iova, iova + size)``.

        Raises:
            PeerError: ENOENT, none is.
        """
        mapping = self._mappings.get(iova)
        if mapping is None or mapping.size != size:
            raise PeerError(errno.ENOENT, f"[{iova:#x}, {iova + size:#x}) is not one mapping")
        del self._mappings[iova]
        self._space.remove(iova, iova + size)
        self._free.give(*self._vacated(iova, size))
        return mapping

    def find(self, iova: int, size: int) -> IoasMapping:
        """Return the mapping that holds all of ``[iova, iova + size)``.

        Raises:
            PeerError: ENOENT, none does.
        """
        info = self._space.find(iova)
        if info is None or iova + size > info.iova + info.size:
            raise PeerError(errno.ENOENT, f"[{iova:#x}, {iova + size:#x}) is not in one mapping")
        return self._mappings[info.iova]

    def clear(self) -> list[IoasMapping]:
        """Remove and return every mapping."""
        removed = list(self._mappings.values())
        self._mappings.clear()
        self._space.clear()
        self._free = FreeIova(self._free.apertures)
        return removed

    def _allocate(self, size: int, in_page: int) -> int:
        start, end = _pages(in_page, size)
        found = self._free.find(end - start)
        if found is None:
            raise PeerError(errno.ENOSPC, f"no {end - start:#x} bytes are free in IOAS {self.id}")
        return found + in_page

    def _vacated(self, iova: int, size: int) -> tuple[int, int]:
        """Return the pages of a removed mapping that no other one touches."""
        start, end = _pages(iova, size)
        page = page_size()
        if self._space.overlapping(start, start + page):
            start += page
        if start < end and self._space.overlapping(end - page, end):
            end -= page
        return start, end

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        self._space._check()  # noqa: SLF001 - one check of the whole, part by part
        self._free._check()  # noqa: SLF001 - as above
        if [info.iova for info in self._space] != sorted(self._mappings):
            raise InternalError(f"IOAS {self.id}: the map has other addresses than the mappings")
        for iova, mapping in self._mappings.items():
            info = self._space.find(iova)
            if info is None or info[:3] != (iova, mapping.offset, mapping.size):
                raise InternalError(f"IOAS {self.id}: {mapping} is filed as {info}")
            if not mapping.file.uses:
                raise InternalError(f"IOAS {self.id}: {mapping} has lost its file")
        # What is free are the pages that no mapping touches: no more, and no less.
        free = FreeIova(self._free.apertures)
        for info in self._space:
            free.take(*_pages(info.iova, info.size))
        if list(free) != list(self._free):
            raise InternalError(f"IOAS {self.id}: {list(self._free)} are free, not {list(free)}")


def _pages(start: int, size: int) -> tuple[int, int]:
    """Return the whole pages that ``[start, start + size)`` touches."""
    return start & ~_PAGE_MASK, start + size + _PAGE_MASK & ~_PAGE_MASK
