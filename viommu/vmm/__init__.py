"""What a VMM must be told: PCI addresses, the ACPI VIOT, QEMU's arguments. No I/O but QEMU's own.

:func:`build_viot` makes the table that tells a guest which functions are behind
the virtio-iommu, :func:`qemu_arguments` the command line that gives QEMU that
table, the functions and memory it shares with us, and :func:`find_qemu` a QEMU
that can do it.
"""

from viommu.vmm.bdf import Bdf
from viommu.vmm.qemu import (
    MEMORY_REMEDY,
    check_directory,
    device_argument,
    door_name,
    format_size,
    qemu_arguments,
    socket_name,
)
from viommu.vmm.qemu_binary import Qemu, UnsuitableQemuError, find_qemu, probe_qemu
from viommu.vmm.topology import check_topology
from viommu.vmm.viot import ViotNode, ViotTable, build_viot, parse_viot

__all__ = [
    "MEMORY_REMEDY",
    "Bdf",
    "Qemu",
    "UnsuitableQemuError",
    "ViotNode",
    "ViotTable",
    "build_viot",
    "check_directory",
    "check_topology",
    "device_argument",
    "door_name",
    "find_qemu",
    "format_size",
    "parse_viot",
    "probe_qemu",
    "qemu_arguments",
    "socket_name",
]
