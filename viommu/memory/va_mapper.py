"""Guest physical memory in one range of host virtual addresses (half-open ranges of GPAs).

VFIO type1 finds the pages to pin through a virtual address. So RAM and BARs are
mapped into one reserved range, each at its guest physical address: what is
contiguous for the guest is contiguous here, and one mapping can span both.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, Self

from sortedcontainers import SortedDict

from viommu.errors import BackendError, InternalError, UsageError
from viommu.memory import fixed_mapping
from viommu.memory.backing import FileBacking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.memory.backing import Backing
    from viommu.memory.dma_target import AddressRange

__all__ = ["DEFAULT_RESERVATION", "OutsideReservationError", "VaMapper"]

# What a PC with 40 bits of physical addresses has; costs nothing but addresses.
DEFAULT_RESERVATION: Final = 1 << 40

# Large pages of the host need addresses as aligned as the guest's, up to 1 GiB.
_ALIGNMENT: Final = 1 << 30


class OutsideReservationError(BackendError):
    """Guest physical addresses that lie beyond the end of the reserved range."""

    def __init__(self, where: AddressRange, size: int) -> None:
        super().__init__(
            errno.ERANGE,
            f"{where} lies outside the {size:#x} bytes of virtual addresses reserved for"
            " guest memory; reserve more",
        )


class VaMapper:
    """``size`` bytes of reserved addresses; GPA ``g`` is at :attr:`base` ``+ g``.

    Nothing is ever mapped there but what :meth:`map` puts there: the rest is
    inaccessible, and stays reserved when memory goes. Children and core dumps
    get none of it.

    It starts with one use, its creator's, and is unmapped as a whole with the last.

    Args:
        size: Multiple of the page size; what is mapped must lie below.

    Raises:
        UsageError: ``size`` is not a number of pages, or none that a process can have.
        BackendError: There is no such range of addresses free.
    """

    def __init__(self, size: int = DEFAULT_RESERVATION) -> None:
        self._page = fixed_mapping.page_size()
        if size <= 0 or size % self._page or size >= fixed_mapping.MAX_SIZE - _ALIGNMENT:
            raise UsageError(f"can't reserve {size:#x} bytes: not a possible number of pages")
        self.size = size
        self.base = fixed_mapping.reserve(size, _ALIGNMENT)
        self._uses = 1
        self._mapped: SortedDict[int, AddressRange] = SortedDict()

    @property
    def uses(self) -> int:
        """Return how many uses were not given back; at 0 the range is gone."""
        return self._uses

    def __iter__(self) -> Iterator[AddressRange]:
        """Yield what is mapped, piece by piece as it was mapped, lowest address first."""
        return iter(self._mapped.values())

    def retain(self) -> Self:
        """Take one more use.

        Raises:
            UsageError: The last use was given back.
        """
        self._must_be_open()
        self._uses += 1
        return self

    def close(self) -> None:
        """Give one use back; with the last one the whole range is unmapped.

        Raises:
            UsageError: More was given back than taken.
            BackendError: The host could not unmap it; the use is not given back.
        """
        self._must_be_open()
        if self._uses == 1:
            fixed_mapping.release(self.base, self.size)
            self._mapped.clear()
        self._uses -= 1

    def map(self, where: AddressRange, backing: Backing, offset: int, *, writable: bool) -> int:
        """Map ``where`` to ``backing`` from ``offset`` on and return its virtual address.

        Without ``writable`` the pages can't be written through this address. The
        caller keeps its use of ``backing`` until the range is unmapped.
        Runtime complexity: `O(log(n))`, and a few calls of the host.

        Raises:
            OutsideReservationError: Some of it is beyond the reserved range.
            BackendError: EINVAL, not whole pages; EEXIST, something is mapped
                there; or the host refused. Nothing has changed.
            PeerError: The backing is too short, or can't be written.
        """
        self._check_range(where)
        if offset % self._page:
            raise BackendError(errno.EINVAL, f"{where}: offset {offset:#x} is not on a page")
        if other := self._overlapping(where):
            raise BackendError(errno.EEXIST, f"{where}: {other} is mapped")
        backing.check(offset, where.size, writable=writable)
        address = self.base + where.start
        if isinstance(backing, FileBacking):
            fd = backing.fileno()
            fixed_mapping.place_file(address, where.size, fd, offset, writable=writable)
        else:
            source = backing.address + offset
            fixed_mapping.place_memory(address, where.size, source, writable=writable)
        self._mapped[where.start] = where
        return address

    def unmap(self, where: AddressRange) -> None:
        """Take away what :meth:`map` put at exactly ``where``; the addresses stay reserved.

        Raises:
            UsageError: Exactly that was not mapped.
            BackendError: The host refused; it is still mapped.
        """
        self._must_be_open()
        if self._mapped.get(where.start) != where:
            raise UsageError(f"{where} was not mapped like this")
        fixed_mapping.vacate(self.base + where.start, where.size)
        del self._mapped[where.start]

    def address(self, where: AddressRange) -> int:
        """Return the virtual address of ``where``, all of which is mapped.

        Runtime complexity: `O(log(n) + k)`, ``k`` pieces.

        Raises:
            OutsideReservationError: Some of it is beyond the reserved range.
            BackendError: EFAULT, some of it is not mapped; EINVAL, not whole pages.
        """
        self._check_range(where)
        at = where.start
        first = next(self._mapped.irange(None, at, reverse=True), at)
        for start in self._mapped.irange(first, where.end, (True, False)):
            piece = self._mapped[start]
            if not piece.start <= at < piece.end:
                break
            at = piece.end
        if at < where.end:
            raise BackendError(errno.EFAULT, f"{where}: nothing is mapped at {at:#x}")
        return self.base + where.start

    def _check_range(self, where: AddressRange) -> None:
        self._must_be_open()
        if not 0 <= where.start < where.end or where.start % self._page or where.end % self._page:
            raise BackendError(errno.EINVAL, f"{where} is not a number of pages")
        if where.end > self.size:
            raise OutsideReservationError(where, self.size)

    def _overlapping(self, where: AddressRange) -> AddressRange | None:
        for start in self._mapped.irange(None, where.end, (True, False), reverse=True):
            piece: AddressRange = self._mapped[start]
            return piece if piece.meets(where) else None
        return None

    def _must_be_open(self) -> None:
        if not self._uses:
            raise UsageError("the reserved addresses are given back")

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        before = 0
        for start, piece in self._mapped.items():
            if start != piece.start or not before <= start < piece.end <= self.size:
                raise InternalError(f"{piece} is filed under {start:#x}, behind {before:#x}")
            before = piece.end
        if self._mapped and not self._uses:
            raise InternalError(f"{len(self._mapped)} pieces are mapped in what is given back")
