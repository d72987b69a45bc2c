"""The kernel's side of the host backends, in memory, with the errnos that were observed.

What the real kernel does with the same calls is tested in ``guest_tests/l1``.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.errors import BackendError
from viommu.memory.dma_target import AddressRange, DmaNeeds, DmaRegistration, MemoryKind
from viommu_backends.iommufd_context import IoasRanges
from viommu_backends.type1_container import Type1Info

if TYPE_CHECKING:
    from viommu.errors import Access
    from viommu.memory.backing import FileBacking
    from viommu.memory.dma_target import DmaTarget

__all__ = ["FakeContainer", "FakeDevice", "FakeIommufd", "Memory", "Source"]

PAGE = 0x1000
APERTURE = 1 << 39
TYPE1_RANGES: tuple[tuple[int, int], ...] = ((0, 0xFEE00000), (0xFEF00000, APERTURE))


# A virtual address, or a file and where in it.
Source = int | tuple[int, int]


class _Space:
    """One address space: entries that never overlap, removed exactly as they were made."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[int, Source, Access]] = {}

    def map(self, iova: int, size: int, source: Source, prot: Access) -> None:
        if not prot or size <= 0 or (iova | size) % PAGE or iova + size > APERTURE:
            raise BackendError(errno.EINVAL, f"map {iova:#x} {size:#x} {prot}")
        if any(iova < at + n and at < iova + size for at, (n, _, _) in self.entries.items()):
            raise BackendError(errno.EEXIST, f"map {iova:#x}")
        self.entries[iova] = (size, source, prot)

    def unmap(self, iova: int, size: int) -> int:
        inside = [a for a, (n, _, _) in self.entries.items() if iova <= a and a + n <= iova + size]
        touched = [a for a, (n, _, _) in self.entries.items() if a < iova + size and iova < a + n]
        if inside != touched:
            raise BackendError(errno.EINVAL, f"unmap {iova:#x} splits")
        return sum(self.entries.pop(at)[0] for at in inside)


class FakeContainer(_Space):
    """:class:`~viommu_backends.type1_container.Type1Container` without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.info = Type1Info(0x40201000, TYPE1_RANGES, 65535)

    def map(self, iova: int, va: int, size: int, prot: Access) -> None:  # type: ignore[override]
        super().map(iova, size, va, prot)


class FakeIommufd:
    """:class:`~viommu_backends.iommufd_context.Iommufd` without a kernel."""

    def __init__(self, *, files: bool = True) -> None:
        self.spaces: dict[int, _Space] = {}
        self.attached: dict[int, set[FakeDevice]] = {}
        self.lazy: set[int] = set()  # where something was mapped while no device was attached
        self.copies = 0
        self._files = files
        self._next = 1

    def can_map_files(self) -> bool:
        return self._files

    def alloc_ioas(self) -> int:
        number, self._next = self._next, self._next + 1
        self.spaces[number] = _Space()
        self.attached[number] = set()
        return number

    def destroy(self, number: int) -> None:
        if self.attached[number]:
            raise BackendError(errno.EBUSY, f"destroy {number}")
        del self.spaces[number]
        del self.attached[number]

    def map(self, ioas: int, iova: int, va: int, size: int, prot: Access) -> None:
        self._map(ioas, iova, size, va, prot)

    def map_file(  # noqa: PLR0917 - the real one's
        self, ioas: int, iova: int, fd: int, start: int, size: int, prot: Access
    ) -> None:
        assert self._files
        self._map(ioas, iova, size, (fd, start), prot)

    def _map(self, ioas: int, iova: int, size: int, source: Source, prot: Access) -> None:
        """Map, like the kernel, whatever it is while no device is attached."""
        space = self.spaces[ioas]
        if self.attached[ioas]:
            space.map(iova, size, source, prot)
        else:
            self.lazy.add(ioas)
            space.entries[iova] = (size, source, prot)

    def copy(  # noqa: PLR0917 - the real one's
        self, destination: int, source: int, size: int, to_iova: int, from_iova: int, prot: Access
    ) -> None:
        """Map, in the copy, what a mapping of the same part would have."""
        for iova, (length, where, allowed) in self.spaces[source].entries.items():
            if iova <= from_iova and from_iova + size <= iova + length:
                if prot & ~allowed:
                    raise BackendError(errno.EPERM, f"copy {from_iova:#x} {prot}")
                skip = from_iova - iova
                part = where + skip if isinstance(where, int) else (where[0], where[1] + skip)
                self._map(destination, to_iova, size, part, prot)
                self.copies += 1
                return
        raise BackendError(errno.ENOENT, f"copy {from_iova:#x}")

    def unmap(self, ioas: int, iova: int, size: int) -> int:
        removed = self.spaces[ioas].unmap(iova, size)
        if not removed:
            raise BackendError(errno.ENOENT, f"unmap {iova:#x}")
        return removed

    def iova_ranges(self, ioas: int) -> IoasRanges:
        return IoasRanges(((0, APERTURE),), PAGE if self.attached[ioas] else 1)


class FakeDevice:
    """:class:`~viommu_backends.vfio_device.VfioDevice`'s place in an iommufd."""

    def __init__(self, iommufd: FakeIommufd) -> None:
        self._iommufd = iommufd
        self.ioas: int | None = None
        self.attaches = self.detaches = 0
        self.refuse = 0

    def attach(self, number: int) -> int:
        if self.refuse:
            raise BackendError(self.refuse, "attach")
        if number not in self._iommufd.spaces:
            raise BackendError(errno.ENOENT, "attach")
        entries = self._iommufd.spaces[number].entries
        if any(iova + size > APERTURE for iova, (size, _, _) in entries.items()):
            raise BackendError(errno.EADDRINUSE, "attach")
        self._leave()
        self.ioas = number
        self._iommufd.attached[number].add(self)
        self.attaches += 1
        return number

    def detach(self) -> None:
        self.detaches += 1
        self._leave()

    def _leave(self) -> None:
        if self.ioas is not None:
            self._iommufd.attached[self.ioas].discard(self)
        self.ioas = None


class Memory:
    """Guest memory as a region manager would tell it: pieces, and who is to be told."""

    def __init__(self) -> None:
        self.pieces: list[tuple[AddressRange, FileBacking | None]] = []
        self.targets: dict[str, tuple[DmaTarget, DmaNeeds]] = {}

    def register(self, target: DmaTarget, name: str, needs: DmaNeeds) -> DmaRegistration:
        self.targets[name] = (target, needs)
        for piece in self.pieces:
            self._tell(target, *piece)
        return DmaRegistration(name, lambda: self._release(name))

    def add(self, start: int, end: int, mappable: FileBacking | None = None) -> None:
        piece = (AddressRange(start, end), mappable)
        self.pieces.append(piece)
        for target, _ in self.targets.values():
            self._tell(target, *piece)

    def remove(self, start: int, end: int) -> None:
        self.pieces = [p for p in self.pieces if not p[0].meets(AddressRange(start, end))]
        for target, _ in self.targets.values():
            target.unmap_dma(AddressRange(start, end))

    def _tell(self, target: DmaTarget, where: AddressRange, mappable: FileBacking | None) -> None:
        target.map_dma(
            where,
            host_va=0x7000_0000_0000 + where.start,
            mappable=mappable,
            file_offset=where.start,
            writable=True,
            kind=MemoryKind.RAM,
        )

    def _release(self, name: str) -> None:
        entry = self.targets.pop(name, None)
        if entry:
            entry[0].unmap_dma(AddressRange(0, 1 << 64))
