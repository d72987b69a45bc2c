"""The kernel's iommufd: I/O address spaces (IOAS), what is mapped in them, and their page tables.

What it does was observed: see each method. Ranges are half-open; ``last`` on the
kernel's side is inclusive. Features are found by errno, never by version.

Source: ``<linux/iommufd.h>``, ``drivers/iommu/iommufd/``.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Final, NamedTuple

from viommu.errors import Access, BackendError
from viommu.spec import iommufd as spec
from viommu.spec.iommufd import Ioctl
from viommu_backends.kernel import ask, open_device_file
from viommu_backends.memlock import PINNED, over_the_limit

__all__ = ["IoasRanges", "Iommufd", "address_of"]

_IOMMU: Final = Path("/dev/iommu")


class IoasRanges(NamedTuple):
    """What can be mapped in an IOAS now: ``ranges``, in multiples of ``alignment`` bytes."""

    ranges: tuple[tuple[int, int], ...]
    alignment: int


class Iommufd:
    """An open ``/dev/iommu``; ids of its objects are numbers of this context.

    Raises:
        BackendError: The kernel has no iommufd, or it isn't ours to open.
    """

    def __init__(self) -> None:
        self._fd = open_device_file(_IOMMU)
        self._map_file: bool | None = None

    def fileno(self) -> int:
        """Return the fd, -1 once closed."""
        return self._fd

    def alloc_ioas(self) -> int:
        """Return the id of a new, empty IOAS."""
        argument = bytearray(spec.IOAS_ALLOC.pack(spec.IOAS_ALLOC.size, 0, 0))
        ask(self._fd, Ioctl.IOAS_ALLOC, argument, "allocating an IOAS")
        ioas: int = spec.IOAS_ALLOC.unpack(argument)[2]
        return ioas

    def destroy(self, object_id: int) -> None:
        """Destroy an object.

        Raises:
            BackendError: EBUSY, something still uses it; ENOENT, there is none.
        """
        argument = bytearray(spec.DESTROY.pack(spec.DESTROY.size, object_id))
        ask(self._fd, Ioctl.DESTROY, argument, f"destroying object {object_id}")

    def map(self, ioas: int, iova: int, va: int, size: int, prot: Access) -> None:
        """Map our memory at ``va``.

        In an IOAS that no device is attached to the kernel accepts anything, and
        the next ATTACH fails: attach before mapping.

        Raises:
            BackendError: EEXIST, EINVAL, ENOMEM (with the numbers), EFAULT as for
                type1. Nothing is mapped.
        """
        argument = bytearray(
            spec.IOAS_MAP.pack(spec.IOAS_MAP.size, _flags(prot), ioas, 0, va, size, iova)
        )
        what = f"iommufd map of [{iova:#x}, {iova + size:#x}) in IOAS {ioas}"
        self._ask_to_map(Ioctl.IOAS_MAP, argument, what, size)

    def map_file(self, ioas: int, iova: int, fd: int, start: int, size: int, prot: Access) -> None:  # noqa: PLR0917 - the order of the structure
        """Map ``size`` bytes of a memfd, or of a dma-buf, from ``start`` on.

        The mapping outlives this process's own; the kernel looks neither at the
        fd's mode nor at seals.

        Raises:
            BackendError: ENOTTY, a kernel before 6.13; EINVAL, no memfd, or past its
                end; ENODEV, a dma-buf that was revoked; else as :meth:`map`.
        """
        argument = bytearray(
            spec.IOAS_MAP_FILE.pack(
                spec.IOAS_MAP_FILE.size, _flags(prot), ioas, fd, start, size, iova
            )
        )
        what = f"iommufd map of a file at [{iova:#x}, {iova + size:#x}) in IOAS {ioas}"
        self._ask_to_map(Ioctl.IOAS_MAP_FILE, argument, what, size)

    def unmap(self, ioas: int, iova: int, size: int) -> int:
        """Remove the mappings inside a range; return how many bytes they had.

        The kernel answers ENOENT both for nothing mapped and for a mapping that
        would be split, and then some may be gone: pass only what is exactly mapped.

        Raises:
            BackendError: ENOENT; EBUSY, a hardware queue lives there.
        """
        argument = bytearray(spec.IOAS_UNMAP.pack(spec.IOAS_UNMAP.size, ioas, iova, size))
        what = f"iommufd unmap of [{iova:#x}, {iova + size:#x}) in IOAS {ioas}"
        ask(self._fd, Ioctl.IOAS_UNMAP, argument, what)
        removed: int = spec.IOAS_UNMAP.unpack(argument)[3]
        return removed

    def unmap_all(self, ioas: int) -> int:
        """Remove every mapping; return how many bytes they had."""
        return self.unmap(ioas, 0, spec.UNMAP_ALL_LENGTH)

    def copy(  # noqa: PLR0917 - the order of the structure
        self, destination: int, source: int, size: int, to_iova: int, from_iova: int, prot: Access
    ) -> None:
        """Map in one IOAS what is mapped in another; pages are pinned and charged once.

        Raises:
            BackendError: ENOENT, a hole in the source; EPERM, writable from read-only;
                else as :meth:`map`.
        """
        argument = bytearray(
            spec.IOAS_COPY.pack(
                spec.IOAS_COPY.size,
                _flags(prot),
                destination,
                source,
                size,
                to_iova,
                from_iova,
            )
        )
        what = f"iommufd copy to [{to_iova:#x}, {to_iova + size:#x}) in IOAS {destination}"
        self._ask_to_map(Ioctl.IOAS_COPY, argument, what, size)

    def iova_ranges(self, ioas: int) -> IoasRanges:
        """Return what can be mapped; it changes with every device that comes or goes."""
        slots = 16
        while True:
            ranges = array.array("Q", bytes(slots * spec.IOVA_RANGE.size))
            address, _ = ranges.buffer_info()
            argument = bytearray(
                spec.IOAS_IOVA_RANGES.pack(spec.IOAS_IOVA_RANGES.size, ioas, slots, 0, address, 0)
            )
            try:
                ask(self._fd, Ioctl.IOAS_IOVA_RANGES, argument, f"ranges of IOAS {ioas}")
            except BackendError as error:
                needed = spec.IOAS_IOVA_RANGES.unpack(argument)[2]
                if error.errno != errno.EMSGSIZE or needed <= slots:
                    raise
                slots = needed
                continue
            _, _, count, _, _, alignment = spec.IOAS_IOVA_RANGES.unpack(argument)
            pairs = zip(ranges[0 : 2 * count : 2], ranges[1 : 2 * count : 2], strict=True)
            return IoasRanges(tuple((start, last + 1) for start, last in pairs), alignment)

    def alloc_page_table(
        self,
        device: int,
        parent: int,
        *,
        nest_parent: bool = False,
        kind: int = 0,
        data: bytes = b"",
    ) -> int:
        """Return the id of a new page table for ``device``, filled but not attached.

        With an IOAS as ``parent`` it holds what is mapped there; as a ``nest_parent``
        others can be nested in it. With such a one as ``parent``, or a vIOMMU, it
        is a guest's own: ``kind`` and ``data`` say where the guest has it.

        Raises:
            BackendError: ENOENT, there is no such device or parent; EOPNOTSUPP, the
                IOMMU can't nest, or doesn't know ``kind``; EINVAL, the parent is no nest
                parent, or the driver doesn't take ``data``.
        """
        buffer = bytearray(data)
        flags = spec.HWPT_FLAG_NEST_PARENT if nest_parent else 0
        argument = bytearray(
            spec.HWPT_ALLOC.pack(
                spec.HWPT_ALLOC.size, flags, device, parent, 0, 0, kind,
                len(buffer), address_of(buffer), 0, 0,
            )
        )  # fmt: skip
        what = f"allocating a page table for device {device} below object {parent}"
        ask(self._fd, Ioctl.HWPT_ALLOC, argument, what)
        table: int = spec.HWPT_ALLOC.unpack(argument)[4]
        return table

    def map_device_memory(self, offset: int, length: int) -> mmap.mmap:
        """Map memory that the driver of an object offers; it is unmapped by closing the result.

        Offset and length are the driver's, told when the object was made. While any
        of it is mapped, by us or by a child that has inherited it, the object can't be
        destroyed, nor what it stands on; the context can be closed, and ends
        with the last mapping.

        Raises:
            BackendError: ENXIO, nothing is offered at exactly that offset and of that
                length, or not any more; EINVAL, not whole pages; EBADF, the context
                is closed.
        """
        what = f"mapping {length:#x} bytes at offset {offset:#x} of an iommufd"
        if self._fd < 0:
            raise BackendError(errno.EBADF, what)  # to Python it would mean memory without a file
        try:
            return mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED, offset=offset)
        except (OSError, ValueError, OverflowError) as error:
            # Python itself refuses what is negative or too large.
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
            raise BackendError(number, what) from error

    def can_map_files(self) -> bool:
        """Return whether the kernel knows IOAS_MAP_FILE (Linux 6.13)."""
        if self._map_file is None:
            try:
                self.map_file(0, 0, -1, 0, 0, Access.READ)
            except BackendError as error:
                # Any other complaint is one about the arguments.
                self._map_file = error.errno != errno.ENOTTY
            else:
                self._map_file = True
        return self._map_file

    def close(self) -> None:
        """Close the context; closing twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _ask_to_map(self, request: int, argument: bytearray, what: str, size: int) -> None:
        try:
            ask(self._fd, request, argument, what)
        except BackendError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise BackendError(error.errno, f"{what}: {over_the_limit(size, PINNED)}") from error


def address_of(buffer: bytearray) -> int:
    """Return where a structure is that the kernel reads and writes; 0 for none.

    The buffer must not be resized or freed before the kernel has answered.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0


def _flags(prot: Access) -> int:
    flags = spec.IOAS_MAP_FIXED_IOVA
    if Access.READ in prot:
        flags |= spec.IOAS_MAP_READABLE
    if Access.WRITE in prot:
        flags |= spec.IOAS_MAP_WRITEABLE
    return flags
