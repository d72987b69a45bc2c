"""Guest memory that a region manager is told of as well, so that real devices reach it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.deferred import all_done
from viommu.errors import BackendError, PeerError
from viommu.memory.dma_target import AddressRange
from viommu.memory.fixed_mapping import page_size
from viommu.memory.guest import GuestMemory

if TYPE_CHECKING:
    from viommu.deferred import Deferred
    from viommu.memory.files import MappedFile
    from viommu.memory.region import Region
    from viommu.memory.regions import RegionManager

__all__ = ["ManagedMemory"]

_log: Final = logging.getLogger(__name__)


class ManagedMemory(GuestMemory):
    """Guest memory whose RAM is kept in ``manager`` too, region by region.

    What comes without a file stays out of it: BARs, which the devices that have
    them tell of, and memory that isn't shared. So does what no IOMMU of a host can
    map, and no VMM has: memory that can't be read, or that begins elsewhere in a
    page than its file. Of a region that begins or ends inside a page the whole
    pages are kept.
    """

    def __init__(self, manager: RegionManager) -> None:
        super().__init__()
        self._manager = manager
        self._page_mask: Final = page_size() - 1
        self._managed: dict[tuple[int, int], Region] = {}  # by GPA and size

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
        """Add a region as :meth:`GuestMemory.map` does; real devices reach it, or it isn't added.

        Raises:
            PeerError: As there. Or with the errno of a host that refuses to map it.
        """
        before = self.generation
        super().map(gpa, size, readable=readable, writable=writable, file=file, offset=offset)
        # Unchanged: exactly this was mapped before.
        if file is None or not readable or self.generation == before:
            return
        try:
            self._manage(gpa, size, file, offset, writable=writable)
        except (BackendError, PeerError) as error:
            file.retain()  # unmapping gives a use back, which stays the caller's
            super().unmap(gpa, size)
            raise PeerError(error.errno, f"no device can be given this memory: {error}") from error

    def unmap(self, gpa: int, size: int) -> Deferred[None] | None:
        """Remove a region; real devices lose it first, or by the time that the result is done.

        Raises:
            PeerError: ENOENT, no region is exactly that.
            BackendError: The host did not take it from a device, which still reaches
                that memory. The region is removed all the same.
        """
        region = self._managed.pop((gpa, size), None)
        try:
            if region is not None:
                self._manager.remove_region(region)
        finally:
            released = super().unmap(gpa, size)
        return _both(released, self._manager.settled())

    def unmap_all(self) -> Deferred[None] | None:
        """Remove every region; what the host did not take from a device is logged."""
        managed, self._managed = self._managed, {}
        for region in managed.values():
            try:
                self._manager.remove_region(region)
            except BackendError as error:
                _log.error("a device may still reach guest memory that is gone: %s", error)
        return _both(super().unmap_all(), self._manager.settled())

    def _manage(
        self, gpa: int, size: int, file: MappedFile, offset: int, *, writable: bool
    ) -> None:
        start = gpa + self._page_mask & ~self._page_mask
        end = gpa + size & ~self._page_mask
        if start >= end or (gpa - offset) & self._page_mask:
            return
        region = self._manager.add_region(f"memory at {gpa:#x}", AddressRange(start, end))
        try:
            backing = file.backing.retain()
            try:
                self._manager.add_mapping(
                    region,
                    AddressRange(0, end - start),
                    backing,
                    offset + start - gpa,
                    writable=writable,
                )
            except BaseException:
                backing.close()
                raise
            self._manager.enable(region, writable=writable)
        except BaseException:
            self._manager.remove_region(region)
            raise
        self._managed[gpa, size] = region


def _both(*waits: Deferred[None] | None) -> Deferred[None] | None:
    """Return what is done when all of ``waits`` are."""
    left = [wait for wait in waits if wait is not None]
    return all_done(left) if left else None
