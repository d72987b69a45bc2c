"""virtio-blk: configuration, request header, segments and status.

Source: virtio 1.2, 5.2 "Block Device"; ``<linux/virtio_blk.h>``. Every sector
number counts 512-byte sectors, whatever the block size.
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "DEVICE_ID",
    "HEADER",
    "ID_SIZE",
    "REQUEST_QUEUE",
    "SECTOR_SIZE",
    "SEGMENT",
    "STATUS_SIZE",
    "WRITE_ZEROES_F_UNMAP",
    "Config",
    "Feature",
    "RequestHeader",
    "RequestType",
    "Segment",
    "Status",
]

DEVICE_ID: Final = 2

REQUEST_QUEUE: Final = 0

SECTOR_SIZE: Final = 512
STATUS_SIZE: Final = 1
ID_SIZE: Final = 20

WRITE_ZEROES_F_UNMAP: Final = 1 << 0


class Feature(enum.IntEnum):
    """Feature bits (bit numbers), virtio 1.2, 5.2.3."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    LIFETIME = 15
    SECURE_ERASE = 16


class RequestType(enum.IntEnum):
    """``type`` of a request, virtio 1.2, 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class Status(enum.IntEnum):
    """The last byte of a request, virtio 1.2, 5.2.6."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Geometry(Struct):
    """``struct virtio_blk_geometry``."""

    if TYPE_CHECKING:
        cylinders: int
        heads: int
        sectors: int
    else:
        _fields_ = (("cylinders", c_uint16), ("heads", c_uint8), ("sectors", c_uint8))


class Config(Struct):
    """``struct virtio_blk_config``, 72 bytes up to the secure erase fields.

    ``capacity`` and the ``max_*_sectors`` count 512-byte sectors; ``min_io_size``
    and ``opt_io_size`` count blocks of ``blk_size`` bytes.
    """

    if TYPE_CHECKING:
        capacity: int
        size_max: int
        seg_max: int
        geometry: Geometry
        blk_size: int
        physical_block_exp: int
        alignment_offset: int
        min_io_size: int
        opt_io_size: int
        wce: int
        unused: int
        num_queues: int
        max_discard_sectors: int
        max_discard_seg: int
        discard_sector_alignment: int
        max_write_zeroes_sectors: int
        max_write_zeroes_seg: int
        write_zeroes_may_unmap: int
        unused1: bytes
        max_secure_erase_sectors: int
        max_secure_erase_seg: int
        secure_erase_sector_alignment: int
    else:
        _fields_ = (
            ("capacity", c_uint64),
            ("size_max", c_uint32),
            ("seg_max", c_uint32),
            ("geometry", Geometry),
            ("blk_size", c_uint32),
            ("physical_block_exp", c_uint8),
            ("alignment_offset", c_uint8),
            ("min_io_size", c_uint16),
            ("opt_io_size", c_uint32),
            ("wce", c_uint8),
            ("unused", c_uint8),
            ("num_queues", c_uint16),
            ("max_discard_sectors", c_uint32),
            ("max_discard_seg", c_uint32),
            ("discard_sector_alignment", c_uint32),
            ("max_write_zeroes_sectors", c_uint32),
            ("max_write_zeroes_seg", c_uint32),
            ("write_zeroes_may_unmap", c_uint8),
            ("unused1", c_uint8 * 3),
            ("max_secure_erase_sectors", c_uint32),
            ("max_secure_erase_seg", c_uint32),
            ("secure_erase_sector_alignment", c_uint32),
        )


class RequestHeader(Struct):
    """``struct virtio_blk_outhdr``, 16 bytes, the start of the device-readable part."""

    if TYPE_CHECKING:
        type: int
        ioprio: int
        sector: int
    else:
        _fields_ = (("type", c_uint32), ("ioprio", c_uint32), ("sector", c_uint64))


class Segment(Struct):
    """``struct virtio_blk_discard_write_zeroes``, 16 bytes, one range to discard or to zero."""

    if TYPE_CHECKING:
        sector: int
        num_sectors: int
        flags: int
    else:
        _fields_ = (("sector", c_uint64), ("num_sectors", c_uint32), ("flags", c_uint32))


# The request path decodes with struct; tests prove these equal to the structures.
HEADER: Final = struct.Struct("<I4xQ")  # type, sector; the priority is a hint
SEGMENT: Final = struct.Struct("<QII")  # sector, num_sectors, flags
