"""Devices of the host behind the IOMMU: served to a VMM, their DMA programmed by the guest."""

from viommu_backends.passthrough.devices import PassthroughDevices
from viommu_backends.passthrough.endpoint import PassthroughEndpoint
from viommu_backends.passthrough.function import PassthroughFunction
from viommu_backends.passthrough.kind import VFIO

__all__ = ["VFIO", "PassthroughDevices", "PassthroughEndpoint", "PassthroughFunction"]
