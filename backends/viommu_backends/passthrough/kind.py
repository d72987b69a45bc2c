"""The kind of endpoint ``vfio``, as an entry point of viommu."""

from __future__ import annotations

from typing import Final

from viommu.endpoints.host import HostKind
from viommu.endpoints.registry import Option
from viommu.errors import UsageError
from viommu_backends.host_device import HostDevice
from viommu_backends.passthrough.devices import BACKENDS, PassthroughDevices

__all__ = ["VFIO"]


def _backend(value: str) -> str:
    """Read the name of a backend."""
    if value not in BACKENDS:
        raise UsageError(f"expected {' or '.join(BACKENDS)}")
    return value


VFIO: Final = HostKind(
    "a PCI device of the host that vfio-pci has",
    {
        "host": Option(HostDevice.parse, "its address there, as 0000:04:00.0", required=True),
        "backend": Option(_backend, "iommufd, or type1, the default where there is no iommufd"),
    },
    PassthroughDevices,
)
