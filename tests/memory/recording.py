"""A DMA target that records what it is told, checks it, and fails on request."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from viommu.deferred import Deferred
from viommu.errors import BackendError
from viommu.memory.dma_target import AddressRange, DmaNeeds, require_file, require_host_va

if TYPE_CHECKING:
    from viommu.memory.backing import FileBacking
    from viommu.memory.dma_target import MemoryKind

PAGE = 4096


def pages(first: int, count: int = 1) -> AddressRange:
    return AddressRange(first * PAGE, (first + count) * PAGE)


def peek(address: int, size: int = 1) -> bytes | None:
    """Read memory at any address; ``None`` where a plain access would be a signal."""
    reader, writer = os.pipe()
    try:
        os.write(writer, (ctypes.c_char * size).from_address(address))
        return os.read(reader, size)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return None
    finally:
        os.close(reader)
        os.close(writer)


class Entry(NamedTuple):
    """A mapping that the target holds; ``first`` is the first byte of each of its pages."""

    where: AddressRange
    host_va: int | None
    file: FileBacking | None
    file_offset: int
    writable: bool
    kind: MemoryKind
    first: tuple[bytes | None, ...]


class Call(NamedTuple):
    """What the target was asked: pages ``[first, end)``; ``ok`` unless it failed."""

    name: str
    what: str
    first: int
    end: int
    ok: bool = True


class RecordingTarget:
    """Maps like a strict IOMMU. ``calls`` may be shared, to see the order among targets.

    ``reject`` are pages that it can't map, ``refuse`` pages that it can't unmap.
    An unmap of several mappings stops where it fails, as that of iommufd does.
    What breaks the contract is kept in ``violations``.
    """

    def __init__(
        self, name: str, needs: DmaNeeds = DmaNeeds.NONE, calls: list[Call] | None = None
    ) -> None:
        self.name = name
        self.needs = needs
        self.calls: list[Call] = [] if calls is None else calls
        self.entries: dict[int, Entry] = {}
        self.reject: set[int] = set()
        self.refuse: set[int] = set()
        self.violations: list[str] = []

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
        span = range(where.start // PAGE, where.end // PAGE)
        if any(entry.where.meets(where) for entry in self.entries.values()):
            self.violations.append(f"map over a mapping: {where}")
        if DmaNeeds.HOST_VA in self.needs:
            host_va = require_host_va(where, host_va)
        if DmaNeeds.FILE in self.needs:
            require_file(where, mappable)
        ok = self.reject.isdisjoint(span)
        self.calls.append(Call(self.name, "map", span.start, span.stop, ok))
        if not ok:
            raise BackendError(errno.ENOMEM, f"{self.name} rejects {where}")
        first = self._first(where, host_va)
        if None in first:
            self.violations.append(f"nothing is mapped at {host_va} for {where}")
        self.entries[where.start] = Entry(
            where, host_va, mappable, file_offset, writable, kind, first
        )

    def unmap_dma(self, where: AddressRange, /) -> None:
        inside = [e for _, e in sorted(self.entries.items()) if e.where.meets(where)]
        bad = [e for e in inside if not self.refuse.isdisjoint(self._span(e.where))]
        span = self._span(where)
        self.calls.append(Call(self.name, "unmap", span.start, span.stop, not bad))
        for entry in inside:
            if not where.holds(entry.where):
                self.violations.append(f"unmap of {where} splits {entry.where}")
            if self._first(entry.where, entry.host_va) != entry.first:
                self.violations.append(f"{entry.where} lost its address before its mapping")
            if entry in bad:
                raise BackendError(errno.EBUSY, f"{self.name} refuses {entry.where}")
            del self.entries[entry.where.start]

    def mapped(self) -> list[tuple[int, int, bool]]:
        """Return (first page, page behind the last, writable) of every mapping, in order."""
        entries = [entry for _, entry in sorted(self.entries.items())]
        return [(e.where.start // PAGE, e.where.end // PAGE, e.writable) for e in entries]

    def take_calls(self) -> list[tuple[str, int, int]]:
        """Return what was asked since the last time, failures marked with a "!"."""
        taken = [(c.what + ("" if c.ok else "!"), c.first, c.end) for c in self.calls]
        self.calls.clear()
        return taken

    def _span(self, where: AddressRange) -> range:
        return range(where.start // PAGE, where.end // PAGE)

    def _first(self, where: AddressRange, host_va: int | None) -> tuple[bytes | None, ...]:
        if host_va is None:
            return ()
        return tuple(peek(host_va + at) for at in range(0, where.size, PAGE))


class LaterTarget(RecordingTarget):
    """One whose host has let go when the test says so: when ``held`` is done."""

    held: Deferred[None] | None = None

    def unmap_dma(self, where: AddressRange, /) -> None:
        super().unmap_dma(where)
        self.held = self.held or Deferred()

    def settled(self) -> Deferred[None] | None:
        return None if self.held is None or self.held.done else self.held
