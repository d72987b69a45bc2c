"""Virtio: the split ring, the device model and its PCI transport."""

from viommu.virtio.ring import Chain, SplitQueue
from viommu.virtio.ring_memory import RingMemory

__all__ = ["Chain", "RingMemory", "SplitQueue"]
