"""Guest memory as the address spaces (IOAS) of one iommufd have it: RAM is pinned once.

The kernel pins and counts what is mapped anew for every mapping, also of the same file,
and the limit (RLIMIT_MEMLOCK) is hit when several domains map the same RAM. A copy of
a mapping shares its pages with it. So all of RAM is mapped in one more IOAS, and what a
domain maps is copied from there. No device is ever attached to that one, therefore
it pins nothing itself: a page is pinned while some domain has it.

What that costs the kernel is that it looks at all copies of a page whenever one comes or
goes. A guest could map the same page a million times, so there is a limit, beyond
which mappings are made, pinned and counted anew.

Source: ``drivers/iommu/iommufd/pages.c``; measured in ``guest_tests/l1/test_mock.py``.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Final

from sortedcontainers import SortedDict

from viommu.errors import Access, BackendError, InternalError
from viommu.memory.dma_target import AddressRange, DmaNeeds, MemoryKind, require_host_va
from viommu_backends.bar_file import BarFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.memory.backing import FileBacking
    from viommu.memory.dma_target import DmaRegistration, DmaTarget
    from viommu_backends.host_map import Piece
    from viommu_backends.iommufd_context import Iommufd

__all__ = ["IommufdMemory"]

_log: Final = logging.getLogger(__name__)

_BLOCK: Final = 1 << 21  # bytes of guest memory
_COPIES: Final = 4096  # of what is in one block: eight of each page


class _Copies:
    """Where copies are, by IOAS and IOVA, and how many there are in each block of memory."""

    def __init__(self) -> None:
        self._where: dict[tuple[int, int], AddressRange] = {}
        self._crowd: Counter[int] = Counter()

    def have_room(self, where: AddressRange) -> bool:
        """Return whether one more copy of ``where`` is none too many."""
        return all(self._crowd[block] < _COPIES for block in _blocks(where))

    def add(self, ioas: int, iova: int, where: AddressRange) -> None:
        self._where[ioas, iova] = where
        self._crowd.update(_blocks(where))

    def discard(self, ioas: int, iova: int) -> None:
        where = self._where.pop((ioas, iova), None)
        if where is not None:
            self._crowd.subtract(_blocks(where))


def _blocks(where: AddressRange) -> range:
    return range(where.start // _BLOCK, -(-where.end // _BLOCK))


class IommufdMemory:
    """Maps guest memory into the IOASes of ``context``; a DMA target itself, for RAM.

    ``subscribe`` is :meth:`~viommu.memory.regions.RegionManager.register`. Of all targets of
    the context this one is the first: what a domain is told of can be copied already.

    Raises:
        BackendError: The host refused another IOAS.
    """

    def __init__(
        self,
        context: Iommufd,
        subscribe: Callable[[DmaTarget, str, DmaNeeds], DmaRegistration],
    ) -> None:
        self.context = context
        self._subscribe = subscribe
        # Addresses are only needed where files can't be mapped; private memory
        # has no file, and an address is what is left.
        self._needs = DmaNeeds.NONE if context.can_map_files() else DmaNeeds.HOST_VA
        self._held: SortedDict[int, AddressRange] = SortedDict()
        self._copies = _Copies()
        #: The kernel's number of the IOAS that has RAM at its guest physical addresses.
        self.ioas = context.alloc_ioas()
        try:
            self._registration = self.register(self, "iommufd RAM")
        except BaseException:
            context.destroy(self.ioas)
            raise

    def register(self, target: DmaTarget, name: str) -> DmaRegistration:
        """Let the target of a domain follow guest memory, with what it needs to map it."""
        return self._subscribe(target, name, self._needs)

    def map(self, ioas: int, iova: int, piece: Piece, prot: Access) -> None:
        """Map a piece of guest memory in a domain's IOAS.

        RAM is copied, a BAR is mapped by dma-buf. What can't be copied, or was too often,
        is mapped by its file or address, and the kernel says what is wrong with it.

        Raises:
            BackendError: The host refused; nothing is mapped.
        """
        file = piece.file
        where = AddressRange(piece.gpa, piece.gpa + piece.size)
        if isinstance(file, BarFile):
            fd = file.dma_buf(piece.offset, piece.size)
            try:
                # The kernel keeps the dma-buf; the fd has done its part.
                self.context.map_file(ioas, iova, fd, 0, piece.size, prot)
            finally:
                os.close(fd)
        elif self._holds(where) and self._copies.have_room(where):
            self.context.copy(ioas, self.ioas, piece.size, iova, piece.gpa, prot)
            self._copies.add(ioas, iova, where)
        else:
            self._map(ioas, iova, where, piece.va, file, piece.offset, prot)

    def unmap(self, ioas: int, iova: int, size: int) -> None:
        """Remove from a domain's IOAS exactly what was mapped by one :meth:`map`.

        Raises:
            BackendError: The host refused; it is still mapped.
        """
        removed = self.context.unmap(ioas, iova, size)
        if removed != size:
            raise InternalError(f"{removed:#x} bytes were unmapped at {iova:#x}, not {size:#x}")
        self._copies.discard(ioas, iova)

    def map_dma(
        self,
        where: AddressRange,
        /,
        *,
        host_va: int | None,
        mappable: FileBacking | None,
        file_offset: int,
        writable: bool,
        kind: MemoryKind,
    ) -> None:
        """Have RAM ready to be copied; what the host refuses is left to the domains."""
        if kind is MemoryKind.DEVICE:
            return
        prot = Access.READ | Access.WRITE if writable else Access.READ
        try:
            self._map(self.ioas, where.start, where, host_va, mappable, file_offset, prot)
        except BackendError as error:
            _log.info("memory is pinned once for each domain: %s", error)
        else:
            self._held[where.start] = where

    def unmap_dma(self, where: AddressRange, /) -> None:
        """Take RAM away; what domains have copied stays until they unmap it.

        Raises:
            BackendError: The host refused.
        """
        for start in list(self._held.irange(where.start, where.end, (True, False))):
            self.context.unmap(self.ioas, start, self._held[start].size)
            del self._held[start]

    def close(self) -> None:
        """Unmap everything; all domains have been left.

        Raises:
            BackendError: The host refused; what is left ends with the context.
        """
        self._registration.release()
        self.context.destroy(self.ioas)

    def _holds(self, where: AddressRange) -> bool:
        start = next(self._held.irange(None, where.start, reverse=True), None)
        return start is not None and self._held[start].holds(where)

    def _map(  # noqa: PLR0917 - what a place in memory is
        self,
        ioas: int,
        iova: int,
        where: AddressRange,
        va: int | None,
        file: FileBacking | None,
        offset: int,
        prot: Access,
    ) -> None:
        if file is not None and self.context.can_map_files():
            self.context.map_file(ioas, iova, file.fileno(), offset, where.size, prot)
        else:
            self.context.map(ioas, iova, require_host_va(where, va), where.size, prot)
