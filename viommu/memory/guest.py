"""Guest physical memory as a VMM has told it, region by region.

Regions don't overlap and have no priority. Ranges are half-open; a guest
physical address (GPA) and a size are what callers pass, as on the wire.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import GuestMemoryError, InternalError, PeerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.deferred import Deferred
    from viommu.memory.files import MappedFile

__all__ = ["GuestMemory", "MemoryRegion"]

_ADDRESS_SPACE: Final = 1 << 64
_MAX_REGIONS: Final = 65535  # what vfio-user lets a client assume ("max_dma_maps")


class MemoryRegion(NamedTuple):
    """What is known of one region: ``[gpa, gpa + size)`` is ``file`` from ``offset`` on."""

    gpa: int
    size: int
    readable: bool
    writable: bool
    file: MappedFile | None
    offset: int

    @property
    def shared(self) -> bool:
        """Return whether there is a file, without which the memory is out of reach."""
        return self.file is not None

    @property
    def access(self) -> str:
        """Return what is allowed, as ``rw``, ``r-``, ``-w`` or ``--``."""
        return ("r" if self.readable else "-") + ("w" if self.writable else "-")


class _Region:
    """A region with the slice of its file that accesses need."""

    __slots__ = ("end", "info", "mapping", "readable", "start", "view", "writable")

    def __init__(self, info: MemoryRegion) -> None:
        self.info = info
        self.start = info.gpa
        self.end = info.gpa + info.size
        self.mapping = memoryview(b"") if info.file is None else info.file.view
        self.view = self.mapping[info.offset : info.offset + info.size]
        # Both are false without a file: one test on the way of an access.
        self.readable = info.readable and info.file is not None
        self.writable = info.writable and info.file is not None

    def refusal(self, *, write: bool) -> str:
        """Say why an access is refused."""
        where = f"region [{self.start:#x}, {self.end:#x})"
        if self.info.file is None:
            return f"{where} came without a file descriptor, so it isn't shared with this process"
        return f"{where} is not {'writable' if write else 'readable'}"


class GuestMemory:
    """The memory of one guest, as one client describes it.

    ``generation`` changes with every region that comes or goes. Whoever keeps
    views compares it before each use and asks again when it differs; an old view
    stays safe to touch, but may no longer be the guest's memory.

    Adding and removing a region costs O(number of regions), finding one
    O(log n), or O(1) where the last one was found.
    """

    def __init__(self, max_regions: int = _MAX_REGIONS) -> None:
        self.generation = 0
        self._max_regions = max_regions
        self._starts: list[int] = []
        self._regions: list[_Region] = []
        self._last = _NOWHERE
        self._watchers: list[Callable[[], None]] = []

    def watch(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``generation`` changes, while regions come or go."""
        self._watchers.append(callback)

    def unwatch(self, callback: Callable[[], None]) -> None:
        """Stop calling what one :meth:`watch` gave."""
        self._watchers.remove(callback)

    def map(
        self,
        gpa: int,
        size: int,
        *,
        readable: bool,
        writable: bool,
        file: MappedFile | None,
        offset: int = 0,
    ) -> None:
        """Add the region ``[gpa, gpa + size)``, which is ``file`` from ``offset`` on.

        Without ``file`` the region is only remembered: to touch it is an error
        that says so. On success the use of ``file`` becomes the region's and is
        given back by :meth:`unmap`; on failure it stays the caller's. Mapping
        again exactly what is mapped changes nothing.

        Raises:
            PeerError: EINVAL, an overlap with another region, an empty range, one
                that passes the end of the address space or of the file, or too
                many regions.
        """
        end = gpa + size
        if size <= 0 or gpa < 0 or end > _ADDRESS_SPACE:
            raise PeerError(errno.EINVAL, f"region of {size:#x} bytes at {gpa:#x} can't be")
        if file is not None and not 0 <= offset <= file.size - size:
            raise PeerError(errno.EINVAL, f"{offset:#x} + {size:#x} passes the end of the file")
        info = MemoryRegion(gpa, size, readable, writable, file, offset)
        index = bisect_right(self._starts, gpa)
        for other in self._regions[max(index - 1, 0) : index + 1]:
            if other.info == info:
                if file is not None:
                    file.close()
                return
            if other.start < end and gpa < other.end:
                raise PeerError(
                    errno.EINVAL,
                    f"region [{gpa:#x}, {end:#x}) overlaps [{other.start:#x}, {other.end:#x})",
                )
        if len(self._regions) >= self._max_regions:
            raise PeerError(errno.EINVAL, f"more than {self._max_regions} regions of memory")
        self._starts.insert(index, gpa)
        self._regions.insert(index, _Region(info))
        self._next_generation()

    def unmap(self, gpa: int, size: int) -> Deferred[None] | None:
        """Remove the region ``[gpa, gpa + size)``.

        It is gone on return. Memory that others can hold is gone when they have let
        go, and for everybody else on return: then the result is deferred, and the VMM
        may be told when it is there.

        Raises:
            PeerError: ENOENT, no region is exactly that.
        """
        index = bisect_right(self._starts, gpa) - 1
        if index < 0 or (info := self._regions[index].info)[:2] != (gpa, size):
            raise PeerError(errno.ENOENT, f"[{gpa:#x}, {gpa + size:#x}) is not a mapped region")
        del self._starts[index]
        del self._regions[index]
        self._changed()
        if info.file is not None:
            info.file.close()
        return None

    def unmap_all(self) -> Deferred[None] | None:
        """Remove every region; the result is as that of :meth:`unmap`."""
        regions, self._regions, self._starts = self._regions, [], []
        if regions:
            self._changed()
        for region in regions:
            if region.info.file is not None:
                region.info.file.close()
        return None

    def close(self) -> None:
        """Remove every region; the object can be used again."""
        self.unmap_all()

    def regions(self) -> list[MemoryRegion]:
        """Return what is mapped, lowest address first."""
        return [region.info for region in self._regions]

    def region_at(self, gpa: int) -> MemoryRegion | None:
        """Return the region that has the address ``gpa``."""
        index = bisect_right(self._starts, gpa) - 1
        region = self._regions[index] if index >= 0 else _NOWHERE
        return region.info if gpa < region.end else None

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of ``[gpa, gpa + size)``, which may span regions.

        Raises:
            GuestMemoryError: Some of it is not memory, not shared or not readable.
        """
        region = self._last
        if region.readable and region.start <= gpa and gpa + size <= region.end and size >= 0:
            start = gpa - region.start
            return region.view[start : start + size].tobytes()
        return b"".join(self.views(gpa, size, write=False))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``, all of it or nothing; it may span regions.

        Raises:
            GuestMemoryError: Some of it is not memory, not shared or not writable.
        """
        # Whatever has elements of another size is seen as bytes.
        source = data if isinstance(data, bytes | bytearray) else memoryview(data).cast("B")
        size = len(source)
        region = self._last
        if region.writable and region.start <= gpa and gpa + size <= region.end:
            start = gpa - region.start
            region.view[start : start + size] = source
            return
        views = self.views(gpa, size, write=True)
        done = 0
        for view in views:
            view[:] = source[done : done + len(view)]
            done += len(view)

    def views(self, gpa: int, size: int, *, write: bool) -> list[memoryview]:
        """Return the memory itself, as views of bytes in the order of addresses.

        Regions that follow one another in both address and file come as one
        view (a VMM splits RAM where firmware is shadowed). Views are read-only
        unless ``write``, and only regions that are writable give those.

        Raises:
            GuestMemoryError: Some of it is not memory, not shared, or not
                readable, writable respectively.
        """
        if size <= 0:
            if size < 0:
                raise GuestMemoryError(gpa, size, "the size is negative")
            return []
        end = gpa + size
        region = self._last
        if not region.start <= gpa < region.end:
            index = bisect_right(self._starts, gpa) - 1
            region = self._regions[index] if index >= 0 else _NOWHERE
            if gpa >= region.end:
                raise GuestMemoryError(gpa, size, f"no memory at {gpa:#x}")
            self._last = region
        if not (region.writable if write else region.readable):
            raise GuestMemoryError(gpa, size, region.refusal(write=write))
        if end <= region.end:
            start = gpa - region.start
            view = region.view[start : start + size]
            return [view if write else view.toreadonly()]
        return self._span(gpa, end, write=write)

    def _span(self, gpa: int, end: int, *, write: bool) -> list[memoryview]:
        """Return the views of a range that starts in a region and passes its end."""
        size = end - gpa
        index = bisect_right(self._starts, gpa) - 1
        # Pieces of one mapping: (mapping, first offset, offset behind the last).
        pieces: list[tuple[memoryview, int, int]] = []
        at = gpa
        while at < end:
            region = self._regions[index] if index < len(self._regions) else _NOWHERE
            if not region.start <= at < region.end:
                raise GuestMemoryError(gpa, size, f"no memory at {at:#x}")
            if not (region.writable if write else region.readable):
                raise GuestMemoryError(gpa, size, region.refusal(write=write))
            first = region.info.offset + at - region.start
            last = region.info.offset + min(end, region.end) - region.start
            if pieces and pieces[-1][0] is region.mapping and pieces[-1][2] == first:
                pieces[-1] = (region.mapping, pieces[-1][1], last)
            else:
                pieces.append((region.mapping, first, last))
            at = region.end
            index += 1
        views = [mapping[first:last] for mapping, first, last in pieces]
        return views if write else [view.toreadonly() for view in views]

    def _changed(self) -> None:
        self._last = _NOWHERE
        self._next_generation()

    def _next_generation(self) -> None:
        self.generation += 1
        for watcher in self._watchers:
            watcher()

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        if self._starts != [region.start for region in self._regions]:
            raise InternalError(f"starts and regions differ: {self._starts} {self.regions()}")
        before = 0
        for region in self._regions:
            if not before <= region.start < region.end <= _ADDRESS_SPACE:
                raise InternalError(f"{region.info} is empty or begins before {before:#x}")
            before = region.end
        if self._last is not _NOWHERE and self._last not in self._regions:
            raise InternalError(f"the last region found, {self._last.info}, is gone")


_NOWHERE: Final = _Region(MemoryRegion(0, 0, False, False, None, 0))
