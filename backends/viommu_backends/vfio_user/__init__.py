"""Devices in other processes, served by anybody over vfio-user."""

from viommu_backends.vfio_user.endpoint import VfioUserEndpoint, VfioUserOptions
from viommu_backends.vfio_user.kind import VFIO_USER, VfioUserDevices
from viommu_backends.vfio_user.mapper import VfioUserMapper

__all__ = [
    "VFIO_USER",
    "VfioUserDevices",
    "VfioUserEndpoint",
    "VfioUserMapper",
    "VfioUserOptions",
]
