"""An address space of a vfio-user device: what it was told is where, and what it said to that.

Every device has one space, of which it is told by DMA_MAP and DMA_UNMAP. One that has I/O
address spaces (IOAS) in which we may choose the IOVAs has any number of these, and is
attached to one of them, or to none. Ranges are half-open.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Literal, Protocol

from viommu.errors import Access, BackendError, PeerError, ViommuError
from viommu.memory.dma_target import AddressRange, require_file
from viommu.vfio_user import ioas_requests, requests
from viommu_backends.bar_file import BarFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.vfio_user.requests import Request
    from viommu_backends.host_map import Piece
    from viommu_backends.vfio_user.orders import OrderQueue

__all__ = ["DeviceSpace", "Entry", "IoasSpace", "MemoryMode", "SpaceOwner", "Step"]

#: Whether a device is given file descriptors of guest memory, or has to ask us for every byte.
MemoryMode = Literal["shared", "message"]


class Entry:
    """A range that the device was told of, or will be."""

    __slots__ = ("accepted", "iova", "order", "piece", "prot", "unmap_error")

    def __init__(self, iova: int, piece: Piece, prot: Access) -> None:
        self.iova = iova
        self.piece = piece
        self.prot = prot
        #: What the device said to it; ``None`` while that is to come.
        self.accepted: bool | None = None
        self.order: _Map | None = None
        self.unmap_error: ViommuError | None = None


class SpaceOwner(Protocol):
    """Who has the spaces of a device; told of what the device answered from the loop."""

    @property
    def memory(self) -> MemoryMode:
        """What the device gets of guest memory."""

    @property
    def page_size(self) -> int:
        """The smallest page that the device can be told of."""

    @property
    def orders(self) -> OrderQueue:
        """What the device is asked."""

    #: The IOAS that the device is in.
    attached: IoasSpace | None

    def check_room(self) -> None:
        """Raise BackendError ENOSPC if the device knows of as many ranges as it takes."""

    def entry_refused(self, space: DeviceSpace, entry: Entry, error: BackendError) -> None:
        """Hear that the device does not have ``entry``, which nobody has unmapped."""

    def space_refused(self, space: IoasSpace, error: BackendError) -> None:
        """Hear that there is no such IOAS, or that the device is not in it."""

    def entered(self, space: IoasSpace) -> None:
        """Hear that the device is in this IOAS now, and no other."""

    def distrust(self, what: str, error: ViommuError) -> None:
        """Cut off a device that has not let go of ``what`` was taken from it."""


class DeviceSpace:
    """The space of DMA_MAP, as :class:`~viommu_backends.host_map.HostSpace`.

    Without a device everything is recorded, and nothing else.
    """

    def __init__(self, owner: SpaceOwner) -> None:
        self._owner = owner
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        """Return how many ranges there are."""
        return len(self._entries)

    @property
    def page_size(self) -> int:
        """The smallest page."""
        return self._owner.page_size

    def map(self, iova: int, piece: Piece, prot: Access) -> None:
        """Tell the device of a piece.

        Raises:
            BackendError: ENOSPC, it knows of as many as it takes; EOPNOTSUPP, there is no
                file that could be shared; EMFILE, no file descriptor is left here.
        """
        if self._owner.memory == "shared":
            file = require_file(AddressRange(piece.gpa, piece.gpa + piece.size), piece.file)
            if isinstance(file, BarFile):
                # Its descriptor is that of the whole device, with everything it can do.
                raise BackendError(
                    errno.EOPNOTSUPP, f"BAR at {piece.gpa:#x}, to share it with another process"
                )
        self._owner.check_room()
        self._owner.orders.prepare()
        entry = self._entries[iova] = Entry(iova, piece, prot)
        entry.order = _Map(self, entry)
        self._owner.orders.add(entry.order)

    def unmap(self, iova: int, size: int) -> None:
        """Take a range back; never raises: a device that keeps it is cut off."""
        del size
        entry = self._entries.pop(iova)
        if entry.order is None or not self._owner.orders.cancel(entry.order):
            self._owner.orders.add(_Unmap(self, entry))

    def leave(self) -> None:
        """Take everything back; nothing will be mapped here any more."""
        for iova in [*self._entries]:
            self.unmap(iova, self._entries[iova].piece.size)

    # -- what orders ask for, and make of the answer --

    def map_request(self, entry: Entry) -> Request[Any] | None:
        """Return what tells the device of ``entry``; ``None`` if that is in vain."""
        return requests.dma_map(
            entry.iova,
            entry.piece.size,
            fd=self._file_of(entry),
            offset=entry.piece.offset if self._owner.memory == "shared" else 0,
            readable=Access.READ in entry.prot,
            writable=Access.WRITE in entry.prot,
        )

    def unmap_request(self, entry: Entry) -> Request[Any] | None:
        """Return what takes ``entry`` back from the device."""
        return requests.dma_unmap(entry.iova, entry.piece.size)

    def mapped(self, entry: Entry) -> None:
        """Take note that the device has an entry."""
        entry.accepted, entry.order = True, None
        if entry.unmap_error is not None:
            self._owner.distrust(_name(entry), entry.unmap_error)

    def map_refused(self, entry: Entry, error: ViommuError) -> None:
        """Take note that the device does not have an entry."""
        entry.accepted, entry.order = False, None
        if self._entries.get(entry.iova) is entry:
            del self._entries[entry.iova]
            self._owner.entry_refused(self, entry, _as_backend_error(_name(entry), error))

    def unmap_refused(self, entry: Entry, error: ViommuError) -> None:
        """Have the device cut off, unless it has never had the entry."""
        if entry.accepted:
            self._owner.distrust(_name(entry), error)
        elif entry.accepted is None:
            entry.unmap_error = error  # answers may come in any order

    def _file_of(self, entry: Entry) -> int | None:
        if self._owner.memory == "message" or entry.piece.file is None:
            return None
        return entry.piece.file.fileno()


class IoasSpace(DeviceSpace):
    """An IOAS of the device, made when it is :meth:`open`'ed.

    ``number`` is the device's name for it, ``failed`` why it can't be used.
    """

    def __init__(self, owner: SpaceOwner) -> None:
        super().__init__(owner)
        self.number: int | None = None
        self.failed: BackendError | None = None
        self._alloc: Step | None = None
        self._attach: Step | None = None
        self._whole = False

    @property
    def opened(self) -> bool:
        """Whether the device was asked for it."""
        return self._alloc is not None

    def open(self) -> None:
        """Make the IOAS. Nothing is mapped before."""
        self._alloc = Step(ioas_requests.alloc_ioas, self._allocated, self._step_refused)
        self._owner.orders.add(self._alloc)

    def enter(self, *, whole: bool = False) -> None:
        """Put the device into it, from where it is in one step.

        Not if it is :meth:`spoil`'ed before, when it must be entered as a ``whole``.
        """
        self._whole = whole

        def request() -> Request[Any] | None:
            if self.number is None or self.failed is not None:
                return None
            return ioas_requests.attach_ioas(self.number)

        self._attach = Step(request, lambda _: self._owner.entered(self), self._step_refused)
        self._owner.orders.add(self._attach)

    def spoil(self, error: BackendError) -> None:
        """Take note that something is missing here."""
        if self._whole and self._owner.attached is not self:
            self.failed = error

    def leave(self) -> None:
        """Take the device out of it, if it is in there, and destroy it with all that is mapped."""
        orders = self._owner.orders
        for entry in self._entries.values():
            if entry.order is not None:
                orders.cancel(entry.order)
        self._entries.clear()
        if self._attach is not None:
            orders.cancel(self._attach)
        if self._alloc is not None and not orders.cancel(self._alloc):
            orders.add(Step(self._detach_request, self._detached, self._not_left))
            orders.add(Step(self._destroy_request, self._destroyed, self._not_left))

    def map_request(self, entry: Entry) -> Request[Any] | None:
        """Return what maps ``entry`` here."""
        fd = self._file_of(entry)
        if self.number is None or fd is None:
            return None
        return ioas_requests.ioas_map(
            self.number,
            entry.piece.size,
            fd=fd,
            offset=entry.piece.offset,
            iova=entry.iova,
            readable=Access.READ in entry.prot,
            writable=Access.WRITE in entry.prot,
        )

    def unmap_request(self, entry: Entry) -> Request[Any] | None:
        """Return what unmaps ``entry`` here."""
        if self.number is None:
            return None
        return ioas_requests.ioas_unmap(self.number, entry.iova, entry.piece.size)

    def _allocated(self, number: int) -> None:
        self.number = number

    def _step_refused(self, error: ViommuError) -> None:
        self.failed = _as_backend_error("an I/O address space", error)
        self._owner.space_refused(self, self.failed)

    def _detach_request(self) -> Request[Any] | None:
        return ioas_requests.detach_ioas() if self._owner.attached is self else None

    def _detached(self, _: None) -> None:
        self._owner.attached = None

    def _destroy_request(self) -> Request[Any] | None:
        return None if self.number is None else ioas_requests.destroy_ioas(self.number)

    def _destroyed(self, _: None) -> None:
        self.number = None

    def _not_left(self, error: ViommuError) -> None:
        self._owner.distrust(f"IOAS {self.number}", error)


class _Map:
    """Tells a device of an entry."""

    __slots__ = ("_entry", "_space")
    barrier = False

    def __init__(self, space: DeviceSpace, entry: Entry) -> None:
        self._space = space
        self._entry = entry

    def request(self) -> Request[Any] | None:
        return self._space.map_request(self._entry)

    def done(self, _: None) -> None:
        self._space.mapped(self._entry)

    def refused(self, error: ViommuError) -> None:
        self._space.map_refused(self._entry, error)


class _Unmap:
    """Takes an entry back, unless the device has never had it."""

    __slots__ = ("_entry", "_space")
    barrier = False

    def __init__(self, space: DeviceSpace, entry: Entry) -> None:
        self._space = space
        self._entry = entry

    def request(self) -> Request[Any] | None:
        return None if self._entry.accepted is False else self._space.unmap_request(self._entry)

    def done(self, _: None) -> None:
        pass

    def refused(self, error: ViommuError) -> None:
        self._space.unmap_refused(self._entry, error)


class Step:
    """A step in the life of an IOAS, which what follows depends on."""

    __slots__ = ("done", "refused", "request")
    barrier = True

    def __init__(
        self,
        request: Callable[[], Request[Any] | None],
        done: Callable[[Any], None],
        refused: Callable[[ViommuError], None],
    ) -> None:
        self.request = request
        self.done = done
        self.refused = refused


def _name(entry: Entry) -> str:
    return f"[{entry.iova:#x}, {entry.iova + entry.piece.size:#x})"


def _as_backend_error(what: str, error: ViommuError) -> BackendError:
    number = error.errno if isinstance(error, PeerError) else errno.EINVAL
    return BackendError(number, f"the device refuses {what}")
