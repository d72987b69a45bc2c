"""The memory that a virtqueue lives in, and 16- and 32-bit words in it.

The areas of a ring are contiguous in the address space of the device, not in
ours: one area may come as several views, or have none and be copied word by word.
"""

from __future__ import annotations

import bisect
import sys
from typing import TYPE_CHECKING, Literal, Protocol

from viommu.errors import GuestMemoryError, NotMappable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RingMemory", "Words", "one_view", "words"]


class RingMemory(Protocol):
    """What a queue reads and writes through: guest memory, or a DMA port behind an IOMMU.

    Addresses are what the driver wrote into the ring: GPAs for one, IOVAs for the
    other. Every method raises :exc:`~viommu.errors.GuestMemoryError` or
    :exc:`~viommu.errors.TranslationFault` for a range that can't be reached.
    """

    @property
    def generation(self) -> int:
        """A number that changes whenever views handed out before have become stale."""

    def views(self, address: int, size: int, *, write: bool) -> list[memoryview]:
        """Return ``size`` bytes at ``address`` as pieces of shared memory (format ``B``).

        Raises:
            NotMappable: It is there, but can only be read and written.
        """

    def read(self, address: int, size: int) -> bytes:
        """Return a copy of ``size`` bytes at ``address``."""

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Write ``data`` at ``address``, all or nothing."""


class Words(Protocol):
    """An array of machine words in shared memory; one access is one load or store.

    A ``memoryview`` cast to ``H`` or ``I`` is one.
    """

    def __getitem__(self, index: int, /) -> int:
        """Load a word."""

    def __setitem__(self, index: int, value: int, /) -> None:
        """Store a word."""


class _ScatteredWords:
    """Words over several views; costs a bisection an access."""

    __slots__ = ("_starts", "_views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._starts = [0]
        for view in views[:-1]:
            self._starts.append(self._starts[-1] + len(view))

    def __getitem__(self, index: int) -> int:
        piece = bisect.bisect_right(self._starts, index) - 1
        value: int = self._views[piece][index - self._starts[piece]]
        return value

    def __setitem__(self, index: int, value: int) -> None:
        piece = bisect.bisect_right(self._starts, index) - 1
        self._views[piece][index - self._starts[piece]] = value


class _CopiedWords:
    """Words of memory that has no views: each access is one read or write of it.

    That is done on return, so what is stored first is there first.
    """

    __slots__ = ("_address", "_memory", "_width")

    def __init__(self, memory: RingMemory, address: int, width: int) -> None:
        self._memory = memory
        self._address = address
        self._width = width

    def __getitem__(self, index: int) -> int:
        data = self._memory.read(self._address + index * self._width, self._width)
        return int.from_bytes(data, sys.byteorder)

    def __setitem__(self, index: int, value: int) -> None:
        data = value.to_bytes(self._width, sys.byteorder)
        self._memory.write(self._address + index * self._width, data)


def one_view(memory: RingMemory, address: int, size: int) -> memoryview | None:
    """Return a view of ``size`` bytes at ``address``, ``None`` if there is not just one.

    Raises:
        GuestMemoryError: Not (all) memory.
        TranslationFault: Not mapped for the device.
    """
    try:
        views = memory.views(address, size, write=False)
    except NotMappable:
        return None
    return views[0] if len(views) == 1 else None


def words(
    memory: RingMemory, address: int, size: int, kind: Literal["H", "I"], *, write: bool
) -> Words:
    """Return ``size`` bytes at ``address`` as words of ``kind``: ``H`` or ``I``.

    A word that lies in two pieces of memory can't be stored at once, so such an
    area is refused. Memory comes in pages: only a broken VMM gets here.

    Raises:
        GuestMemoryError: Not (all) memory, or split inside a word.
        TranslationFault: Not mapped for the device.
    """
    width = 2 if kind == "H" else 4
    try:
        views = memory.views(address, size, write=write)
    except NotMappable:
        return _CopiedWords(memory, address, width)
    if any(len(view) % width for view in views):
        raise GuestMemoryError(address, size, f"is split inside a {width}-byte word")
    pieces = [view.cast(kind) for view in views]
    return pieces[0] if len(pieces) == 1 else _ScatteredWords(pieces)
