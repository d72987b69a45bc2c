"""The memory mapper of devices behind iommufd: a domain is an I/O address space (IOAS).

The first group of a domain makes an IOAS, is attached to it, and only then maps
into it: an IOAS without a device accepts anything, and the next ATTACH would have
to pay for that. A further group joins with one ioctl, and nothing is mapped twice.
A group that comes from another domain is moved in one step. RAM is pinned once,
however many domains have it: see :mod:`viommu_backends.iommufd_memory`.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from viommu.errors import BackendError, InternalError
from viommu.mapper import AddMapResult, MappingInfo, RemoveMapResult, next_mapper_id
from viommu_backends.host_mapper import HostTarget, NoExports

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from viommu.errors import Access
    from viommu.events import Event
    from viommu.mapper import MemoryMapper
    from viommu_backends.host_map import Piece
    from viommu_backends.iommufd_memory import IommufdMemory
    from viommu_backends.vfio_device import VfioDevice

__all__ = ["IommufdMapper"]

_log: Final = logging.getLogger(__name__)

_PAGE: Final = os.sysconf("SC_PAGESIZE")


class _IoasSpace:
    """An IOAS as :class:`~viommu_backends.host_map.HostSpace`."""

    page_size = _PAGE

    def __init__(self, memory: IommufdMemory) -> None:
        self._memory = memory
        self.number = memory.context.alloc_ioas()

    def map(self, iova: int, piece: Piece, prot: Access) -> None:
        """Map a piece."""
        self._memory.map(self.number, iova, piece, prot)

    def unmap(self, iova: int, size: int) -> None:
        """Remove one entry."""
        self._memory.unmap(self.number, iova, size)

    def destroy(self) -> None:
        """Destroy the IOAS; no device is attached to it."""
        self._memory.context.destroy(self.number)


class _Ioas(HostTarget):
    """The IOAS of one domain, shared by its groups; it follows guest memory while it lives."""

    def __init__(self, memory: IommufdMemory) -> None:
        self.space = _IoasSpace(memory)
        super().__init__(self.space)
        self.id = next_mapper_id()
        self._users = 1
        try:
            self._registration = memory.register(self, f"iommufd IOAS {self.space.number}")
        except BaseException:
            self.space.destroy()
            raise

    def share(self) -> _Ioas:
        """Take one more use."""
        self._users += 1
        return self

    def leave(self) -> None:
        """Give one use back; with the last one everything is unmapped and destroyed."""
        self._users -= 1
        if self._users:
            return
        self._registration.release()
        self.host.clear()
        self.space.destroy()


class IommufdMapper(NoExports):
    """Maps guest memory for the devices of one group; satisfies the contract of a mapper.

    The devices are bound to the context of ``memory``, and blocked until something is mapped.
    """

    def __init__(self, memory: IommufdMemory, devices: Sequence[VfioDevice]) -> None:
        self.memory = memory
        self.devices = tuple(devices)
        self._id = next_mapper_id()
        self._ioas: _Ioas | None = None

    @property
    def ioas(self) -> int | None:
        """The kernel's number of the IOAS that the group is in, ``None`` while it is blocked."""
        return self._ioas.space.number if self._ioas else None

    def mappings(self) -> list[MappingInfo]:
        """Return what the guest mapped for this domain (for inspection)."""
        return self._ioas.host.mappings() if self._ioas else []

    def entries(self) -> list[MappingInfo]:
        """Return what the IOAS holds (for inspection)."""
        return self._ioas.host.entries() if self._ioas else []

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Map; see the contract. The first mapping makes an IOAS."""
        made = self._ioas is None
        ioas = self.enter()
        try:
            added = ioas.host.add(mapping)
        except BackendError:
            if made:
                self.reset_domain()
            raise
        return AddMapResult.OK if added else AddMapResult.OVERLAP_FAILURE

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Unmap; see the contract. When it returns no device reaches the memory any more."""
        if self._ioas is None:
            return RemoveMapResult(ok=True)
        removed = self._ioas.host.remove(iova_start, iova_start + size)
        return RemoveMapResult(ok=removed is not None)

    def get_mask(self) -> int:
        """Return every multiple of the page: the kernel picks the largest that fit."""
        return -_PAGE & (1 << 64) - 1

    def supports_detach(self) -> bool:
        """Return true: DETACH blocks the group."""
        return True

    def id(self) -> int:
        """Return the number of the space that the group is in, or of the mapper alone."""
        return self._ioas.id if self._ioas else self._id

    def join(self, other: MemoryMapper) -> bool:
        """Attach to the IOAS of ``other``: one ioctl a device, whatever is mapped."""
        if not isinstance(other, IommufdMapper) or other.memory is not self.memory:
            return False
        if self._ioas is not None and len(self._ioas.host):
            raise InternalError("a mapper joins another while it has mappings")
        self._move_to(other.enter().share())
        return True

    def switch(self, mappings: Iterable[MappingInfo], mates: Iterable[MemoryMapper]) -> bool:
        """Go from one IOAS to another in one step (REPLACE); see the contract.

        A new one is filled while nothing is attached: what can't be mapped for these
        devices then makes the attach fail, which keeps the old one, and nobody
        else will ever be attached to it.
        """
        if self._ioas is None:
            return False
        try:
            for mate in mates:
                if isinstance(mate, IommufdMapper) and mate.memory is self.memory:
                    self._move_to(mate.enter().share())
                    return True
            ioas = _Ioas(self.memory)
            try:
                for mapping in mappings:
                    ioas.host.add(mapping)
            except BackendError:
                ioas.leave()
                raise
            self._move_to(ioas)
        except BackendError as error:
            _log.info("a domain is not entered in one step: %s", error)
            return False
        return True

    def reset_domain(self) -> Event | None:
        """Leave the IOAS; what others have mapped there stays."""
        if self._ioas is not None:
            for device in self.devices:
                device.detach()
            ioas, self._ioas = self._ioas, None
            ioas.leave()
        return None

    def enter(self) -> _Ioas:
        """Return the IOAS that the devices are attached to, made now if there is none."""
        if self._ioas is None:
            self._move_to(_Ioas(self.memory))
        assert self._ioas is not None  # noqa: S101 - mypy does not look into calls
        return self._ioas

    def _move_to(self, ioas: _Ioas) -> None:
        """Attach every device to ``ioas`` and leave the old one. Takes over a use of it."""
        try:
            self._attach(ioas)
        except BackendError:
            ioas.leave()
            raise
        before, self._ioas = self._ioas, ioas
        if before is not None:
            try:
                before.leave()
            except BackendError as error:
                # No device is attached to it: it can do no harm, and ends with the context.
                _log.warning("an address space that was left stays: %s", error)

    def _attach(self, ioas: _Ioas) -> None:
        """Attach every device, in place of what it was attached to, or none."""
        for number, device in enumerate(self.devices):
            try:
                device.attach(ioas.space.number)
            except BackendError:
                for earlier in self.devices[:number]:
                    if self._ioas is None:
                        earlier.detach()
                    else:
                        earlier.attach(self._ioas.space.number)
                raise

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken."""
        if self._ioas is not None:
            self._ioas.host._check()  # noqa: SLF001 - the invariants of our own part
