"""The host devices of one machine: which backend each gets, and what they share."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any, Final

from viommu.errors import BackendError, UsageError
from viommu_backends.iommufd_context import Iommufd
from viommu_backends.iommufd_memory import IommufdMemory
from viommu_backends.passthrough.endpoint import PassthroughEndpoint
from viommu_backends.passthrough.groups import IommufdGroup, Type1Group

if TYPE_CHECKING:
    from collections.abc import Mapping

    from viommu.endpoints.host import HostPlace
    from viommu.memory.regions import RegionManager
    from viommu_backends.host_device import HostDevice
    from viommu_backends.passthrough.groups import Group

__all__ = ["BACKENDS", "IOMMUFD", "TYPE1", "PassthroughDevices"]

_log: Final = logging.getLogger(__name__)

IOMMUFD: Final = "iommufd"
TYPE1: Final = "type1"
BACKENDS: Final = (IOMMUFD, TYPE1)


class PassthroughDevices:
    """Implements :class:`~viommu.endpoints.host.HostDevices`: one iommufd, each group once."""

    def __init__(self) -> None:
        self._context: Iommufd | None = None
        self._memory: IommufdMemory | None = None
        self._groups: dict[int, tuple[Group, str, str]] = {}  # the group, its backend, and why

    def open(self, place: HostPlace, options: Mapping[str, Any]) -> PassthroughEndpoint:
        """Open the device ``host`` with ``backend``, or with the best that there is.

        Raises:
            UsageError: Its group is open with another backend.
            BackendError: The host refused.
        """
        host: HostDevice = options["host"]
        host.require_vfio()
        group, backend = self._group(host, place.regions, options.get("backend"))
        device = group.open(host)
        try:
            return PassthroughEndpoint(place, host, group, device, backend)
        except BaseException:
            group.leave(device)
            raise

    def close(self) -> None:
        """Close the iommufd; every endpoint is closed before."""
        self._groups.clear()
        if self._memory is not None:
            try:
                self._memory.close()
            except BackendError as error:
                _log.warning("%s; it ends with the iommufd", error)
            self._memory = None
        if self._context is not None:
            self._context.close()
            self._context = None

    def _group(
        self, host: HostDevice, regions: RegionManager, wanted: str | None
    ) -> tuple[Group, str]:
        """Return the group of a device, and what to say of its backend."""
        number = host.group
        known = self._groups.get(number)
        if known is not None and not known[0].empty:
            group, backend, said = known
            if wanted not in {None, backend}:
                raise UsageError(
                    f"{host.address} can't have backend={wanted}: it is in group {number}, "
                    f"like others that have backend={backend}"
                )
            return group, said
        backend, said = self._choose(host, wanted)
        if backend == IOMMUFD:
            group = IommufdGroup(host, self._iommufd_memory(regions))
        else:
            group = Type1Group(host, regions)
        self._groups[number] = group, backend, said
        return group, said

    def _choose(self, host: HostDevice, wanted: str | None) -> tuple[str, str]:
        """Return the backend to use, and what to say of it."""
        if wanted == TYPE1:
            return TYPE1, "VFIO type1"
        lacking = self._lacking_for_iommufd(host)
        if lacking is not None and wanted == IOMMUFD:
            raise lacking
        if lacking is not None:
            return TYPE1, f"VFIO type1, because iommufd is out of reach: {lacking}"
        return IOMMUFD, "iommufd"

    def _lacking_for_iommufd(self, host: HostDevice) -> BackendError | None:
        """Return why a device can't be behind iommufd."""
        try:
            self._iommufd()
        except BackendError as error:
            return error
        if host.cdev is None:
            return BackendError(errno.ENODEV, f"{host.address} has no file in /dev/vfio/devices")
        return None

    def _iommufd(self) -> Iommufd:
        if self._context is None:
            self._context = Iommufd()
        return self._context

    def _iommufd_memory(self, regions: RegionManager) -> IommufdMemory:
        if self._memory is None:
            self._memory = IommufdMemory(self._iommufd(), regions.register)
        return self._memory
