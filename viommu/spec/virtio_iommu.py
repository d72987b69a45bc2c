"""virtio-iommu: requests, configuration, properties and faults (ends are inclusive).

Source: virtio 1.2, 5.13 "IOMMU device"; ``<linux/virtio_iommu.h>``.
Head and tail are kept inside each structure, so natural layout is exact;
``tail.offset`` is the length of the device-readable part (PROBE excepted: its
properties come between).
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "ATTACH",
    "ATTACH_F_BYPASS",
    "CONFIG",
    "DETACH",
    "DEVICE_ID",
    "EVENT_QUEUE",
    "FAULT",
    "FAULT_F_ADDRESS",
    "FAULT_F_READ",
    "FAULT_F_WRITE",
    "MAP",
    "MAP_F_MMIO",
    "MAP_F_READ",
    "MAP_F_WRITE",
    "PROBE",
    "PROBE_T_NONE",
    "PROBE_T_RESV_MEM",
    "REQUEST_QUEUE",
    "RESV_MEM",
    "TAIL_SIZE",
    "UNMAP",
    "AttachRequest",
    "Config",
    "DetachRequest",
    "Fault",
    "FaultReason",
    "Feature",
    "MapRequest",
    "ProbeRequest",
    "RequestType",
    "ReservedKind",
    "ResvMemProperty",
    "Status",
    "UnmapRequest",
]

DEVICE_ID: Final = 23

REQUEST_QUEUE: Final = 0
EVENT_QUEUE: Final = 1


class Feature(enum.IntEnum):
    """Feature bits (bit numbers), virtio 1.2, 5.13.3."""

    INPUT_RANGE = 0
    DOMAIN_RANGE = 1
    MAP_UNMAP = 2
    BYPASS = 3
    PROBE = 4
    MMIO = 5
    BYPASS_CONFIG = 6


class RequestType(enum.IntEnum):
    """``head.type``, virtio 1.2, 5.13.6."""

    ATTACH = 1
    DETACH = 2
    MAP = 3
    UNMAP = 4
    PROBE = 5


class Status(enum.IntEnum):
    """``tail.status``, virtio 1.2, 5.13.6."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    DEVERR = 3
    INVAL = 4
    RANGE = 5
    NOENT = 6
    FAULT = 7
    NOMEM = 8


class FaultReason(enum.IntEnum):
    """``reason`` of a fault report, virtio 1.2, 5.13.6.9."""

    UNKNOWN = 0
    DOMAIN = 1
    MAPPING = 2


class ReservedKind(enum.IntEnum):
    """``subtype`` of a RESV_MEM property, virtio 1.2, 5.13.6.7.1."""

    RESERVED = 0
    MSI = 1


ATTACH_F_BYPASS: Final = 1 << 0

MAP_F_READ: Final = 1 << 0
MAP_F_WRITE: Final = 1 << 1
MAP_F_MMIO: Final = 1 << 2

PROBE_T_NONE: Final = 0
PROBE_T_RESV_MEM: Final = 1

FAULT_F_READ: Final = 1 << 0
FAULT_F_WRITE: Final = 1 << 1
FAULT_F_ADDRESS: Final = 1 << 8


class Range64(Struct):
    """``struct virtio_iommu_range_64``."""

    if TYPE_CHECKING:
        start: int
        end: int
    else:
        _fields_ = (("start", c_uint64), ("end", c_uint64))


class Range32(Struct):
    """``struct virtio_iommu_range_32``."""

    if TYPE_CHECKING:
        start: int
        end: int
    else:
        _fields_ = (("start", c_uint32), ("end", c_uint32))


class Config(Struct):
    """``struct virtio_iommu_config``, 40 bytes."""

    if TYPE_CHECKING:
        page_size_mask: int
        input_range: Range64
        domain_range: Range32
        probe_size: int
        bypass: int
        reserved: bytes
    else:
        _fields_ = (
            ("page_size_mask", c_uint64),
            ("input_range", Range64),
            ("domain_range", Range32),
            ("probe_size", c_uint32),
            ("bypass", c_uint8),
            ("reserved", c_uint8 * 3),
        )


class ReqHead(Struct):
    """``struct virtio_iommu_req_head``."""

    if TYPE_CHECKING:
        type: int
        reserved: bytes
    else:
        _fields_ = (("type", c_uint8), ("reserved", c_uint8 * 3))


class ReqTail(Struct):
    """``struct virtio_iommu_req_tail``."""

    if TYPE_CHECKING:
        status: int
        reserved: bytes
    else:
        _fields_ = (("status", c_uint8), ("reserved", c_uint8 * 3))


class AttachRequest(Struct):
    """``struct virtio_iommu_req_attach``, 20 + 4 bytes."""

    if TYPE_CHECKING:
        head: ReqHead
        domain: int
        endpoint: int
        flags: int
        reserved: bytes
        tail: ReqTail
    else:
        _fields_ = (
            ("head", ReqHead),
            ("domain", c_uint32),
            ("endpoint", c_uint32),
            ("flags", c_uint32),
            ("reserved", c_uint8 * 4),
            ("tail", ReqTail),
        )


class DetachRequest(Struct):
    """``struct virtio_iommu_req_detach``, 20 + 4 bytes."""

    if TYPE_CHECKING:
        head: ReqHead
        domain: int
        endpoint: int
        reserved: bytes
        tail: ReqTail
    else:
        _fields_ = (
            ("head", ReqHead),
            ("domain", c_uint32),
            ("endpoint", c_uint32),
            ("reserved", c_uint8 * 8),
            ("tail", ReqTail),
        )


class MapRequest(Struct):
    """``struct virtio_iommu_req_map``, 36 + 4 bytes; ``virt_end`` is inclusive."""

    if TYPE_CHECKING:
        head: ReqHead
        domain: int
        virt_start: int
        virt_end: int
        phys_start: int
        flags: int
        tail: ReqTail
    else:
        _fields_ = (
            ("head", ReqHead),
            ("domain", c_uint32),
            ("virt_start", c_uint64),
            ("virt_end", c_uint64),
            ("phys_start", c_uint64),
            ("flags", c_uint32),
            ("tail", ReqTail),
        )


class UnmapRequest(Struct):
    """``struct virtio_iommu_req_unmap``, 28 + 4 bytes; ``virt_end`` is inclusive."""

    if TYPE_CHECKING:
        head: ReqHead
        domain: int
        virt_start: int
        virt_end: int
        reserved: bytes
        tail: ReqTail
    else:
        _fields_ = (
            ("head", ReqHead),
            ("domain", c_uint32),
            ("virt_start", c_uint64),
            ("virt_end", c_uint64),
            ("reserved", c_uint8 * 4),
            ("tail", ReqTail),
        )


class ProbeRequest(Struct):
    """``struct virtio_iommu_req_probe``, 72 bytes; properties and tail follow."""

    if TYPE_CHECKING:
        head: ReqHead
        endpoint: int
        reserved: bytes
    else:
        _fields_ = (("head", ReqHead), ("endpoint", c_uint32), ("reserved", c_uint8 * 64))


class ProbeProperty(Struct):
    """``struct virtio_iommu_probe_property``; ``length`` excludes this header."""

    if TYPE_CHECKING:
        type: int
        length: int
    else:
        _fields_ = (("type", c_uint16), ("length", c_uint16))


class ResvMemProperty(Struct):
    """``struct virtio_iommu_probe_resv_mem``, 24 bytes; ``end`` is inclusive."""

    if TYPE_CHECKING:
        head: ProbeProperty
        subtype: int
        reserved: bytes
        start: int
        end: int
    else:
        _fields_ = (
            ("head", ProbeProperty),
            ("subtype", c_uint8),
            ("reserved", c_uint8 * 3),
            ("start", c_uint64),
            ("end", c_uint64),
        )


class Fault(Struct):
    """``struct virtio_iommu_fault``, 24 bytes."""

    if TYPE_CHECKING:
        reason: int
        reserved: bytes
        flags: int
        endpoint: int
        reserved2: bytes
        address: int
    else:
        _fields_ = (
            ("reason", c_uint8),
            ("reserved", c_uint8 * 3),
            ("flags", c_uint32),
            ("endpoint", c_uint32),
            ("reserved2", c_uint8 * 4),
            ("address", c_uint64),
        )


# The request path decodes with struct (half the time of ctypes); tests prove
# these formats equal to the structures above. Reserved bytes of a head are
# skipped because a device must ignore them.
TAIL_SIZE: Final = 4
ATTACH: Final = struct.Struct("<B3xIIII")  # type, domain, endpoint, flags, reserved
DETACH: Final = struct.Struct("<B3xII8x")  # type, domain, endpoint
MAP: Final = struct.Struct("<B3xIQQQI")  # type, domain, virt_start, virt_end, phys_start, flags
UNMAP: Final = struct.Struct("<B3xIQQ4x")  # type, domain, virt_start, virt_end
PROBE: Final = struct.Struct("<B3xI64x")  # type, endpoint
CONFIG: Final = struct.Struct("<QQQIIIB3x")
RESV_MEM: Final = struct.Struct("<HHB3xQQ")  # type, length, subtype, start, end
FAULT: Final = struct.Struct("<B3xII4xQ")  # reason, flags, endpoint, address
