"""IOMMU groups of the host: devices that it can't tell apart, so they share one mapper.

A group is opened with its first device and closed with its last one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from viommu.errors import BackendError
from viommu_backends.iommufd import IommufdMapper
from viommu_backends.passthrough.mapper import GroupMapper
from viommu_backends.passthrough.reserved import reserved_for_guest
from viommu_backends.type1_container import Type1Container
from viommu_backends.vfio_device import VfioDevice, open_cdev
from viommu_backends.vfio_type1 import Type1Mapper

if TYPE_CHECKING:
    from viommu.domain import ReservedRegion
    from viommu.memory.dma_target import DmaRegistration
    from viommu.memory.regions import RegionManager
    from viommu_backends.host_device import HostDevice
    from viommu_backends.iommufd_memory import IommufdMemory

__all__ = ["Group", "IommufdGroup", "Type1Group"]

_log: Final = logging.getLogger(__name__)


class Group(Protocol):
    """What an endpoint needs of its group."""

    @property
    def mapper(self) -> GroupMapper:
        """What programs the host's IOMMU for all devices of the group."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """What IOVAs the group can use."""

    @property
    def reserved(self) -> tuple[ReservedRegion, ...]:
        """What IOVAs its guest must not use; the same for all devices of the group."""

    @property
    def empty(self) -> bool:
        """Whether all devices have left: the group is closed."""

    def open(self, host: HostDevice) -> VfioDevice:
        """Open a device of the group.

        Raises:
            BackendError: The host refused.
        """

    def leave(self, device: VfioDevice) -> None:
        """Close a device, of which nothing is mapped any more; with the last one the group."""


class Type1Group:
    """A group in a container of its own; it is opened without a device.

    Raises:
        BackendError: The host refused.
    """

    def __init__(self, host: HostDevice, regions: RegionManager) -> None:
        self._container = Type1Container(host)
        self._devices: list[VfioDevice] = []
        try:
            self.ranges = self._container.info.iova_ranges
            self.reserved = reserved_for_guest(host.reserved_regions(), self.ranges)
            inner = Type1Mapper(self._container)
            self._registration = regions.register(
                inner, f"type1 container of group {host.group}", inner.needs
            )
        except BaseException:
            self._container.close()
            raise
        self.mapper = GroupMapper(inner)

    @property
    def empty(self) -> bool:
        """Whether all devices have left: the group is closed."""
        return not self._devices

    def open(self, host: HostDevice) -> VfioDevice:
        """Open a device of the group; see :class:`Group`."""
        try:
            device = VfioDevice(self._container.device_fd(host), host.address)
        except BackendError:
            self._close_if_empty()
            raise
        self._devices.append(device)
        return device

    def leave(self, device: VfioDevice) -> None:
        """Close a device; see :class:`Group`."""
        self._devices.remove(device)
        device.close()
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        if self._devices:
            return
        self.mapper.retire()
        _release(self._registration)
        # Whatever is still mapped goes with the container.
        try:
            self._container.close()
        except BackendError as error:
            _log.warning("%s; it ends with this process", error)


class IommufdGroup:
    """A group behind the iommufd that has ``memory``, where address spaces can be shared."""

    def __init__(self, host: HostDevice, memory: IommufdMemory) -> None:
        self._context = memory.context
        self._inner = IommufdMapper(memory, ())
        self._number = host.group
        self.mapper = GroupMapper(self._inner)
        self.ranges: tuple[tuple[int, int], ...] = ()
        self.reserved: tuple[ReservedRegion, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether all devices have left: the group is closed."""
        return not self._inner.devices

    def open(self, host: HostDevice) -> VfioDevice:
        """Open a device of the group; see :class:`Group`."""
        device = open_cdev(host, self._context)
        try:
            if self.empty:
                self.ranges = self._find_ranges(device)
                self.reserved = reserved_for_guest(host.reserved_regions(), self.ranges)
            elif self._inner.ioas is not None:
                device.attach(self._inner.ioas)
        except BackendError:
            device.close()
            raise
        self._inner.devices += (device,)
        return device

    def leave(self, device: VfioDevice) -> None:
        """Close a device; see :class:`Group`."""
        last = self._inner.devices == (device,)
        try:
            if last:
                self.mapper.retire()
                self._inner.reset_domain()
            else:
                device.detach()
        except BackendError as error:
            _log.warning("group %d: %s; it ends with its device", self._number, error)
        self._inner.devices = tuple(other for other in self._inner.devices if other is not device)
        device.close()

    def _find_ranges(self, device: VfioDevice) -> tuple[tuple[int, int], ...]:
        """Attach a device to an empty address space, which then knows what it can map."""
        ioas = self._context.alloc_ioas()
        try:
            device.attach(ioas)
            try:
                return self._context.iova_ranges(ioas).ranges
            finally:
                device.detach()
        finally:
            self._context.destroy(ioas)


def _release(registration: DmaRegistration) -> None:
    try:
        registration.release()
    except BackendError as error:
        _log.warning("%s: %s", registration.name, error)
