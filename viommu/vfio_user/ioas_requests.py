"""The iommufd commands of a vfio-user client, without I/O: see :mod:`~viommu.vfio_user.requests`.

Only for a server that has them (``Capabilities.iommufd``); to choose an IOVA, it must
let its clients do so (``Capabilities.fixed_iova``).

Source: libvfio-user pull request 833; what is different here is in ``docs/iommufd.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from viommu.errors import UsageError
from viommu.spec import vfio_user_iommufd as spec
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.vfio_user.request import Request, exactly, nonsense, order, pack

if TYPE_CHECKING:
    import struct

    from viommu.vfio_user.protocol import Message

__all__ = [
    "alloc_ioas",
    "attach_ioas",
    "bind_iommufd",
    "destroy_ioas",
    "detach_ioas",
    "ioas_copy",
    "ioas_map",
    "ioas_unmap",
    "ioas_unmap_all",
]

_SPACE: Final = 1 << 64


def alloc_ioas() -> Request[int]:
    """Make an empty I/O address space; the answer is its id."""

    def decode(message: Message) -> int:
        return _unpack(message, spec.ALLOC_IOAS)[2]

    payload = pack(spec.ALLOC_IOAS, spec.ALLOC_IOAS.size, 0, 0, 0)
    return Request(IommufdCommand.ALLOC_IOAS, payload, decode, needs="iommufd")


def destroy_ioas(ioas: int) -> Request[None]:
    """Destroy an address space that the device is not attached to, with all that is mapped."""
    payload = pack(spec.DESTROY_IOAS, spec.DESTROY_IOAS.size, 0, ioas, 0)
    return order(IommufdCommand.DESTROY_IOAS, payload, needs="iommufd")


def ioas_map(
    ioas: int,
    length: int,
    *,
    fd: int,
    offset: int = 0,
    iova: int | None = None,
    readable: bool = True,
    writable: bool = True,
) -> Request[int]:
    """Map ``[offset, offset + length)`` of the file ``fd``; the answer is the IOVA.

    The server chooses it, unless ``iova`` says where it must be.
    """
    flags = _map_flags(iova, readable=readable, writable=writable)
    payload = pack(spec.IOAS_MAP, spec.IOAS_MAP.size, flags, ioas, 0, 0, length, iova or 0, offset)

    def decode(message: Message) -> int:
        return _placed(_unpack(message, spec.IOAS_MAP)[6], length, iova)

    return Request(IommufdCommand.IOAS_MAP, payload, decode, (fd,), needs=_needs(iova))


def ioas_unmap(ioas: int, iova: int, length: int) -> Request[None]:
    """Take back exactly what one :func:`ioas_map` or :func:`ioas_copy` mapped."""
    payload = pack(spec.IOAS_UNMAP, spec.IOAS_UNMAP.size, 0, ioas, 0, iova, length)
    return order(IommufdCommand.IOAS_UNMAP, payload, needs="iommufd")


def ioas_unmap_all(ioas: int) -> Request[None]:
    """Take back everything that is mapped in an address space."""
    payload = pack(spec.IOAS_UNMAP, spec.IOAS_UNMAP.size, spec.IOAS_UNMAP_F_ALL, ioas, 0, 0, 0)
    return order(IommufdCommand.IOAS_UNMAP, payload, needs="iommufd")


def ioas_copy(
    source: int,
    source_iova: int,
    length: int,
    target: int,
    *,
    iova: int | None = None,
    readable: bool | None = None,
    writable: bool | None = None,
) -> Request[int]:
    """Map in ``target`` what lies in one mapping of ``source``; the answer is the IOVA there.

    The access is the source's, unless both ``readable`` and ``writable`` are said.

    Raises:
        UsageError: Only one is said, or neither access is wanted.
    """
    if (readable is None) != (writable is None) or (readable, writable) == (False, False):
        raise UsageError(f"a copy that is readable={readable}, writable={writable}")
    flags = _map_flags(iova, readable=bool(readable), writable=bool(writable))
    payload = pack(
        spec.IOAS_COPY, spec.IOAS_COPY.size, flags, source, target, source_iova, iova or 0, length
    )

    def decode(message: Message) -> int:
        return _placed(_unpack(message, spec.IOAS_COPY)[5], length, iova)

    return Request(IommufdCommand.IOAS_COPY, payload, decode, needs=_needs(iova))


def bind_iommufd() -> Request[int]:
    """Let the device be attached, once in the life of a connection; the answer is its id."""

    def decode(message: Message) -> int:
        return _unpack(message, spec.BIND)[3]

    # Upstream wants a file descriptor's number, and does nothing with it.
    payload = pack(spec.BIND, spec.BIND.size, 0, -1, 0)
    return Request(IommufdCommand.BIND, payload, decode, needs="iommufd")


def attach_ioas(ioas: int) -> Request[None]:
    """Put the device into an address space, instead of the one that it is in."""
    payload = pack(spec.ATTACH_PT, spec.ATTACH_PT.size, 0, ioas, 0)
    return order(IommufdCommand.ATTACH_PT, payload, needs="iommufd")


def detach_ioas() -> Request[None]:
    """Take the device out of its address space."""
    payload = pack(spec.DETACH_PT, spec.DETACH_PT.size, 0, 0, 0)
    return order(IommufdCommand.DETACH_PT, payload, needs="iommufd")


def _map_flags(iova: int | None, *, readable: bool, writable: bool) -> int:
    flags = spec.MAP_F_READABLE if readable else 0
    flags |= spec.MAP_F_WRITEABLE if writable else 0
    return flags if iova is None else flags | spec.MAP_F_FIXED_IOVA


def _needs(iova: int | None) -> Literal["fixed_iova", "iommufd"]:
    return "iommufd" if iova is None else "fixed_iova"


def _unpack(message: Message, codec: struct.Struct) -> tuple[int, ...]:
    return codec.unpack(exactly(message, codec.size))


def _placed(iova: int, length: int, wanted: int | None) -> int:
    """Return where ``length`` bytes were mapped, which can be there."""
    if iova + length > _SPACE or (wanted is not None and iova != wanted):
        where = "" if wanted is None else f", {wanted:#x} was asked for"
        raise nonsense(f"{length:#x} bytes were mapped at {iova:#x}{where}")
    return iova
