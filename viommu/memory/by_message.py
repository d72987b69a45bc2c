"""Guest memory of which some is reached only by asking the VMM to read and write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from viommu.errors import GuestMemoryError, NotMappable
from viommu.memory.guest import GuestMemory

if TYPE_CHECKING:
    from viommu.memory.guest import MemoryRegion

__all__ = ["MemoryPort", "MessageMemory"]


class MemoryPort(Protocol):
    """Somebody who reads and writes memory for us.

    Both methods wait for it, and raise :exc:`~viommu.errors.GuestMemoryError` when it
    refuses, or is no more.
    """

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data``; on an error some of it may have been stored."""


class _Piece(NamedTuple):
    """A range inside one region; ``shared``: the region has a file."""

    gpa: int
    size: int
    shared: bool


class MessageMemory(GuestMemory):
    """Guest memory whose regions without a file are read and written through :attr:`port`.

    Only for a process whose whole work is the device of this one client: while it
    waits for the port, nothing else goes on. As long as there is no port this is
    memory like any other. What is not shared can be copied, but has no views.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Set by the server while a client is there that can be asked.
        self.port: MemoryPort | None = None

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of ``[gpa, gpa + size)``; see :meth:`GuestMemory.read`."""
        port = self.port
        if port is None or self._is_shared(gpa, size):
            return super().read(gpa, size)
        copies = []
        for at, length, shared in self._pieces(gpa, size, write=False):
            copies.append(super().read(at, length) if shared else port.read(at, length))
        return b"".join(copies)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``; see :meth:`GuestMemory.write`.

        When the port fails, what lies in front may have been stored.
        """
        source = memoryview(data).cast("B")
        port = self.port
        if port is None or self._is_shared(gpa, len(source)):
            super().write(gpa, source)
            return
        for at, length, shared in self._pieces(gpa, len(source), write=True):
            part, source = source[:length], source[length:]
            if shared:
                super().write(at, part)
            else:
                port.write(at, part)

    def views(self, gpa: int, size: int, *, write: bool) -> list[memoryview]:
        """Return the memory itself; see :meth:`GuestMemory.views`.

        Raises:
            GuestMemoryError: As there.
            NotMappable: The memory is there, but some of it is behind the port.
        """
        if self.port is not None and not self._is_shared(gpa, size):
            pieces = self._pieces(gpa, size, write=write)
            if not all(piece.shared for piece in pieces):
                raise NotMappable(gpa, size, "some of it is reached by messages only")
        return super().views(gpa, size, write=write)

    def _is_shared(self, gpa: int, size: int) -> bool:
        """Whether all of a range lies in one region that has a file."""
        region = self.region_at(gpa)
        return region is not None and region.shared and gpa + size <= region.gpa + region.size

    def _pieces(self, gpa: int, size: int, *, write: bool) -> list[_Piece]:
        """Cut a range at the ends of regions.

        Raises:
            GuestMemoryError: Some of it is no memory, or not readable, writable respectively.
        """
        if size < 0:
            raise GuestMemoryError(gpa, size, "the size is negative")
        pieces: list[_Piece] = []
        at, end = gpa, gpa + size
        while at < end:
            region = self._permitted(gpa, size, at, write=write)
            length = min(end, region.gpa + region.size) - at
            pieces.append(_Piece(at, length, region.shared))
            at += length
        return pieces

    def _permitted(self, gpa: int, size: int, at: int, *, write: bool) -> MemoryRegion:
        region = self.region_at(at)
        if region is None:
            raise GuestMemoryError(gpa, size, f"no memory at {at:#x}")
        if not (region.writable if write else region.readable):
            right = "writable" if write else "readable"
            raise GuestMemoryError(gpa, size, f"what is at {at:#x} is not {right}")
        return region
