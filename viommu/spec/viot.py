"""ACPI VIOT, the Virtual I/O Translation table: which endpoints are behind which virtio-iommu.

Source: ACPI 6.5, 5.2.6 (table header) and 5.2.36 "Virtual I/O Translation
Table"; Linux ``include/acpi/actbl3.h`` (``struct acpi_table_viot``), revision 0.
Endpoint ids and BDFs of a range are inclusive at both ends.
"""

from __future__ import annotations

import enum
from ctypes import c_char, c_uint8, c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "NODES_OFFSET",
    "REVISION",
    "SIGNATURE",
    "MmioEndpointNode",
    "MmioIommuNode",
    "NodeHeader",
    "NodeType",
    "PciIommuNode",
    "PciRangeNode",
    "TableHeader",
    "ViotHeader",
]

SIGNATURE: Final = b"VIOT"
REVISION: Final = 0
NODES_OFFSET: Final = 48
"""Where the first node starts: right behind :class:`ViotHeader`."""


class NodeType(enum.IntEnum):
    """``type`` of a node."""

    PCI_RANGE = 1
    MMIO_ENDPOINT = 2
    VIRTIO_IOMMU_PCI = 3
    VIRTIO_IOMMU_MMIO = 4


class TableHeader(Struct):
    """``struct acpi_table_header``, 36 bytes; all bytes of the table add up to 0 modulo 256."""

    if TYPE_CHECKING:
        signature: bytes
        length: int
        revision: int
        checksum: int
        oem_id: bytes
        oem_table_id: bytes
        oem_revision: int
        asl_compiler_id: bytes
        asl_compiler_revision: int
    else:
        _fields_ = (
            ("signature", c_char * 4),
            ("length", c_uint32),
            ("revision", c_uint8),
            ("checksum", c_uint8),
            ("oem_id", c_char * 6),
            ("oem_table_id", c_char * 8),
            ("oem_revision", c_uint32),
            ("asl_compiler_id", c_char * 4),
            ("asl_compiler_revision", c_uint32),
        )


class ViotHeader(Struct):
    """``struct acpi_table_viot``, 48 bytes; ``node_offset`` is where the nodes start."""

    if TYPE_CHECKING:
        header: TableHeader
        node_count: int
        node_offset: int
        reserved: bytes
    else:
        _fields_ = (
            ("header", TableHeader),
            ("node_count", c_uint16),
            ("node_offset", c_uint16),
            ("reserved", c_uint8 * 8),
        )


class NodeHeader(Struct):
    """``struct acpi_viot_header``, 4 bytes; ``length`` is that of the whole node."""

    if TYPE_CHECKING:
        type: int
        reserved: int
        length: int
    else:
        _fields_ = (("type", c_uint8), ("reserved", c_uint8), ("length", c_uint16))


class PciRangeNode(Struct):
    """``struct acpi_viot_pci_range``, 24 bytes.

    ``output_node`` is the offset, from the start of the table, of the IOMMU's node.
    """

    if TYPE_CHECKING:
        header: NodeHeader
        endpoint_start: int
        segment_start: int
        segment_end: int
        bdf_start: int
        bdf_end: int
        output_node: int
        reserved: bytes
    else:
        _fields_ = (
            ("header", NodeHeader),
            ("endpoint_start", c_uint32),
            ("segment_start", c_uint16),
            ("segment_end", c_uint16),
            ("bdf_start", c_uint16),
            ("bdf_end", c_uint16),
            ("output_node", c_uint16),
            ("reserved", c_uint8 * 6),
        )


class MmioEndpointNode(Struct):
    """``struct acpi_viot_mmio``, 24 bytes."""

    if TYPE_CHECKING:
        header: NodeHeader
        endpoint: int
        base_address: int
        output_node: int
        reserved: bytes
    else:
        _fields_ = (
            ("header", NodeHeader),
            ("endpoint", c_uint32),
            ("base_address", c_uint64),
            ("output_node", c_uint16),
            ("reserved", c_uint8 * 6),
        )


class PciIommuNode(Struct):
    """``struct acpi_viot_virtio_iommu_pci``, 16 bytes."""

    if TYPE_CHECKING:
        header: NodeHeader
        segment: int
        bdf: int
        reserved: bytes
    else:
        _fields_ = (
            ("header", NodeHeader),
            ("segment", c_uint16),
            ("bdf", c_uint16),
            ("reserved", c_uint8 * 8),
        )


class MmioIommuNode(Struct):
    """``struct acpi_viot_virtio_iommu_mmio``, 16 bytes."""

    if TYPE_CHECKING:
        header: NodeHeader
        reserved: bytes
        base_address: int
    else:
        _fields_ = (
            ("header", NodeHeader),
            ("reserved", c_uint8 * 4),
            ("base_address", c_uint64),
        )
