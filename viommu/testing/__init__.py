"""Shipped test machinery: the driver side of the ring, guest drivers, the model mapper.

:mod:`viommu.testing.mapper_machine`, which puts a mapper to the test, needs
hypothesis and is therefore not imported here.
"""

from viommu.testing.blk_driver import BlkDriver, BlkError
from viommu.testing.driver import VirtioPciDriver, Virtqueue
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import DirectDma, GuestRam, PageAllocator
from viommu.testing.iommu_driver import FaultReport, IommuDriver, MappedDma
from viommu.testing.model import ModelMapper
from viommu.testing.pci_driver import PciDriver
from viommu.testing.ring import DriverQueue
from viommu.testing.serving import LoopThread

__all__ = [
    "BlkDriver",
    "BlkError",
    "DirectDma",
    "DriverQueue",
    "EduDriver",
    "FaultReport",
    "GuestRam",
    "IommuDriver",
    "LoopThread",
    "MappedDma",
    "ModelMapper",
    "PageAllocator",
    "PciDriver",
    "VirtioPciDriver",
    "Virtqueue",
]
