"""Guest physical memory: the files behind it, and access by address.

This package knows nothing of virtio, nor of how the regions came to be known.
"""

from viommu.memory.backing import FileKey
from viommu.memory.by_message import MemoryPort, MessageMemory
from viommu.memory.files import MappedFile, MappedFiles
from viommu.memory.guest import GuestMemory, MemoryRegion

__all__ = [
    "FileKey",
    "GuestMemory",
    "MappedFile",
    "MappedFiles",
    "MemoryPort",
    "MemoryRegion",
    "MessageMemory",
]
