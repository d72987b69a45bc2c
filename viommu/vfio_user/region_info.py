"""What a region is, as DEVICE_GET_REGION_INFO says it: both directions of the payload."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.errors import PeerError
from viommu.spec import vfio
from viommu.vfio_user.served import RegionInfo

if TYPE_CHECKING:
    import struct

__all__ = ["decode_region_info", "encode_region_info"]


def encode_region_info(info: RegionInfo, index: int, argsz: int) -> tuple[bytes, bool]:
    """Return the payload for a client that accepts ``argsz`` bytes, and whether it is complete.

    When the areas don't fit they are left out; the client learns from the
    payload's own ``argsz`` how much to accept when it asks again.
    """
    flags, cap_offset, caps = info.flags, 0, b""
    if info.areas:
        caps = vfio.SPARSE_MMAP.pack(
            vfio.REGION_INFO_CAP_SPARSE_MMAP,
            vfio.REGION_INFO_CAP_SPARSE_MMAP_VERSION,
            0,
            len(info.areas),
            0,
        )
        caps += b"".join(vfio.SPARSE_MMAP_AREA.pack(*area) for area in info.areas)
    needed = vfio.REGION_INFO.size + len(caps)
    complete = needed <= argsz
    if not complete:
        caps = b""
    elif caps:
        flags, cap_offset = flags | vfio.REGION_INFO_FLAG_CAPS, vfio.REGION_INFO.size
    head = vfio.REGION_INFO.pack(needed, flags, index, cap_offset, info.size, info.offset)
    return head + caps, complete


def decode_region_info(payload: bytes, index: int) -> tuple[int, RegionInfo]:
    """Return the argsz that the whole answer needs, and the answer without file descriptor.

    Raises:
        PeerError: EPROTO, the payload is not an answer about region ``index``.
    """
    argsz, flags, number, cap_offset, size, offset = _unpack(vfio.REGION_INFO, payload, 0)
    if number != index:
        raise _nonsense(f"information on region {number} instead of {index}")
    areas: tuple[tuple[int, int], ...] = ()
    seen = 0
    while flags & vfio.REGION_INFO_FLAG_CAPS and cap_offset:
        if cap_offset <= seen:  # offsets must grow, or a malicious chain would never end
            raise _nonsense(f"capability at {cap_offset} after the one at {seen}")
        seen = cap_offset
        kind, _, cap_offset = _unpack(vfio.CAP_HEADER, payload, seen)
        if kind == vfio.REGION_INFO_CAP_SPARSE_MMAP:
            areas = _decode_areas(payload, seen)
    flags &= ~vfio.REGION_INFO_FLAG_CAPS
    return argsz, RegionInfo(size, flags, None, offset, areas)


def _decode_areas(payload: bytes, offset: int) -> tuple[tuple[int, int], ...]:
    *_, count, _ = _unpack(vfio.SPARSE_MMAP, payload, offset)
    first, step = offset + vfio.SPARSE_MMAP.size, vfio.SPARSE_MMAP_AREA.size
    if count > (len(payload) - first) // step:
        raise _nonsense(f"{count} areas in {len(payload)} bytes")
    areas = payload[first : first + count * step]
    return tuple((start, size) for start, size in vfio.SPARSE_MMAP_AREA.iter_unpack(areas))


def _unpack(codec: struct.Struct, payload: bytes, offset: int) -> tuple[int, ...]:
    if offset + codec.size > len(payload):
        raise _nonsense(f"{codec.size} bytes at {offset} of {len(payload)}")
    return codec.unpack_from(payload, offset)


def _nonsense(why: str) -> PeerError:
    return PeerError(errno.EPROTO, f"region information: {why}")
