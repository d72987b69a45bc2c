"""The I/O address spaces of one client, and which of them its device does DMA in.

Outside this module a space is an id; inside, the device is in the space
``_attached`` and in no other. All errors are a :exc:`~viommu.errors.PeerError`.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from viommu.deferred import Deferred
from viommu.errors import InternalError, PeerError, ViommuError
from viommu.memory import GuestMemory, MemoryRegion
from viommu.vfio_user.ioas import Ioas

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.memory import MappedFile

__all__ = ["IoasLimits", "IoasTable"]

_MAX_ID: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class IoasLimits:
    """What one client may hold, and where the IOVAs come from that it does not choose."""

    max_ioas: int = 256
    #: In all of them together.
    max_mappings: int = 65535
    #: Half-open ranges that don't touch. Not the first mebibyte, so that 0 is no address;
    #: not the page of x86 interrupts; low addresses first, for devices with few bits.
    apertures: tuple[tuple[int, int], ...] = ((1 << 20, 0xFEE0_0000), (0xFEF0_0000, 1 << 47))


class IoasTable:
    """What a client made of the iommufd commands, for one device with ``memory``.

    ``memory`` is what the device sees: the IOAS that it is attached to, or else what
    the client maps without any, which goes to :attr:`legacy` and is kept aside while
    the device is attached. Ids are never 0 and never used twice.
    """

    def __init__(self, memory: GuestMemory, limits: IoasLimits) -> None:
        self._memory = memory
        self._limits = limits
        self._spaces: dict[int, Ioas] = {}
        self._mappings = 0
        self._last_id = 0
        self._bound = False
        self._attached: Ioas | None = None
        self._aside = GuestMemory()  # legacy mappings that the device can't see now
        self._closed = False

    @property
    def legacy(self) -> GuestMemory:
        """Return where memory goes that the client maps without an IOAS."""
        return self._memory if self._attached is None else self._aside

    @property
    def attached(self) -> int | None:
        """Return the id of the IOAS that the device is attached to."""
        return None if self._attached is None else self._attached.id

    def alloc(self) -> int:
        """Make an empty IOAS and return its id.

        Raises:
            PeerError: ENOSPC, there are too many.
        """
        if len(self._spaces) >= self._limits.max_ioas:
            raise PeerError(errno.ENOSPC, f"more than {self._limits.max_ioas} IOASes")
        ident = self._new_id()
        self._spaces[ident] = Ioas(ident, self._limits.apertures)
        return ident

    def destroy(self, ioas: int) -> None:
        """Destroy an IOAS and all that is mapped there.

        Raises:
            PeerError: ENOENT, there is none; EBUSY, the device is attached to it.
        """
        space = self._find(ioas)
        if space is self._attached:
            raise PeerError(errno.EBUSY, f"the device is attached to IOAS {ioas}")
        self._empty(space)
        del self._spaces[ioas]

    def map(
        self,
        ioas: int,
        size: int,
        file: MappedFile,
        offset: int,
        *,
        readable: bool,
        writable: bool,
        iova: int | None = None,
    ) -> int:
        """Map a part of ``file`` and return the IOVA; for the use of ``file`` see :meth:`Ioas.map`.

        Raises:
            PeerError: ENOENT, no such IOAS; ENOSPC, too many mappings, or as
                :meth:`Ioas.map`.
        """
        space = self._find(ioas)
        if self._mappings >= self._limits.max_mappings:
            raise PeerError(errno.ENOSPC, f"more than {self._limits.max_mappings} mappings")
        iova = space.map(size, file, offset, readable=readable, writable=writable, iova=iova)
        if space is self._attached:
            region = MemoryRegion(iova, size, readable, writable, file, offset)
            try:
                _tell(self._memory, region)
            except ViommuError:
                space.unmap(iova, size)
                raise
        self._mappings += 1
        return iova

    def unmap(self, ioas: int, iova: int, size: int) -> Deferred[None] | None:
        """Remove one mapping; a result means that the device has still to let go of it.

        Raises:
            PeerError: ENOENT, no such IOAS, or no mapping is exactly that.
        """
        space = self._find(ioas)
        space.unmap(iova, size).file.close()
        self._mappings -= 1
        return self._memory.unmap(iova, size) if space is self._attached else None

    def unmap_all(self, ioas: int) -> Deferred[None] | None:
        """Remove every mapping, of which there need be none; the result is as of :meth:`unmap`.

        Raises:
            PeerError: ENOENT, no such IOAS.
        """
        space = self._find(ioas)
        self._empty(space)
        return self._memory.unmap_all() if space is self._attached else None

    def copy(
        self,
        source: int,
        source_iova: int,
        size: int,
        target: int,
        *,
        readable: bool | None = None,
        writable: bool | None = None,
        iova: int | None = None,
    ) -> int:
        """Map in ``target`` what a mapping of ``source`` has in a range, and return the IOVA.

        The access is the source's unless said, and never more.

        Raises:
            PeerError: ENOENT, no such IOAS, or the range is not in one mapping;
                EPERM, more access than there; or as :meth:`map`.
        """
        mapping = self._find(source).find(source_iova, size)
        readable = mapping.readable if readable is None else readable
        writable = mapping.writable if writable is None else writable
        if (readable and not mapping.readable) or (writable and not mapping.writable):
            raise PeerError(errno.EPERM, f"more access than {source_iova:#x} has in IOAS {source}")
        offset = mapping.offset + source_iova - mapping.iova
        file = mapping.file.retain()
        try:
            return self.map(
                target, size, file, offset, readable=readable, writable=writable, iova=iova
            )
        except ViommuError:
            file.close()
            raise

    def bind(self) -> int:
        """Let the device be attached, from now on, and return its id.

        Raises:
            PeerError: EEXIST, it was bound before.
        """
        if self._bound:
            raise PeerError(errno.EEXIST, "the device is bound already")
        ident = self._new_id()
        self._bound = True
        return ident

    def attach(self, ioas: int) -> Deferred[None] | None:
        """Put the device into an IOAS, instead of the one that it is in.

        It is there on return, unless it has to let go of where it was: then once the
        result is there.

        Raises:
            PeerError: EINVAL, the device is not bound; ENOENT, no such IOAS.
        """
        self._must_be_bound()
        return self._move(self._find(ioas))

    def detach(self) -> Deferred[None] | None:
        """Take the device out of its IOAS: it sees what is in :attr:`legacy`.

        Raises:
            PeerError: EINVAL, it is not bound, or in none.
        """
        self._must_be_bound()
        if self._attached is None:
            raise PeerError(errno.EINVAL, "the device is attached to no IOAS")
        return self._move(None)

    def close(self) -> None:
        """Forget everything: the client has gone. What the device sees is others' to unmap."""
        self._closed = True
        self._attached = None
        for space in self._spaces.values():
            self._empty(space)
        self._spaces.clear()
        self._aside.unmap_all()

    def _new_id(self) -> int:
        if self._last_id >= _MAX_ID:
            raise PeerError(errno.ENOSPC, "every id has been used")
        self._last_id += 1
        return self._last_id

    def _find(self, ioas: int) -> Ioas:
        space = self._spaces.get(ioas)
        if space is None:
            raise PeerError(errno.ENOENT, f"there is no IOAS {ioas}")
        return space

    def _must_be_bound(self) -> None:
        if not self._bound:
            raise PeerError(errno.EINVAL, "the device is not bound")

    def _empty(self, space: Ioas) -> None:
        for mapping in space.clear():
            mapping.file.close()
            self._mappings -= 1

    def _move(self, target: Ioas | None) -> Deferred[None] | None:
        """Let the device lose the space that it is in, then see ``target``."""
        if target is self._attached:
            return None
        if self._attached is None:
            _tell_all(self._aside, self._memory.regions())
        leaving = self._memory.unmap_all()
        if leaving is None:
            self._enter(target)
            return None
        entered: Deferred[None] = Deferred()
        leaving.then(partial(self._left, target, entered))
        return entered

    def _left(self, target: Ioas | None, entered: Deferred[None], leaving: Deferred[None]) -> None:
        """Go on with :meth:`_move`: the device has let go, or never will."""
        if self._closed:
            return
        try:
            self._enter(target, leaving)
        except ViommuError as error:
            entered.refuse(error)
        else:
            entered.resolve(None)

    def _enter(self, target: Ioas | None, leaving: Deferred[None] | None = None) -> None:
        """Show ``target`` to the device, which sees nothing; on failure what it saw before."""
        try:
            if leaving is not None:
                leaving.result()
            _tell_all(self._memory, self._regions(target))
        except ViommuError:
            _tell_all(self._memory, self._regions(self._attached))
            if self._attached is None:
                self._aside.unmap_all()
            raise
        self._attached = target
        if target is None:
            self._aside.unmap_all()

    def _regions(self, space: Ioas | None) -> list[MemoryRegion]:
        return self._aside.regions() if space is None else space.regions()

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        for ident, space in self._spaces.items():
            space._check()  # noqa: SLF001 - one check of the whole, part by part
            if ident != space.id or not 0 < ident <= self._last_id:
                raise InternalError(f"IOAS {space.id} is filed as {ident}")
        if sum(len(space) for space in self._spaces.values()) != self._mappings:
            raise InternalError(f"there are not {self._mappings} mappings")
        if self._attached is None:
            if self._aside.regions():
                raise InternalError("memory is kept aside without need")
        elif self._attached.regions() != self._memory.regions():
            raise InternalError(f"the device does not see IOAS {self.attached}")


def _tell(memory: GuestMemory, region: MemoryRegion) -> None:
    """Add ``region`` to ``memory``, with a use of its file of its own."""
    file = region.file
    if file is not None:
        file.retain()
    try:
        memory.map(
            region.gpa,
            region.size,
            readable=region.readable,
            writable=region.writable,
            file=file,
            offset=region.offset,
        )
    except ViommuError:
        if file is not None:
            file.close()
        raise


def _tell_all(memory: GuestMemory, regions: Iterable[MemoryRegion]) -> None:
    """Add all ``regions`` to ``memory``, which is empty, or none."""
    try:
        for region in regions:
            _tell(memory, region)
    except ViommuError:
        memory.unmap_all()
        raise
