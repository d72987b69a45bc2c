"""What a guest mapped, what memory there is, and so what the host's IOMMU must hold.

A guest maps IOVAs to guest physical addresses; guest memory comes and goes in
pieces (RAM, ROM, BARs of other devices). An *entry* of the host's IOMMU exists
for each part of a mapping that leads to a piece. The identity map of an endpoint
in bypass is one huge mapping, of which only what is memory becomes entries.

Ranges are half-open.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple, Protocol

from viommu.errors import Access, BackendError, InternalError
from viommu.iova import AddressMap, IntervalMap
from viommu.mapper import MappingInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from viommu.memory.backing import FileBacking

__all__ = ["HostMap", "HostSpace", "Piece"]

_log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Guest memory ``[gpa, gpa + size)``, and where this process has it.

    ``va`` is its address here, ``file`` from ``offset`` on what is behind it; either
    may be missing. ``device`` tells a BAR from RAM.
    """

    gpa: int
    size: int
    va: int | None
    file: FileBacking | None
    offset: int
    writable: bool
    device: bool

    def part(self, gpa: int, size: int) -> Piece:
        """Return the part ``[gpa, gpa + size)``."""
        skip = gpa - self.gpa
        va = None if self.va is None else self.va + skip
        return self._replace(gpa=gpa, size=size, va=va, offset=self.offset + skip)


class HostSpace(Protocol):
    """An address space of the host's IOMMU; every call is all or nothing.

    A host that answers later is asked, and what it refuses then is
    :meth:`~HostMap.refuse`'d.
    """

    @property
    def page_size(self) -> int:
        """The smallest page, in bytes: entries begin and end on its multiples."""

    def map(self, iova: int, piece: Piece, prot: Access) -> None:
        """Map a piece at ``iova``; raises BackendError and maps nothing when refused."""

    def unmap(self, iova: int, size: int) -> None:
        """Remove one entry, exactly as it was mapped; raises BackendError when refused."""


class HostMap:
    """Keeps the entries of a space equal to what mappings and memory make of each other.

    Pieces of memory don't overlap. A piece of RAM that the host refuses fails the
    operation, which is undone; a BAR that it refuses is logged, counted in
    ``refused_bars`` and left out, unless a guest asked for exactly that mapping.

    Adding a mapping costs O(log n + pieces); a change of memory costs O(mappings),
    because any of them may lead there.
    """

    def __init__(self, space: HostSpace, pieces: Iterable[Piece] = ()) -> None:
        self.refused_bars = 0
        self._space = space
        self._mappings: AddressMap = IntervalMap()
        self._entries: AddressMap = IntervalMap()
        self._pieces = list(pieces)

    def __len__(self) -> int:
        """Return how many mappings there are."""
        return len(self._mappings)

    def mappings(self) -> list[MappingInfo]:
        """Return what the guest mapped, by rising IOVA."""
        return list(self._mappings)

    def entries(self) -> list[MappingInfo]:
        """Return what the host's IOMMU holds, by rising IOVA."""
        return list(self._entries)

    def pieces(self) -> list[Piece]:
        """Return what memory there is, by rising address."""
        return list(self._pieces)

    # -- the guest's side --

    def add(self, mapping: MappingInfo) -> bool:
        """Add a mapping and its entries; return false if it overlaps another.

        Memory that is not there yet is no error: its entries follow when it comes.

        Raises:
            BackendError: The host refused a part; nothing was added.
        """
        if not self._mappings.add(mapping):
            return False
        try:
            self._enter(mapping, self._pieces, asked_for=True)
        except BackendError:
            self._mappings.remove(mapping.iova, mapping.iova + mapping.size)
            raise
        return True

    def remove(self, start: int, end: int) -> list[MappingInfo] | None:
        """Remove the mappings inside a range; ``None``, and no change, if one would be split.

        Raises:
            BackendError: The host refused; everything is as it was.
        """
        removed = self._mappings.remove(start, end)
        if not removed:
            return removed
        try:
            self._withdraw(self._entries.overlapping(start, end))
        except BackendError:
            for mapping in removed:
                self._mappings.add(mapping)
            raise
        return removed

    def clear(self) -> None:
        """Remove every mapping.

        Raises:
            BackendError: The host refused; everything is as it was.
        """
        self._withdraw(list(self._entries))
        self._mappings.clear()

    # -- memory's side --

    def add_memory(self, piece: Piece) -> None:
        """Let mappings that lead to ``piece`` reach it.

        Raises:
            BackendError: The host refused RAM; the piece is not added.
        """
        index = bisect_left(self._pieces, piece.gpa, key=lambda other: other.gpa)
        for other in self._pieces[max(index - 1, 0) : index + 1]:
            if other.gpa < piece.gpa + piece.size and piece.gpa < other.gpa + other.size:
                raise InternalError(f"{piece} overlaps {other}")
        done: list[MappingInfo] = []
        for mapping in self._leading_to(piece.gpa, piece.gpa + piece.size):
            try:
                done += self._enter(mapping, [piece])
            except BackendError:
                self._withdraw(done)
                raise
        self._pieces.insert(index, piece)

    def remove_memory(self, start: int, end: int) -> None:
        """Withdraw whatever leads to ``[start, end)``, which covers whole pieces, or gaps.

        Raises:
            BackendError: The host refused; everything is as it was.
        """
        doomed = [piece for piece in self._pieces if start <= piece.gpa < end]
        entries = [
            entry
            for mapping in self._leading_to(start, end)
            for entry in self._entries.overlapping(mapping.iova, mapping.iova + mapping.size)
            if start <= entry.gpa < end
        ]
        self._withdraw(entries)
        for piece in doomed:
            self._pieces.remove(piece)

    # -- a host that answers later --

    def refuse(self, iova: int) -> MappingInfo | None:
        """Take note that the host does not have the entry at ``iova``; return its mapping.

        ``None`` if there is no such entry (any more).
        """
        entry = self._entries.find(iova)
        if entry is None or entry.iova != iova:
            return None
        self._entries.remove(iova, iova + entry.size)
        return self._mappings.find(iova)

    def withdraw(self, mapping: MappingInfo) -> None:
        """Unmap the entries of a mapping that stays recorded, until it is removed.

        Raises:
            BackendError: The host refused; everything is as it was.
        """
        self._withdraw(self._entries.overlapping(mapping.iova, mapping.iova + mapping.size))

    def moved_to(self, space: HostSpace) -> HostMap:
        """Return the same mappings and memory in another space, which is empty.

        Raises:
            BackendError: The host refused RAM at once; only some of it is mapped there.
        """
        other = HostMap(space, self._pieces)
        other.refused_bars = self.refused_bars
        for mapping in self._mappings:
            other._mappings.add(mapping)
            other._enter(mapping, other._pieces)
        return other

    # -- entries --

    def _leading_to(self, start: int, end: int) -> Iterator[MappingInfo]:
        return (m for m in self._mappings if m.gpa < end and start < m.gpa + m.size)

    def _enter(
        self, mapping: MappingInfo, pieces: list[Piece], *, asked_for: bool = False
    ) -> list[MappingInfo]:
        """Map the parts of ``mapping`` that lead to ``pieces``, or none; return the entries.

        A BAR that the host refuses is tolerated, but not where a guest has just
        ``asked_for`` nothing else: bypass asks for all of memory.
        """
        done: list[MappingInfo] = []
        for entry, part in self._parts(mapping, pieces):
            try:
                self._space.map(entry.iova, part, entry.prot)
            except BackendError as error:
                if part.device and not (asked_for and part.size == mapping.size):
                    self.tolerate(error)
                    continue
                self._withdraw(done)
                raise
            self._entries.add(entry)
            done.append(entry)
        return done

    def tolerate(self, error: BackendError) -> None:
        """Do without a BAR."""
        self.refused_bars += 1
        # A guest may cause it as often as it likes: 1st, 2nd, 4th, 8th ...
        if not self.refused_bars & (self.refused_bars - 1):
            _log.warning("a BAR stays out of reach: %s", error)

    def _parts(
        self, mapping: MappingInfo, pieces: list[Piece]
    ) -> Iterator[tuple[MappingInfo, Piece]]:
        """Yield the entries that ``mapping`` needs, each with its part of a piece."""
        end = mapping.gpa + mapping.size
        first = bisect_right(pieces, mapping.gpa, key=lambda piece: piece.gpa) - 1
        mask = self._space.page_size - 1
        shift = mapping.iova - mapping.gpa
        for piece in pieces[max(first, 0) :]:
            if piece.gpa >= end or shift & mask:
                break
            prot = mapping.prot if piece.writable else mapping.prot & Access.READ
            # Only whole pages can be mapped; what is smaller are BARs, mostly.
            low = max(piece.gpa, mapping.gpa) + mask & ~mask
            high = min(piece.gpa + piece.size, end) & ~mask
            if low < high and prot:
                yield MappingInfo(low + shift, low, high - low, prot), piece.part(low, high - low)

    def _withdraw(self, entries: Iterable[MappingInfo]) -> None:
        """Unmap entries; when the host refuses one, those before it are mapped again."""
        done: list[MappingInfo] = []
        for entry in entries:
            try:
                self._space.unmap(entry.iova, entry.size)
            except BackendError:
                self._restore(done)
                raise
            self._entries.remove(entry.iova, entry.iova + entry.size)
            done.append(entry)

    def _restore(self, entries: list[MappingInfo]) -> None:
        for entry in entries:
            try:
                self._space.map(entry.iova, self._part_of(entry), entry.prot)
            except BackendError as error:
                raise InternalError(f"{entry} was unmapped and can't be put back") from error
            self._entries.add(entry)

    def _part_of(self, entry: MappingInfo) -> Piece:
        index = bisect_right(self._pieces, entry.gpa, key=lambda piece: piece.gpa) - 1
        return self._pieces[index].part(entry.gpa, entry.size)

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        for entry in self._entries:
            mapping = self._mappings.find(entry.iova)
            if mapping is None or entry.iova + entry.size > mapping.iova + mapping.size:
                raise InternalError(f"{entry} belongs to no mapping")
            if entry.gpa - entry.iova != mapping.gpa - mapping.iova or entry.prot & ~mapping.prot:
                raise InternalError(f"{entry} is not what {mapping} says")
            piece = self._part_of(entry)
            if Access.WRITE in entry.prot and not piece.writable:
                raise InternalError(f"{entry} lets a device write {piece}")
