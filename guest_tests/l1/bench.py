"""Guest memory, and devices of the host that reach it through a backend."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Final, Self

from guest_tests.guest.edu import Edu
from guest_tests.l1.function import Function, host_device
from guest_tests.l1.word_writer import WordWriter
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import AddressRange, MemoryKind
from viommu.memory.regions import RegionManager
from viommu_backends.bar_file import BarFile
from viommu_backends.iommufd import IommufdMapper
from viommu_backends.iommufd_context import Iommufd
from viommu_backends.iommufd_memory import IommufdMemory
from viommu_backends.type1_container import Type1Container
from viommu_backends.vfio_device import VfioDevice, open_cdev
from viommu_backends.vfio_type1 import Type1Mapper

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from viommu.memory.region import Region

__all__ = ["Bench", "Ram"]

_RESERVATION: Final = 1 << 40  # of addresses: costs nothing


class Ram:
    """A file in memory that is a region of guest memory; ``bytes`` are its contents."""

    def __init__(self, region: Region, bytes_: mmap.mmap) -> None:
        self.region = region
        self.bytes = bytes_


class Bench:
    """Guest memory, and devices of the host behind ``backend``; a context manager."""

    def __init__(self, backend: str = "type1") -> None:
        self.regions = RegionManager(reservation=_RESERVATION)
        self.devices: dict[str, VfioDevice] = {}
        self._closing = contextlib.ExitStack()
        self._memory: IommufdMemory | None = None
        if backend == "iommufd":
            context = Iommufd()
            self._closing.callback(context.close)
            self._memory = IommufdMemory(context, self.regions.register)
            self._closing.callback(self._memory.close)

    @property
    def context(self) -> Iommufd:
        """The iommufd that everything is in."""
        assert self._memory is not None
        return self._memory.context

    def add_ram(self, gpa: int, size: int, *, writable: bool = True) -> Ram:
        """Add ``size`` bytes of guest memory at ``gpa``."""
        fd = os.memfd_create("ram")
        try:
            os.ftruncate(fd, size)
            view = mmap.mmap(fd, size)
            region = self.regions.add_region(f"ram at {gpa:#x}", AddressRange(gpa, gpa + size))
            self.regions.add_mapping(region, AddressRange(0, size), FileBacking(fd))
        finally:
            os.close(fd)
        self._closing.callback(self.remove, region)
        self.regions.enable(region, writable=writable)
        return Ram(region, view)

    def add_bar(self, gpa: int, bdf: str, bar: int) -> Region:
        """Add a BAR to guest memory, disabled."""
        device = self.devices[bdf]
        region = device.regions[bar]
        where = AddressRange(gpa, gpa + region.size)
        added = self.regions.add_region(f"BAR at {gpa:#x}", where, MemoryKind.DEVICE)
        within = AddressRange(0, region.size)
        self.regions.add_mapping(added, within, BarFile(device), region.offset)
        self._closing.callback(self.remove, added)
        return added

    def remove(self, region: Region) -> None:
        """Remove a region, unless it is gone already."""
        if region in self.regions.regions():
            self.regions.remove_region(region)

    def mapper(self, *bdfs: str) -> Type1Mapper | IommufdMapper:
        """Open the devices ``bdfs``, one whole group or part of it, and return their mapper.

        With iommufd there can be none: then what is mapped shows by DMA of software.
        """
        hosts = [host_device(bdf) for bdf in bdfs]
        if self._memory is not None:
            for bdf, host in zip(bdfs, hosts, strict=True):
                self._keep(bdf, open_cdev(host, self.context))
            devices = [self.devices[bdf] for bdf in bdfs]
            mapper = IommufdMapper(self._memory, devices)
            self._closing.callback(mapper.reset_domain)
            return mapper
        container = Type1Container(hosts[0])
        self._closing.callback(container.close)
        for bdf, host in zip(bdfs, hosts, strict=True):
            self._keep(bdf, VfioDevice(container.device_fd(host), bdf))
        type1 = Type1Mapper(container)
        registration = self.regions.register(type1, bdfs[0], type1.needs)
        self._closing.callback(registration.release)
        self._closing.callback(type1.reset_domain)
        return type1

    def function(self, bdf: str, bar: int = 0) -> Function:
        """Return a device that was opened for a mapper, with one of its BARs mapped."""
        function = Function(self.devices[bdf], bar)
        self._closing.callback(function.close)
        return function

    def edu(self, bdf: str) -> Edu:
        """Return a driver for the edu at ``bdf``."""
        return Edu(self.function(bdf))

    def word_writer(self, bdf: str) -> WordWriter:
        """Return a driver for the iommu-testdev at ``bdf``."""
        return WordWriter(self.function(bdf))

    def closing(self, call: Callable[[], None]) -> None:
        """Make ``call`` before anything is closed that is open now."""
        self._closing.callback(call)

    def close(self) -> None:
        """Close everything, latest first."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _keep(self, bdf: str, device: VfioDevice) -> None:
        self._closing.callback(device.close)
        self.devices[bdf] = device
