"""VFIO's view of a PCI device: regions and interrupts, by index.

Source: ``<linux/vfio.h>``; vfio-user uses the same numbers and the same
structures, in host byte order.
"""

from __future__ import annotations

import struct
from ctypes import c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "CAP_HEADER",
    "DEVICE_FLAGS_PCI",
    "DEVICE_FLAGS_RESET",
    "IRQ_INFO",
    "IRQ_INFO_AUTOMASKED",
    "IRQ_INFO_EVENTFD",
    "IRQ_INFO_MASKABLE",
    "IRQ_INFO_NORESIZE",
    "IRQ_SET",
    "IRQ_SET_ACTION_MASK",
    "IRQ_SET_ACTION_TRIGGER",
    "IRQ_SET_ACTION_UNMASK",
    "IRQ_SET_DATA_BOOL",
    "IRQ_SET_DATA_EVENTFD",
    "IRQ_SET_DATA_NONE",
    "PCI_CONFIG_REGION_INDEX",
    "PCI_ERR_IRQ_INDEX",
    "PCI_INTX_IRQ_INDEX",
    "PCI_MSIX_IRQ_INDEX",
    "PCI_MSI_IRQ_INDEX",
    "PCI_NUM_BARS",
    "PCI_NUM_IRQS",
    "PCI_NUM_REGIONS",
    "PCI_REQ_IRQ_INDEX",
    "PCI_ROM_REGION_INDEX",
    "PCI_VGA_REGION_INDEX",
    "REGION_INFO",
    "REGION_INFO_CAP_SPARSE_MMAP",
    "REGION_INFO_CAP_SPARSE_MMAP_VERSION",
    "REGION_INFO_FLAG_CAPS",
    "REGION_INFO_FLAG_MMAP",
    "REGION_INFO_FLAG_READ",
    "REGION_INFO_FLAG_WRITE",
    "SPARSE_MMAP",
    "SPARSE_MMAP_AREA",
    "CapHeader",
    "IrqInfo",
    "IrqSet",
    "RegionInfo",
    "SparseMmap",
    "SparseMmapArea",
]

DEVICE_FLAGS_RESET: Final = 1 << 0
DEVICE_FLAGS_PCI: Final = 1 << 1

# Regions 0 to 5 are the BARs.
PCI_NUM_BARS: Final = 6
PCI_ROM_REGION_INDEX: Final = 6
PCI_CONFIG_REGION_INDEX: Final = 7
PCI_VGA_REGION_INDEX: Final = 8
PCI_NUM_REGIONS: Final = 9

REGION_INFO_FLAG_READ: Final = 1 << 0
REGION_INFO_FLAG_WRITE: Final = 1 << 1
REGION_INFO_FLAG_MMAP: Final = 1 << 2
REGION_INFO_FLAG_CAPS: Final = 1 << 3

REGION_INFO_CAP_SPARSE_MMAP: Final = 1
REGION_INFO_CAP_SPARSE_MMAP_VERSION: Final = 1

PCI_INTX_IRQ_INDEX: Final = 0
PCI_MSI_IRQ_INDEX: Final = 1
PCI_MSIX_IRQ_INDEX: Final = 2
PCI_ERR_IRQ_INDEX: Final = 3
PCI_REQ_IRQ_INDEX: Final = 4
PCI_NUM_IRQS: Final = 5

IRQ_INFO_EVENTFD: Final = 1 << 0
IRQ_INFO_MASKABLE: Final = 1 << 1
IRQ_INFO_AUTOMASKED: Final = 1 << 2
IRQ_INFO_NORESIZE: Final = 1 << 3

IRQ_SET_DATA_NONE: Final = 1 << 0
IRQ_SET_DATA_BOOL: Final = 1 << 1
IRQ_SET_DATA_EVENTFD: Final = 1 << 2
IRQ_SET_ACTION_MASK: Final = 1 << 3
IRQ_SET_ACTION_UNMASK: Final = 1 << 4
IRQ_SET_ACTION_TRIGGER: Final = 1 << 5


class RegionInfo(Struct):
    """``struct vfio_region_info``, 32 bytes; capabilities may follow."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        index: int
        cap_offset: int
        size: int
        offset: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("index", c_uint32),
            ("cap_offset", c_uint32),
            ("size", c_uint64),
            ("offset", c_uint64),
        )


class CapHeader(Struct):
    """``struct vfio_info_cap_header``; ``next`` counts from the start of the info."""

    if TYPE_CHECKING:
        id: int
        version: int
        next: int
    else:
        _fields_ = (("id", c_uint16), ("version", c_uint16), ("next", c_uint32))


class SparseMmap(Struct):
    """``struct vfio_region_info_cap_sparse_mmap``, 16 bytes; areas follow."""

    if TYPE_CHECKING:
        header: CapHeader
        nr_areas: int
        reserved: int
    else:
        _fields_ = (("header", CapHeader), ("nr_areas", c_uint32), ("reserved", c_uint32))


class SparseMmapArea(Struct):
    """``struct vfio_region_sparse_mmap_area``; ``offset`` counts from the region's start."""

    if TYPE_CHECKING:
        offset: int
        size: int
    else:
        _fields_ = (("offset", c_uint64), ("size", c_uint64))


class IrqInfo(Struct):
    """``struct vfio_irq_info``, 16 bytes."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        index: int
        count: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("index", c_uint32),
            ("count", c_uint32),
        )


class IrqSet(Struct):
    """``struct vfio_irq_set``, 20 bytes; data follows."""

    if TYPE_CHECKING:
        argsz: int
        flags: int
        index: int
        start: int
        count: int
    else:
        _fields_ = (
            ("argsz", c_uint32),
            ("flags", c_uint32),
            ("index", c_uint32),
            ("start", c_uint32),
            ("count", c_uint32),
        )


# Decoded with struct on the way of a message; tests prove these equal to the structures.
REGION_INFO: Final = struct.Struct("<IIIIQQ")  # argsz, flags, index, cap_offset, size, offset
CAP_HEADER: Final = struct.Struct("<HHI")  # id, version, next
SPARSE_MMAP: Final = struct.Struct("<HHIII")  # id, version, next, nr_areas, reserved
SPARSE_MMAP_AREA: Final = struct.Struct("<QQ")  # offset, size
IRQ_INFO: Final = struct.Struct("<IIII")  # argsz, flags, index, count
IRQ_SET: Final = struct.Struct("<IIIII")  # argsz, flags, index, start, count
