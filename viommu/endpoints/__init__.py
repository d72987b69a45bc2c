"""Devices that reach memory only through the IOMMU, and the registry that makes them."""

from viommu.endpoints.blk import BlkDevice
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.registry import (
    KINDS,
    EndpointKind,
    Option,
    Place,
    make_endpoint,
    parse_endpoint,
)

__all__ = [
    "KINDS",
    "BlkDevice",
    "EduFunction",
    "EndpointDma",
    "EndpointKind",
    "Option",
    "Place",
    "make_endpoint",
    "parse_endpoint",
]
