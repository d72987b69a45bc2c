"""Guest memory that a built-in driver owns, and pages of it (GPAs; half-open ranges)."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

from viommu.errors import UsageError
from viommu.memory import GuestMemory, MappedFiles

if TYPE_CHECKING:
    from viommu.vfio_user.client import Client
    from viommu.virtio.ring_memory import RingMemory

__all__ = ["PAGE", "DirectDma", "DmaBuffer", "DmaSpace", "GuestRam", "PageAllocator"]

PAGE: Final = 4096


class PageAllocator:
    """Hands out runs of pages of ``[start, end)``, first fit; neighbours are merged when freed."""

    def __init__(self, start: int, end: int) -> None:
        if start % PAGE or end % PAGE or start >= end:
            raise UsageError(f"[{start:#x}, {end:#x}) are no pages")
        self._free = [(start, end)]
        self._taken: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, rounded up to pages.

        Raises:
            UsageError: No such run is free, or ``size`` is not positive.
        """
        length = -(-size // PAGE) * PAGE
        for index, (start, end) in enumerate(self._free):
            if 0 < length <= end - start:
                self._free[index : index + 1] = (
                    [(start + length, end)] if start + length < end else []
                )
                self._taken[start] = start + length
                return start
        raise UsageError(f"no {size} bytes are free in a row")

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` returned.

        Raises:
            UsageError: It is not taken.
        """
        end = self._taken.pop(address, None)
        if end is None:
            raise UsageError(f"{address:#x} was not allocated")
        merged: list[tuple[int, int]] = []
        for piece in sorted([*self._free, (address, end)]):
            if merged and merged[-1][1] == piece[0]:
                merged[-1] = (merged[-1][0], piece[1])
            else:
                merged.append(piece)
        self._free = merged


class GuestRam:
    """A memfd of ``size`` bytes at GPA ``base``, as a guest's CPU sees it.

    :attr:`memory` reads and writes it; :meth:`give` shares it with a device.
    """

    def __init__(self, size: int, base: int = 0) -> None:
        self.base = base
        self.size = size
        self.pages = PageAllocator(base, base + size)
        self.memory = GuestMemory()
        self._fd = os.memfd_create("viommu-guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            file = MappedFiles().get(self._fd, 0, size, writable=True)
            try:
                self.memory.map(base, size, readable=True, writable=True, file=file)
            except BaseException:
                file.close()
                raise
        except BaseException:
            self.close()
            raise

    def give(self, client: Client) -> None:
        """Map all of it into the device behind ``client``, as a VMM does."""
        client.dma_map(self.base, self.size, fd=self._fd)

    def take_back(self, client: Client) -> None:
        """Undo :meth:`give`."""
        client.dma_unmap(self.base, self.size)

    def close(self) -> None:
        """Let go of the memory; devices that have it keep it."""
        self.memory.close()
        with contextlib.suppress(OSError):  # closed before
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class DmaBuffer(NamedTuple):
    """Pages that a device may use: at ``gpa`` for us, at ``address`` for the device."""

    gpa: int
    address: int
    size: int


class DmaSpace(Protocol):
    """Where a driver's rings and buffers come from."""

    @property
    def memory(self) -> RingMemory:
        """The buffers' contents, by the addresses that the device uses."""

    def allocate(self, size: int) -> DmaBuffer:
        """Return a buffer that the device may read and write, full of what was there."""

    def free(self, buffer: DmaBuffer) -> None:
        """Give a buffer back; the device can't reach it any more."""


class DirectDma:
    """For a device that is not behind an IOMMU: its addresses are GPAs."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram

    @property
    def memory(self) -> RingMemory:
        """Guest memory itself."""
        return self._ram.memory

    def allocate(self, size: int) -> DmaBuffer:
        """Return a buffer."""
        gpa = self._ram.pages.allocate(size)
        return DmaBuffer(gpa, gpa, size)

    def free(self, buffer: DmaBuffer) -> None:
        """Give a buffer back."""
        self._ram.pages.free(buffer.gpa)
