"""The kernel's type1 container: one group, one host address space.

What it does was observed: see each method. Ranges are half-open; the kernel's own
end inclusive.

Source: ``<linux/vfio.h>``, ``drivers/vfio/vfio_iommu_type1.c``.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import Access, BackendError, InternalError
from viommu.spec import vfio_host as spec
from viommu.spec.vfio_host import Extension, Ioctl
from viommu_backends.kernel import ask, open_device_file
from viommu_backends.memlock import LOCKED, over_the_limit

if TYPE_CHECKING:
    from viommu_backends.host_device import HostDevice

__all__ = ["Type1Container", "Type1Info"]

_CONTAINER: Final = Path("/dev/vfio/vfio")


class Type1Info(NamedTuple):
    """What a container says of itself; it changes with the groups in it.

    ``iova_ranges`` are what can be mapped, ``available`` how many mappings more,
    ``None`` if the kernel does not say.
    """

    page_sizes: int
    iova_ranges: tuple[tuple[int, int], ...]
    available: int | None


class Type1Container:
    """A container with the group of ``device`` in it, and nothing mapped.

    The kernel allows one opener for each group, so all endpoints of one share a
    container.

    Raises:
        BackendError: The host can't: no VFIO, a group that isn't viable or is in use,
            or an IOMMU that does not isolate interrupts (EPERM).
    """

    def __init__(self, device: HostDevice) -> None:
        device.require_vfio()
        self.group = device.group
        self._container = open_device_file(_CONTAINER)
        self._group = -1
        self._in_container = False
        try:
            self._check_version()
            self._group = open_device_file(_CONTAINER.with_name(str(self.group)))
            self._join()
            self.info = self._read_info()
        except BaseException:
            self.close()
            raise

    def device_fd(self, device: HostDevice) -> int:
        """Return a new fd of a device of this group, which is the caller's."""
        name = bytearray(device.address.encode() + b"\0")
        what = f"device {device.address} of group {self.group}"
        return ask(self._group, Ioctl.GROUP_GET_DEVICE_FD, name, what)

    def map(self, iova: int, va: int, size: int, prot: Access) -> None:
        """Map ``size`` bytes of our memory at ``va``; the kernel pins them.

        Raises:
            BackendError: EEXIST, something is mapped there; EINVAL, not aligned or
                outside of what the IOMMU can map; ENOSPC, too many mappings; ENOMEM,
                too much locked memory; EFAULT, no memory at ``va``. Nothing is mapped.
        """
        flags = spec.DMA_MAP_FLAG_READ if Access.READ in prot else 0
        if Access.WRITE in prot:
            flags |= spec.DMA_MAP_FLAG_WRITE
        argument = bytearray(spec.DMA_MAP.pack(spec.DMA_MAP.size, flags, va, iova, size))
        what = f"type1 map of [{iova:#x}, {iova + size:#x})"
        try:
            ask(self._container, Ioctl.IOMMU_MAP_DMA, argument, what)
        except BackendError as error:
            raise BackendError(error.errno, f"{what}{self._why(error.errno, size)}") from error

    def unmap(self, iova: int, size: int) -> int:
        """Remove the mappings inside a range; return how many bytes were mapped there.

        Gaps, or nothing at all, are no error: the kernel tells a smaller size.

        Raises:
            BackendError: EINVAL, a mapping would be split. Nothing is removed.
        """
        argument = bytearray(spec.DMA_UNMAP.pack(spec.DMA_UNMAP.size, 0, iova, size))
        what = f"type1 unmap of [{iova:#x}, {iova + size:#x})"
        ask(self._container, Ioctl.IOMMU_UNMAP_DMA, argument, what)
        removed: int = spec.DMA_UNMAP.unpack(argument)[3]
        return removed

    def unmap_all(self) -> int:
        """Remove every mapping; return how many bytes were mapped."""
        argument = bytearray(
            spec.DMA_UNMAP.pack(spec.DMA_UNMAP.size, spec.DMA_UNMAP_FLAG_ALL, 0, 0)
        )
        ask(self._container, Ioctl.IOMMU_UNMAP_DMA, argument, "type1 unmap of everything")
        removed: int = spec.DMA_UNMAP.unpack(argument)[3]
        return removed

    def refresh(self) -> Type1Info:
        """Ask the kernel again what can be mapped, and how much more."""
        self.info = self._read_info()
        return self.info

    def close(self) -> None:
        """Leave the container and close it; every device fd must be closed before."""
        group, self._group = self._group, -1
        container, self._container = self._container, -1
        if group >= 0:
            try:
                if self._in_container:
                    ask(group, Ioctl.GROUP_UNSET_CONTAINER, 0, f"group {self.group} leaving")
            except BackendError as error:
                # The last device of a group takes it along when it is unplugged.
                if error.errno != errno.EINVAL:
                    raise
            finally:
                self._in_container = False
                os.close(group)
                os.close(container)
        elif container >= 0:
            os.close(container)

    def _check_version(self) -> None:
        version = ask(self._container, Ioctl.GET_API_VERSION, 0, "VFIO's version")
        if version != spec.API_VERSION:
            raise BackendError(errno.ENOTSUP, f"VFIO API version {version}")
        for extension in (Extension.TYPE1V2, Extension.UNMAP_ALL):
            if not ask(self._container, Ioctl.CHECK_EXTENSION, extension, "VFIO's extensions"):
                raise BackendError(errno.ENOTSUP, f"VFIO extension {extension.name}")

    def _join(self) -> None:
        status = bytearray(spec.GROUP_STATUS.pack(spec.GROUP_STATUS.size, 0))
        ask(self._group, Ioctl.GROUP_GET_STATUS, status, f"status of group {self.group}")
        if not spec.GROUP_STATUS.unpack(status)[1] & spec.GROUP_FLAGS_VIABLE:
            raise BackendError(
                errno.EBUSY,
                f"group {self.group} is not viable: bind every device of "
                f"/sys/kernel/iommu_groups/{self.group}/devices to vfio-pci",
            )
        container = bytearray(self._container.to_bytes(4, "little", signed=True))
        ask(self._group, Ioctl.GROUP_SET_CONTAINER, container, f"container of group {self.group}")
        self._in_container = True
        try:
            ask(self._container, Ioctl.SET_IOMMU, Extension.TYPE1V2, "setting TYPE1v2")
        except BackendError as error:
            if error.errno == errno.EPERM:
                raise BackendError(
                    errno.EPERM,
                    "this host's IOMMU does not isolate interrupts "
                    "(vfio_iommu_type1.allow_unsafe_interrupts=1 accepts that)",
                ) from error
            raise

    def _read_info(self) -> Type1Info:
        """Read the info twice: once for the size that its capabilities need."""
        size = spec.TYPE1_INFO.size
        for _ in range(4):  # a group that comes meanwhile may make it longer again
            buffer = bytearray(size)
            spec.TYPE1_INFO.pack_into(buffer, 0, size, 0, 0, 0, 0)
            ask(self._container, Ioctl.IOMMU_GET_INFO, buffer, "type1 info")
            needed, flags, page_sizes, offset, _ = spec.TYPE1_INFO.unpack_from(buffer)
            if needed <= size:
                break
            size = needed
        else:
            raise InternalError(f"type1 info of {size} bytes wants {needed}")
        if not flags & spec.TYPE1_INFO_PGSIZES:
            raise BackendError(errno.ENOTSUP, "type1 info without page sizes")
        ranges: tuple[tuple[int, int], ...] = ()
        available = None
        while flags & spec.TYPE1_INFO_CAPS and offset:
            kind, version, following, count, _ = spec.IOVA_RANGES.unpack_from(
                buffer.ljust(offset + spec.IOVA_RANGES.size), offset
            )
            if kind == spec.CAP_IOVA_RANGE and version == 1:
                at = offset + spec.IOVA_RANGES.size
                found = spec.IOVA_RANGE.iter_unpack(buffer[at : at + spec.IOVA_RANGE.size * count])
                ranges = tuple((start, last + 1) for start, last in found)
            elif kind == spec.CAP_DMA_AVAIL and version == 1:
                available = count
            offset = following
        return Type1Info(page_sizes, ranges, available)

    def _why(self, number: int, size: int) -> str:
        """Say more about errors that have a remedy, with both numbers."""
        if number == errno.ENOMEM:
            return f": {over_the_limit(size, LOCKED)}"
        if number == errno.ENOSPC:
            return (
                f": {self.refresh().available} mappings are left of dma_entry_limit "
                "(a parameter of the module vfio_iommu_type1, when a container is opened)"
            )
        return ""
