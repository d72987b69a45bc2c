"""The iommufd commands as they come from a client: decoded, validated, then carried out.

Source: libvfio-user pull request 833; what is different here, and why, is in
``docs/iommufd.md``. A reply that has a payload is the request with what was asked for.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from viommu.errors import PeerError, ViommuError
from viommu.spec import vfio_user_iommufd as spec
from viommu.spec.vfio_user_iommufd import IommufdCommand

if TYPE_CHECKING:
    import struct
    from collections.abc import Callable

    from viommu.deferred import Deferred
    from viommu.memory import MappedFiles
    from viommu.vfio_user.ioas_table import IoasTable
    from viommu.vfio_user.protocol import Message

__all__ = ["IoasCommands"]


class IoasCommands:
    """Carries out one client's commands on ``table``; with ``fixed_iova`` it may choose IOVAs."""

    def __init__(self, table: IoasTable, files: MappedFiles, *, fixed_iova: bool) -> None:
        self.table = table
        self._files = files
        self._map_flags = spec.MAP_F_WRITEABLE | spec.MAP_F_READABLE
        if fixed_iova:
            self._map_flags |= spec.MAP_F_FIXED_IOVA
        self._handlers: dict[int, Callable[[Message], bytes | Deferred[None] | None]] = {
            IommufdCommand.ALLOC_IOAS: self._alloc_ioas,
            IommufdCommand.DESTROY_IOAS: self._destroy_ioas,
            IommufdCommand.IOAS_MAP: self._ioas_map,
            IommufdCommand.IOAS_UNMAP: self._ioas_unmap,
            IommufdCommand.IOAS_COPY: self._ioas_copy,
            IommufdCommand.BIND: self._bind,
            IommufdCommand.ATTACH_PT: self._attach_pt,
            IommufdCommand.DETACH_PT: self._detach_pt,
        }

    def handle(self, message: Message) -> bytes | Deferred[None] | None:
        """Do what one of the commands asks and return the payload of the reply, if it has one.

        A deferred result: the reply, which has no payload, must wait for it.

        Raises:
            PeerError: The command is refused, and nothing has changed.
        """
        return self._handlers[message.command](message)

    def _alloc_ioas(self, message: Message) -> bytes:
        _, _, reserved = _decode(message, spec.ALLOC_IOAS)
        _must_be_zero("reserved", reserved)
        return spec.ALLOC_IOAS.pack(spec.ALLOC_IOAS.size, 0, self.table.alloc(), 0)

    def _destroy_ioas(self, message: Message) -> None:
        _, ioas, reserved = _decode(message, spec.DESTROY_IOAS)
        _must_be_zero("reserved", reserved)
        self.table.destroy(ioas)

    def _ioas_map(self, message: Message) -> bytes:
        flags, ioas, reserved, user_va, length, iova, offset = _decode(
            message, spec.IOAS_MAP, self._map_flags
        )
        _must_be_zero("reserved", reserved)
        _must_not_be_zero("length", length)
        readable, writable = _access(flags)
        if not (readable or writable):
            raise _invalid("a mapping that can neither be read nor written")
        if len(message.fds) != 1:
            raise _invalid(f"{len(message.fds)} file descriptors instead of one")
        wanted = iova if flags & spec.MAP_F_FIXED_IOVA else None
        file = self._files.get(message.fds[0], offset, length, writable=writable)
        try:
            iova = self.table.map(
                ioas, length, file, offset, readable=readable, writable=writable, iova=wanted
            )
        except ViommuError:
            file.close()
            raise
        return spec.IOAS_MAP.pack(spec.IOAS_MAP.size, flags, ioas, 0, user_va, length, iova, offset)

    def _ioas_unmap(self, message: Message) -> Deferred[None] | None:
        flags, ioas, reserved, iova, length = _decode(
            message, spec.IOAS_UNMAP, spec.IOAS_UNMAP_F_ALL
        )
        _must_be_zero("reserved", reserved)
        if not flags:
            return self.table.unmap(ioas, iova, length)
        if iova or length:
            raise _invalid(f"everything, but also [{iova:#x}, {iova + length:#x})")
        return self.table.unmap_all(ioas)

    def _ioas_copy(self, message: Message) -> bytes:
        flags, source, target, source_iova, iova, length = _decode(
            message, spec.IOAS_COPY, self._map_flags
        )
        _must_not_be_zero("length", length)
        # Upstream has no flags here: without any a copy has the access of what is copied.
        readable, writable = _access(flags)
        named = readable or writable
        iova = self.table.copy(
            source,
            source_iova,
            length,
            target,
            readable=readable if named else None,
            writable=writable if named else None,
            iova=iova if flags & spec.MAP_F_FIXED_IOVA else None,
        )
        return spec.IOAS_COPY.pack(
            spec.IOAS_COPY.size, flags, source, target, source_iova, iova, length
        )

    def _bind(self, message: Message) -> bytes:
        _, iommufd, _ = _decode(message, spec.BIND)  # a number that means nothing here
        return spec.BIND.pack(spec.BIND.size, 0, iommufd, self.table.bind())

    def _attach_pt(self, message: Message) -> Deferred[None] | None:
        flags, ioas, pasid = _decode(message, spec.ATTACH_PT, spec.ATTACH_PT_F_PASID)
        _must_be_without_pasid(flags & spec.ATTACH_PT_F_PASID, pasid)
        return self.table.attach(ioas)

    def _detach_pt(self, message: Message) -> Deferred[None] | None:
        flags, pasid, reserved = _decode(message, spec.DETACH_PT, spec.DETACH_PT_F_PASID)
        _must_be_zero("reserved", reserved)
        _must_be_without_pasid(flags & spec.DETACH_PT_F_PASID, pasid)
        return self.table.detach()


def _decode(message: Message, codec: struct.Struct, known_flags: int = 0) -> tuple[int, ...]:
    """Return the fields of a payload without ``argsz``, which like ``flags`` is validated."""
    if len(message.payload) < codec.size:
        raise _invalid(f"{len(message.payload)} bytes of payload, {codec.size} are needed")
    argsz, *fields = codec.unpack_from(message.payload)
    if argsz < codec.size:
        raise _invalid(f"argsz {argsz} is less than {codec.size}")
    if fields[0] & ~known_flags:
        raise _invalid(f"flags {fields[0]:#x} are not known")
    return tuple(fields)


def _access(flags: int) -> tuple[bool, bool]:
    return bool(flags & spec.MAP_F_READABLE), bool(flags & spec.MAP_F_WRITEABLE)


def _must_be_zero(name: str, value: int) -> None:
    if value:
        raise _invalid(f"{name} is {value:#x} instead of 0")


def _must_not_be_zero(name: str, value: int) -> None:
    if not value:
        raise _invalid(f"{name} is 0")


def _must_be_without_pasid(flag: int, pasid: int) -> None:
    if flag:
        raise PeerError(errno.ENOTSUP, f"PASID {pasid:#x}: no device here has PASIDs")
    _must_be_zero("pasid", pasid)


def _invalid(why: str) -> PeerError:
    return PeerError(errno.EINVAL, why)
