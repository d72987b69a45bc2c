"""The split virtqueue: descriptors, available ring and used ring.

Source: virtio 1.2, 2.7 "Split Virtqueues"; ``<linux/virtio_ring.h>``.
Both rings are an array between two 16-bit words before and one after it:
available ``flags, idx, ring[size], used_event``; used ``flags, idx, ring[size],
avail_event``.
"""

from __future__ import annotations

import struct
from ctypes import c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "AVAIL_ALIGN",
    "AVAIL_F_NO_INTERRUPT",
    "DESC",
    "DESC_ALIGN",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "DESC_SIZE",
    "MAX_QUEUE_SIZE",
    "RING_OFFSET",
    "USED_ALIGN",
    "USED_ELEM",
    "USED_ELEM_SIZE",
    "USED_F_NO_NOTIFY",
    "AvailHeader",
    "Desc",
    "UsedElem",
    "UsedHeader",
    "avail_size",
    "desc_size",
    "used_size",
]

MAX_QUEUE_SIZE: Final = 32768

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4

AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

DESC_ALIGN: Final = 16
AVAIL_ALIGN: Final = 2
USED_ALIGN: Final = 4


class Desc(Struct):
    """``struct vring_desc``, 16 bytes."""

    if TYPE_CHECKING:
        addr: int
        len: int
        flags: int
        next: int
    else:
        _fields_ = (
            ("addr", c_uint64),
            ("len", c_uint32),
            ("flags", c_uint16),
            ("next", c_uint16),
        )


class AvailHeader(Struct):
    """``struct vring_avail`` up to its array of 16-bit descriptor indices."""

    if TYPE_CHECKING:
        flags: int
        idx: int
    else:
        _fields_ = (("flags", c_uint16), ("idx", c_uint16))


class UsedHeader(Struct):
    """``struct vring_used`` up to its array of :class:`UsedElem`."""

    if TYPE_CHECKING:
        flags: int
        idx: int
    else:
        _fields_ = (("flags", c_uint16), ("idx", c_uint16))


class UsedElem(Struct):
    """``struct vring_used_elem``, 8 bytes."""

    if TYPE_CHECKING:
        id: int
        len: int
    else:
        _fields_ = (("id", c_uint32), ("len", c_uint32))


DESC_SIZE: Final = 16
USED_ELEM_SIZE: Final = 8
RING_OFFSET: Final = 4  # of the array in either ring
DESC: Final = struct.Struct("<QIHH")  # addr, len, flags, next
USED_ELEM: Final = struct.Struct("<II")  # id, len


def desc_size(queue_size: int) -> int:
    """Return the bytes of a descriptor table."""
    return DESC_SIZE * queue_size


def avail_size(queue_size: int) -> int:
    """Return the bytes of an available ring, ``used_event`` included."""
    return RING_OFFSET + 2 * queue_size + 2


def used_size(queue_size: int) -> int:
    """Return the bytes of a used ring, ``avail_event`` included."""
    return RING_OFFSET + USED_ELEM_SIZE * queue_size + 2
