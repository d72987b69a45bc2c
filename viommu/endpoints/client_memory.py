"""The address space of a stand-alone device: what its vfio-user client maps, where it maps it."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from viommu.basic import BasicMemoryMapper
from viommu.deferred import Deferred
from viommu.errors import Access
from viommu.mapper import MappingInfo
from viommu.memory import MessageMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.events import Event
    from viommu.loop import Loop
    from viommu.memory import MappedFile

__all__ = ["ClientMemory"]

_log: Final = logging.getLogger(__name__)


class ClientMemory(MessageMemory):
    """Memory that an endpoint reaches through :attr:`mapper`, as far as the client has mapped it.

    An address that the client names is an IOVA, and maps to itself. What it unmaps
    can't be exported from then on; it stays in place for those who have exported
    it, and the result of :meth:`unmap` comes when they have let go.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.mapper = BasicMemoryMapper()
        self._loop = loop
        # What the export session says when nothing revoked is held any more; what then follows.
        self._resolution: Event | None = None
        self._following: list[Callable[[], None]] = []

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
        """Add a region, which can be exported; see :meth:`GuestMemory.map`."""
        before = self.generation
        super().map(gpa, size, readable=readable, writable=writable, file=file, offset=offset)
        if self.generation != before:  # otherwise exactly this was mapped before
            access = Access.READ if readable else Access.NONE
            access |= Access.WRITE if writable else Access.NONE
            self.mapper.add_map(MappingInfo(gpa, gpa, size, access))

    def unmap(self, gpa: int, size: int) -> Deferred[None] | None:
        """Remove the region ``[gpa, gpa + size)`` once nobody holds any of it.

        Raises:
            PeerError: ENOENT, no region is exactly that.
        """
        remove = partial(super().unmap, gpa, size)
        region = self.region_at(gpa)
        if region is None or (region.gpa, region.size) != (gpa, size):
            return remove()  # which says what is wrong
        return self._when_released(self.mapper.remove_map(gpa, size).resolution, remove)

    def unmap_all(self) -> Deferred[None] | None:
        """Remove every region once nobody holds any of them."""
        return self._when_released(self.mapper.reset_domain(), super().unmap_all)

    def close(self) -> None:
        """Remove every region now: the client has gone, and its device was reset."""
        self._following.clear()
        held = self.mapper.reset_domain()
        if held is not None:
            _log.warning("the device still holds memory of a client that has gone")
            self._watch(held)
        elif self._resolution is not None:
            self._released(self._resolution)
        super().unmap_all()

    def _when_released(
        self, resolution: Event | None, remove: Callable[[], object]
    ) -> Deferred[None] | None:
        if resolution is None:
            remove()
            return None
        released: Deferred[None] = Deferred()

        def follow() -> None:
            remove()
            released.resolve(None)

        self._watch(resolution)
        self._following.append(follow)
        return released

    def _watch(self, resolution: Event) -> None:
        # It is the same one as long as anything revoked is held.
        if self._resolution is resolution:
            return
        if self._resolution is not None:  # it has fired, and the loop has not come to it yet
            self._released(self._resolution)
        self._resolution = resolution
        self._loop.on_readable(resolution, partial(self._released, resolution))

    def _released(self, resolution: Event) -> None:
        self._resolution = None
        self._loop.forget(resolution)
        resolution.close()
        following, self._following = self._following, []
        for follow in following:
            follow()
