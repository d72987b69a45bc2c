"""Payloads of the iommufd commands, right unless a test says what is wrong with them."""

from __future__ import annotations

from viommu.spec import vfio_user_iommufd as spec
from viommu.vfio_user.protocol import Capabilities, encode_version

WRITEABLE, READABLE, FIXED = (
    spec.MAP_F_WRITEABLE,
    spec.MAP_F_READABLE,
    spec.MAP_F_FIXED_IOVA,
)
RW = WRITEABLE | READABLE


def hello(*, iommufd: bool = True, fixed_iova: bool = True) -> bytes:
    """A VERSION that offers the commands, and to choose IOVAs."""
    return encode_version(1, Capabilities(8, iommufd=iommufd, fixed_iova=fixed_iova))


def alloc_ioas(*, argsz: int = 16, flags: int = 0, out: int = 0, reserved: int = 0) -> bytes:
    return spec.ALLOC_IOAS.pack(argsz, flags, out, reserved)


def destroy_ioas(ioas: int, *, argsz: int = 16, flags: int = 0, reserved: int = 0) -> bytes:
    return spec.DESTROY_IOAS.pack(argsz, flags, ioas, reserved)


def ioas_map(
    ioas: int,
    length: int,
    *,
    flags: int = RW,
    iova: int = 0,
    offset: int = 0,
    user_va: int = 0,
    argsz: int = 48,
    reserved: int = 0,
) -> bytes:
    return spec.IOAS_MAP.pack(argsz, flags, ioas, reserved, user_va, length, iova, offset)


def ioas_unmap(
    ioas: int, iova: int, length: int, *, flags: int = 0, argsz: int = 32, reserved: int = 0
) -> bytes:
    return spec.IOAS_UNMAP.pack(argsz, flags, ioas, reserved, iova, length)


def ioas_copy(
    source: int,
    source_iova: int,
    length: int,
    target: int,
    *,
    flags: int = 0,
    iova: int = 0,
    argsz: int = 40,
) -> bytes:
    return spec.IOAS_COPY.pack(argsz, flags, source, target, source_iova, iova, length)


def bind(*, argsz: int = 16, flags: int = 0, iommufd: int = -1, out: int = 0) -> bytes:
    return spec.BIND.pack(argsz, flags, iommufd, out)


def attach_pt(ioas: int, *, argsz: int = 16, flags: int = 0, pasid: int = 0) -> bytes:
    return spec.ATTACH_PT.pack(argsz, flags, ioas, pasid)


def detach_pt(*, argsz: int = 16, flags: int = 0, pasid: int = 0, reserved: int = 0) -> bytes:
    return spec.DETACH_PT.pack(argsz, flags, pasid, reserved)
