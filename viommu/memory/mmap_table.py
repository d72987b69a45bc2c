"""Device memory that a client may map, and who must wait until it has let go.

An *owner* (a virtual IOMMU, a device) offers areas of its memory. The client is
told an offset and a length for each and maps exactly that. As long as some of it
is mapped the owner can't be destroyed; to close the whole table always works,
and what is still mapped is released with its last mapping.

Ranges are half-open: an area is the bytes ``[base, base + length)`` of device
memory, and ``[offset, offset + length)`` of what the client maps. Offset 0 is
never given out, so that a forgotten one is an error; but a file with a layout of
its own, such as a VFIO device's, has its areas where it has them.

Source: the mmap infrastructure of Linux's iommufd ("iommufd: Add mmap
interface", 6.17), whose rules and errnos these are.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from sortedcontainers import SortedDict

from viommu.errors import InternalError, PeerError, UsageError
from viommu.memory.dma_target import AddressRange
from viommu.memory.fixed_mapping import page_size

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MmapArea", "MmapMapping", "MmapOwner", "MmapTable"]

_END: Final = 1 << 63  # mmap(2) takes a signed offset
_MAX_AREAS: Final = 4096


class MmapOwner:
    """Something that offers areas, made by :meth:`MmapTable.add_owner`.

    ``users`` counts its mappings and the owners that depend on it. It is *alive*
    until it is destroyed or its table closed, and released when it isn't and has
    no users.
    """

    def __init__(
        self, name: str, parent: MmapOwner | None, on_release: Callable[[], None] | None
    ) -> None:
        self.name = name
        self.parent = parent
        self.users = 0
        self.alive = True
        self.released = False
        self.areas: list[MmapArea] = []
        self._on_release = on_release

    def retain(self) -> Self:
        """Take one more use."""
        self.users += 1
        return self

    def let_go(self) -> None:
        """Give one use back.

        Raises:
            UsageError: More was given back than taken.
        """
        if not self.users:
            raise UsageError(f"{self} was let go more often than retained")
        self.users -= 1
        if not self.alive:
            self.release_if_unused()

    def end(self) -> None:
        """Stop being alive."""
        self.alive = False
        self.release_if_unused()

    def release_if_unused(self) -> None:
        """Release what belongs to the owner, then its hold on its parent, once."""
        if self.users or self.released:
            return
        self.released = True
        if self._on_release is not None:
            self._on_release()
        if self.parent is not None:
            self.parent.let_go()

    def __repr__(self) -> str:
        return f"<mmap owner {self.name!r} users {self.users}>"


class MmapArea(NamedTuple):
    """``length`` bytes at ``base`` in the owner's device memory, mapped at ``offset``."""

    owner: MmapOwner
    base: int
    length: int
    offset: int


class MmapMapping:
    """What one process has mapped of an area: pieces, each of which is a use of the owner.

    As with mmap(2), what is cut in two counts twice, and a child's copy counts by itself.
    """

    def __init__(self, area: MmapArea, pieces: list[AddressRange], page: int) -> None:
        self.area = area
        #: What is mapped, counted from the start of the area, in order.
        self.pieces = pieces
        self._page = page

    def fork(self) -> MmapMapping:
        """Return a child's copy."""
        for _ in self.pieces:
            self.area.owner.retain()
        return MmapMapping(self.area, list(self.pieces), self._page)

    def unmap(self, part: AddressRange | None = None) -> None:
        """Unmap everything, or ``part`` of the area, all of which need not be mapped.

        Raises:
            PeerError: EINVAL, it is empty or not on whole pages.
        """
        part = AddressRange(0, self.area.length) if part is None else part
        if part.start >= part.end or part.start % self._page or part.end % self._page:
            raise PeerError(errno.EINVAL, f"{part} can't be unmapped: not a number of pages")
        before, self.pieces = self.pieces, []
        for piece in before:
            below = AddressRange(piece.start, min(piece.end, part.start))
            above = AddressRange(max(piece.start, part.end), piece.end)
            self.pieces += [rest for rest in (below, above) if rest.start < rest.end]
        # Taken before given back, so that the owner doesn't seem to be unused.
        for _ in self.pieces:
            self.area.owner.retain()
        for _ in before:
            self.area.owner.let_go()


class MmapTable:
    """The areas that clients of one file descriptor may map.

    Args:
        page: The size of a page, the host's unless said.
        max_areas: How many areas there may be at a time.
    """

    def __init__(self, page: int | None = None, max_areas: int = _MAX_AREAS) -> None:
        self._page = page_size() if page is None else page
        self._max_areas = max_areas
        self._areas: SortedDict[int, MmapArea] = SortedDict()
        self._owners: list[MmapOwner] = []
        self.closed = False

    def areas(self) -> list[MmapArea]:
        """Return what can be mapped now, by rising offset."""
        return list(self._areas.values())

    def add_owner(
        self,
        name: str,
        *,
        parent: MmapOwner | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> MmapOwner:
        """Add an owner without areas.

        ``on_release`` is called once, when nothing uses it any more: after it was
        destroyed, or after the table was closed and its last mapping has gone.
        Until then ``parent`` can't be destroyed.

        Raises:
            PeerError: ENOENT, the parent is destroyed; EBADF, the table is closed.
        """
        self._must_be_open()
        if parent is not None:
            self._must_be_alive(parent)
            parent.retain()
        owner = MmapOwner(name, parent, on_release)
        self._owners.append(owner)
        return owner

    def offer(
        self, owner: MmapOwner, base: int, length: int, *, offset: int | None = None
    ) -> MmapArea:
        """Let clients map ``[base, base + length)`` until ``owner`` is destroyed.

        The offset is the lowest one where it fits, unless the file has it somewhere
        already. Runtime complexity: `O(n)`.

        Raises:
            PeerError: EINVAL, empty or not on whole pages; ENOENT, the owner is
                destroyed; EEXIST, there is an area at ``offset``; ENOSPC, too many or
                too large; EBADF, the table is closed.
        """
        self._must_be_open()
        self._must_be_alive(owner)
        if base < 0 or length <= 0 or base % self._page or length % self._page:
            raise PeerError(errno.EINVAL, f"{length:#x} bytes at {base:#x} are not whole pages")
        if offset is not None and (offset < 0 or offset % self._page):
            raise PeerError(errno.EINVAL, f"{offset:#x} is not where a page begins")
        if len(self._areas) >= self._max_areas:
            raise PeerError(errno.ENOSPC, f"more than {self._max_areas} areas can't be mapped")
        if offset is None:
            offset = self._free_offset(length)
        elif any(offset < a.offset + a.length and a.offset < offset + length for a in self.areas()):
            raise PeerError(errno.EEXIST, f"some of {length:#x} bytes at {offset:#x} are offered")
        if offset + length > _END:
            raise PeerError(errno.ENOSPC, f"{length:#x} bytes at {offset:#x} pass the last offset")
        area = MmapArea(owner, base, length, offset)
        self._areas[offset] = area
        owner.areas.append(area)
        return area

    def map(
        self, offset: int, length: int, *, shared: bool = True, executable: bool = False
    ) -> MmapMapping:
        """Map an area, as a whole, for a client.

        Clients of mmap(2) round ``length`` up to whole pages before.

        Raises:
            PeerError: EINVAL, not whole pages or a private mapping; EPERM, to
                execute it; ENXIO, no area is exactly that, or not any more; EBADF,
                the table is closed.
        """
        self._must_be_open()
        # Used from here on, so that it can't go while it is looked at.
        area = self._find(offset)
        if area is not None:
            area.owner.retain()
        try:
            exact = self._validated(area, offset, length, shared=shared, executable=executable)
        except PeerError:
            if area is not None:
                area.owner.let_go()
            raise
        return MmapMapping(exact, [AddressRange(0, length)], self._page)

    def destroy(self, owner: MmapOwner) -> None:
        """Destroy an owner: nothing of it can be mapped any more.

        Raises:
            PeerError: EBUSY, something of it is mapped, or another owner depends on
                it; ENOENT, it is destroyed already; EBADF, the table is closed.
        """
        self._must_be_open()
        self._must_be_alive(owner)
        if owner.users:
            raise PeerError(errno.EBUSY, f"{owner.name} has {owner.users} users")
        for area in owner.areas:
            del self._areas[area.offset]
        owner.areas.clear()
        self._owners.remove(owner)
        owner.end()

    def close(self) -> None:
        """End everything; mapped memory stays until it is unmapped. Closing twice is harmless."""
        self.closed = True
        self._areas.clear()
        owners, self._owners = self._owners, []
        # The youngest first: nobody depends on it.
        for owner in reversed(owners):
            owner.areas.clear()
            owner.end()

    def _free_offset(self, length: int) -> int:
        offset = self._page
        for other in self._areas.values():
            if other.offset - offset >= length:
                break
            offset = other.offset + other.length
        return offset

    def _find(self, offset: int) -> MmapArea | None:
        """Return the area that holds ``offset``. Runtime complexity: `O(log(n))`."""
        for start in self._areas.irange(None, offset, reverse=True):
            area: MmapArea = self._areas[start]
            return area if offset < start + area.length else None
        return None

    def _validated(
        self, area: MmapArea | None, offset: int, length: int, *, shared: bool, executable: bool
    ) -> MmapArea:
        if length <= 0 or length % self._page:
            raise PeerError(errno.EINVAL, f"{length:#x} bytes are not a number of pages")
        if not shared:
            raise PeerError(errno.EINVAL, f"device memory at {offset:#x} can't be private")
        if executable:
            raise PeerError(errno.EPERM, f"device memory at {offset:#x} can't be executed")
        if area is None or (area.offset, area.length) != (offset, length):
            raise PeerError(errno.ENXIO, f"no area is {length:#x} bytes at {offset:#x}")
        return area

    def _must_be_open(self) -> None:
        if self.closed:
            raise PeerError(errno.EBADF, "the table of areas is closed")

    def _must_be_alive(self, owner: MmapOwner) -> None:
        if not owner.alive:
            raise PeerError(errno.ENOENT, f"{owner.name} is destroyed")

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        end = 0
        for offset, area in self._areas.items():
            if offset != area.offset or offset < end or offset % self._page:
                raise InternalError(f"{area} is filed under {offset:#x}, behind {end:#x}")
            if area.owner not in self._owners or area not in area.owner.areas:
                raise InternalError(f"{area} is not its owner's")
            end = offset + area.length
        if sum(len(owner.areas) for owner in self._owners) != len(self._areas):
            raise InternalError(f"owners have other areas than {self.areas()}")
        if any(owner.released or not owner.alive or owner.users < 0 for owner in self._owners):
            raise InternalError(f"some of {self._owners} are not alive")
        if self.closed and self._owners:
            raise InternalError(f"closed, but {self._owners} are left")
