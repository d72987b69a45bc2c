"""One VFIO device: regions, interrupts, reset, and its place in an iommufd.

Source: ``<linux/vfio.h>``, ``drivers/vfio/``.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import BackendError, InternalError
from viommu.spec import vfio
from viommu.spec import vfio_host as spec
from viommu.spec.vfio_host import Ioctl
from viommu_backends.kernel import ask, open_device_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu_backends.host_device import HostDevice
    from viommu_backends.iommufd_context import Iommufd

__all__ = ["HostIrq", "HostRegion", "VfioDevice", "open_cdev"]


class HostRegion(NamedTuple):
    """A region of the device: ``flags`` are ``VFIO_REGION_INFO_FLAG_*``.

    It begins at ``offset`` of the device's fd. ``areas`` are the (offset in the
    region, size) that can be mapped, where not all of it can.
    """

    size: int
    flags: int
    offset: int
    areas: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class HostIrq:
    """Interrupts of one kind: how many, and ``VFIO_IRQ_INFO_*`` flags."""

    count: int
    flags: int


class VfioDevice:
    """A device fd, owned and closed here; every mmap of it must be gone by then.

    Made from :meth:`~viommu_backends.type1_container.Type1Container.device_fd` or
    by :func:`open_cdev`. ``number`` is its id in the iommufd that it is bound to.

    Raises:
        BackendError: The kernel does not know the fd as a device.
    """

    def __init__(self, fd: int, name: str, number: int | None = None) -> None:
        self.fd = fd
        self.number = number
        self.name = name
        buffer = bytearray(spec.DEVICE_INFO.pack(spec.DEVICE_INFO.size, 0, 0, 0, 0, 0))
        try:
            ask(fd, Ioctl.DEVICE_GET_INFO, buffer, f"info of {name}")
        except BackendError:
            self.close()
            raise
        _, self.flags, self.num_regions, self.num_irqs, _, _ = spec.DEVICE_INFO.unpack(buffer)
        self.regions = [self._region(index) for index in range(self.num_regions)]
        self.irqs = [self._irq(index) for index in range(self.num_irqs)]

    @property
    def can_reset(self) -> bool:
        """Whether :meth:`reset` works."""
        return bool(self.flags & vfio.DEVICE_FLAGS_RESET)

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read a region; a device that answers less is padded with ones, as a bus does."""
        try:
            data = os.pread(self.fd, size, self.regions[region].offset + offset)
        except OSError as error:
            raise BackendError(
                error.errno or 0, f"{self.name}: read of region {region} at {offset:#x}"
            ) from error
        return data.ljust(size, b"\xff")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a region."""
        try:
            os.pwrite(self.fd, data, self.regions[region].offset + offset)
        except OSError as error:
            raise BackendError(
                error.errno or 0, f"{self.name}: write of region {region} at {offset:#x}"
            ) from error

    def set_irqs(
        self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()
    ) -> None:
        """Tell the kernel whom to signal; ``flags`` are ``VFIO_IRQ_SET_*``, -1 is nobody.

        Raises:
            BackendError: The device has no such interrupt, or an fd is no eventfd;
                ENOSPC, the host has fewer vectors to give.
        """
        size = vfio.IRQ_SET.size + 4 * len(fds)
        head = vfio.IRQ_SET.pack(size, flags, index, start, count)
        data = b"".join(fd.to_bytes(4, "little", signed=True) for fd in fds)
        what = f"{self.name}: interrupts {start} to {start + count} of kind {index}"
        # Not an error to the kernel: it tells how many there would have been.
        if (available := ask(self.fd, Ioctl.DEVICE_SET_IRQS, bytearray(head + data), what)) > 0:
            raise BackendError(errno.ENOSPC, f"{what}, the host has {available}")

    def reset(self) -> None:
        """Reset the function; its mappings in the IOMMU stay.

        Raises:
            BackendError: EINVAL, it can't be reset; EAGAIN or EBUSY, not now.
        """
        ask(self.fd, Ioctl.DEVICE_RESET, 0, f"{self.name}: reset")

    def export_dma_buf(self, region: int, offset: int, size: int) -> int:
        """Return a dma-buf fd for part of a BAR, which is the caller's.

        Raises:
            BackendError: ENOTTY, a kernel before 6.19; ENODEV, no such BAR; EINVAL,
                not pages. While the device's memory is switched off it can be had,
                but not mapped.
        """
        argument = bytearray(
            spec.DMA_BUF.pack(
                spec.DMA_BUF.size,
                spec.DEVICE_FEATURE_GET | spec.DEVICE_FEATURE_DMA_BUF,
                region,
                os.O_RDWR | os.O_CLOEXEC,
                0,
                1,
                offset,
                size,
            )
        )
        what = f"{self.name}: dma-buf of BAR {region} at {offset:#x}"
        return ask(self.fd, Ioctl.DEVICE_FEATURE, argument, what)

    def attach(self, page_table: int) -> int:
        """Attach to an IOAS or hardware page table, replacing what it was attached to.

        Returns the page table that is used.

        Raises:
            BackendError: ENOENT or EINVAL, no such object, or the group is attached
                to another; EFAULT, EADDRINUSE, ENOMEM, what is mapped there can't be
                for this device. The old attachment stays.
        """
        argument = bytearray(
            spec.ATTACH_IOMMUFD_PT.pack(spec.ATTACH_IOMMUFD_PT.size, 0, page_table)
        )
        what = f"{self.name}: attach to {page_table}"
        ask(self.fd, Ioctl.DEVICE_ATTACH_IOMMUFD_PT, argument, what)
        used: int = spec.ATTACH_IOMMUFD_PT.unpack(argument)[2]
        return used

    def detach(self) -> None:
        """Block the device's DMA; detaching twice is harmless."""
        argument = bytearray(spec.DETACH_IOMMUFD_PT.pack(spec.DETACH_IOMMUFD_PT.size, 0))
        ask(self.fd, Ioctl.DEVICE_DETACH_IOMMUFD_PT, argument, f"{self.name}: detach")

    def close(self) -> None:
        """Close the device; closing twice is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _region(self, index: int) -> HostRegion:
        size = vfio.REGION_INFO.size
        for _ in range(2):
            buffer = bytearray(size)
            vfio.REGION_INFO.pack_into(buffer, 0, size, 0, index, 0, 0, 0)
            try:
                ask(self.fd, Ioctl.DEVICE_GET_REGION_INFO, buffer, f"{self.name}: region {index}")
            except BackendError as error:
                # A region that this device doesn't have (VGA, mostly).
                if error.errno == errno.EINVAL:
                    return HostRegion(0, 0, 0, ())
                raise
            needed, flags, _, capability, length, offset = vfio.REGION_INFO.unpack_from(buffer)
            if needed <= size:
                return HostRegion(length, flags, offset, _areas(bytes(buffer), flags, capability))
            size = needed
        raise InternalError(f"{self.name}: the info of region {index} grows")

    def _irq(self, index: int) -> HostIrq:
        buffer = bytearray(vfio.IRQ_INFO.pack(vfio.IRQ_INFO.size, 0, index, 0))
        try:
            ask(self.fd, Ioctl.DEVICE_GET_IRQ_INFO, buffer, f"{self.name}: interrupt {index}")
        except BackendError as error:
            if error.errno == errno.EINVAL:
                return HostIrq(0, 0)
            raise
        _, flags, _, count = vfio.IRQ_INFO.unpack(buffer)
        return HostIrq(count, flags)


def open_cdev(device: HostDevice, iommufd: Iommufd) -> VfioDevice:
    """Open the device's own file and bind it to ``iommufd``; its DMA is then blocked.

    Raises:
        BackendError: ENODEV, the kernel has no such files; EBUSY, its group is open;
            EPERM, another of its group is bound elsewhere, or interrupts aren't isolated.
    """
    device.require_vfio()
    path = device.cdev
    if path is None:
        raise BackendError(errno.ENODEV, f"{device.address} has no file in /dev/vfio/devices")
    fd = open_device_file(path)
    argument = bytearray(spec.BIND_IOMMUFD.pack(spec.BIND_IOMMUFD.size, 0, iommufd.fileno(), 0))
    try:
        ask(fd, Ioctl.DEVICE_BIND_IOMMUFD, argument, f"{device.address}: bind to iommufd")
    except BackendError:
        os.close(fd)
        raise
    *_, number = spec.BIND_IOMMUFD.unpack(argument)
    return VfioDevice(fd, device.address, number)


def _areas(info: bytes, flags: int, capability: int) -> tuple[tuple[int, int], ...]:
    """Return the mappable areas of a region's capability chain, in its order."""
    if not flags & vfio.REGION_INFO_FLAG_CAPS:
        return ()
    while capability:
        kind, version, following = vfio.CAP_HEADER.unpack_from(info, capability)
        if kind == vfio.REGION_INFO_CAP_SPARSE_MMAP and version == 1:
            *_, count, _ = vfio.SPARSE_MMAP.unpack_from(info, capability)
            at = capability + vfio.SPARSE_MMAP.size
            size = vfio.SPARSE_MMAP_AREA.size
            return tuple(vfio.SPARSE_MMAP_AREA.iter_unpack(info[at : at + size * count]))
        capability = following
    return ()
