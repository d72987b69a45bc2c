"""Export sessions: memory that a client uses while the guest may take it away (half-open ranges).

A session has two events. The *fault event* belongs to the client: it fires
once, when exported memory is unmapped, and from then on nothing can be exported
and everything must be released. The *resolution event* belongs to the device:
it fires when the last export is released, and only then may the guest be told
that its unmap is done.

Source: the eight steps of crosvm's ``MemoryMapper``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from sortedcontainers import SortedDict

from viommu.errors import (
    Access,
    ExportError,
    InternalError,
    NotMappable,
    SessionFaulted,
    TranslationFault,
    UsageError,
)
from viommu.events import Event

if TYPE_CHECKING:
    from viommu.mapper import Exporter, MemRegion
    from viommu.memory.guest import GuestMemory

__all__ = ["DEFAULT_MAX_EXPORTS", "ExportLedger", "ExportedRegion", "Held", "SessionState"]

# A virtio device in flight holds its rings (3) and one export for each buffer of
# each request; 256 requests of 128 segments fit twice.
DEFAULT_MAX_EXPORTS: Final = 65536


class SessionState(enum.Enum):
    """Where an export session is."""

    NONE = "none"
    ACTIVE = "active"
    FAULTED = "faulted"
    DRAINED = "drained"


class SessionEvent(enum.Enum):
    """What moves a session on."""

    START = "start"
    FAULT = "fault"
    LAST_RELEASE = "last release"


# A missing key is an illegal transition. START is refused beforehand while
# anything is exported.
TRANSITIONS: Final = {
    SessionState.NONE: {SessionEvent.START: SessionState.ACTIVE},
    SessionState.ACTIVE: {
        SessionEvent.START: SessionState.ACTIVE,
        SessionEvent.FAULT: SessionState.FAULTED,
    },
    SessionState.FAULTED: {SessionEvent.LAST_RELEASE: SessionState.DRAINED},
    SessionState.DRAINED: {SessionEvent.START: SessionState.ACTIVE},
}


class Held(NamedTuple):
    """An export that has not been released: ``times`` times ``[iova, iova + size)``."""

    iova: int
    size: int
    times: int


class ExportLedger:
    """Who holds what of one address space: the session state machine of a mapper.

    A mapper asks it before exporting, tells it of every removal, and hands its
    events out. ``max_exports`` bounds what a client can make us remember.
    """

    def __init__(self, max_exports: int = DEFAULT_MAX_EXPORTS) -> None:
        if max_exports < 1:
            raise UsageError(f"max_exports must be positive, not {max_exports}")
        self.max_exports = max_exports
        self.state = SessionState.NONE
        self.faults = 0
        self._held: SortedDict[tuple[int, int], int] = SortedDict()
        self._total = 0
        # An upper bound of the size of any held range: how far before an address
        # a range that covers it can begin.
        self._longest = 0
        self._fault: Event | None = None
        self._resolution: Event | None = None

    @property
    def total(self) -> int:
        """How many exports are held, each counted as often as it was made."""
        return self._total

    def held(self) -> list[Held]:
        """Return what is exported now, by rising IOVA."""
        return [Held(iova, size, times) for (iova, size), times in self._held.items()]

    def start(self) -> Event:
        """Start a session and return its fault event, which the caller owns and closes.

        Raises:
            SessionFaulted: Exports that an IOMMU fault revoked are still held.
            ExportError: The session before this one still holds exports, or this
                process may open no more file descriptors.
        """
        if self.state is SessionState.FAULTED:
            raise SessionFaulted(f"{self._total} exports of the faulted session are still held")
        if self._total:
            raise ExportError(f"the previous session still holds {self._total} exports")
        event = _new_event()
        self._step(SessionEvent.START)
        self._fault = event
        return event

    def check_export(self) -> None:
        """Raise unless one more range may be exported.

        Raises:
            SessionFaulted: An IOMMU fault ended the session.
            ExportError: There is no session, or ``max_exports`` are held.
        """
        if self.state is not SessionState.ACTIVE:
            if self.state is SessionState.NONE:
                raise ExportError("export without a session: call start_export_session first")
            raise SessionFaulted(f"session ended by an IOMMU fault, {self._total} exports held")
        if self._total >= self.max_exports:
            raise ExportError(f"limit of {self.max_exports} exports reached")

    def add(self, iova: int, size: int) -> None:
        """Record an export that :meth:`check_export` allowed. Runtime: `O(log(n))`.

        Raises:
            ExportError: This process may open no more file descriptors.
        """
        if self._resolution is None:
            # Now, while it can be refused: an unmap must not fail for want of one.
            self._resolution = _new_event()
        key = (iova, size)
        self._held[key] = self._held.get(key, 0) + 1
        self._total += 1
        self._longest = max(self._longest, size)

    def release(self, iova: int, size: int) -> None:
        """Record one release; the last one of a faulted session resolves the fault.

        Raises:
            ExportError: Exactly this range is not exported.
        """
        key = (iova, size)
        count = self._held.get(key, 0)
        if not count:
            raise ExportError(f"[{iova:#x}, {iova + size:#x}) is not exported")
        if count > 1:
            self._held[key] = count - 1
        else:
            del self._held[key]
        self._total -= 1
        if self._total:
            return
        self._longest = 0
        resolution, self._resolution = self._resolution, None
        if self.state is not SessionState.FAULTED:
            if resolution is not None:
                resolution.close()  # nobody else has it
            return
        self._step(SessionEvent.LAST_RELEASE)
        if resolution is not None:
            resolution.signal()

    def revoke(self, start: int, end: int) -> Event | None:
        """Tell the client that ``[start, end)`` is gone.

        Returns ``None`` when nothing of it is exported; else the resolution
        event, which the caller waits for and closes. The fault event fires once a session.
        Runtime complexity: `O(log(n) + k)`, ``k`` held ranges near ``start``.
        """
        if not self._total or not self._touches(start, end):
            return None
        if self.state is SessionState.ACTIVE:
            self._step(SessionEvent.FAULT)
            self.faults += 1
            if self._fault is None:
                raise InternalError("an active session without a fault event")
            # The client owns the event; one that closed it has itself to blame.
            if self._fault.fileno() >= 0:
                self._fault.signal()
        return self._resolution

    def _touches(self, start: int, end: int) -> bool:
        nearby = self._held.irange((start - self._longest, 0), (end, 0))
        return any(iova + size > start for iova, size in nearby)

    def _step(self, event: SessionEvent) -> None:
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            raise InternalError(f"export session: {event.value} while {self.state.value}")
        self.state = following

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken. Runtime complexity: `O(n)`."""
        if sum(self._held.values()) != self._total:
            raise InternalError(f"{self._total} exports counted, {self._held} held")
        if any(size > self._longest for _, size in self._held):
            raise InternalError(f"a held range is longer than {self._longest:#x}: {self._held}")
        if self.state is SessionState.FAULTED and not self._total:
            raise InternalError("a faulted session holds nothing and was not resolved")
        if self.state in (SessionState.NONE, SessionState.DRAINED) and self._total:
            raise InternalError(f"{self._total} exports outside a session")


def _new_event() -> Event:
    try:
        return Event()
    except OSError as error:
        raise ExportError(f"no event for an export session: {error}") from error


class ExportedRegion:
    """A range of IOVAs held open for one transfer; a context manager that releases it.

    ``memory`` is where the guest physical addresses lead. Every byte must be
    mapped with at least ``access``: otherwise nothing is exported.

    Raises:
        TranslationFault: A byte is not mapped, or not with this access.
        SessionFaulted: An IOMMU fault has ended the session.
        ExportError: No session, or too many exports.
        GuestMemoryError: Mapped to what is not guest memory (from :meth:`views`,
            :meth:`read` and :meth:`write`, so that holding such a range is possible).

    Memory that is reached by messages only (:exc:`~viommu.errors.NotMappable`) is
    seen as copies, and written back by :meth:`release`.
    """

    def __init__(
        self, mapper: Exporter, memory: GuestMemory, iova: int, size: int, access: Access
    ) -> None:
        self.iova = iova
        self.size = size
        self.access = access
        self._mapper = mapper
        self._memory = memory
        try:
            self.regions: list[MemRegion] = mapper.export(iova, size)
        except TranslationFault as fault:
            if fault.iova > iova:
                # What lies before the hole may lack the protection: that faults first.
                ExportedRegion(mapper, memory, iova, fault.iova - iova, access).release()
            raise TranslationFault(fault.iova, access, fault.reason) from None
        self._open = True
        # What stands for memory that has no views, and the parts of it that were given out.
        self._copy = bytearray()
        self._copied: set[tuple[int, int, int]] = set()  # offset, size, GPA
        at = iova
        for region in self.regions:
            if access & ~region.prot:
                self.release()
                raise TranslationFault(at, access)
            at += region.len

    @property
    def released(self) -> bool:
        """Whether :meth:`release` has been called."""
        return not self._open

    def views(
        self, offset: int = 0, size: int | None = None, *, copies: bool = True
    ) -> list[memoryview]:
        """Return views of ``[offset, offset + size)`` in order, valid until the release.

        Of memory that has none they are views of a copy. What the caller doesn't
        write of it becomes zero, unless the region was exported for reading too.

        Raises:
            UsageError: Outside the region, or the region was released.
            GuestMemoryError: Mapped, but no guest memory there.
            NotMappable: There are only ``copies``, which are not wanted.
        """
        views: list[memoryview] = []
        write = Access.WRITE in self.access
        for gpa, length in self._pieces(offset, size):
            try:
                views += self._memory.views(gpa, length, write=write)
            except NotMappable:
                if not copies:
                    raise
                views.append(self._view_of_copy(offset, length, gpa))
            offset += length
        return views

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Copy ``size`` bytes out; raises as :meth:`views` does."""
        if Access.READ not in self.access:
            raise UsageError(f"reading a region exported for {self.access}")
        pieces = self._pieces(offset, size)
        return b"".join([self._memory.read(gpa, length) for gpa, length in pieces])

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy ``data`` in, all of it or nothing; raises as :meth:`views` does.

        What is reached by messages may be written in part when one of them fails.
        """
        if Access.WRITE not in self.access:
            raise UsageError(f"writing a region exported for {self.access}")
        at = 0
        try:
            views = self.views(offset, len(data), copies=False)
        except NotMappable:
            for gpa, length in self._pieces(offset, len(data)):
                self._memory.write(gpa, data[at : at + length])
                at += length
            return
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)

    def release(self) -> None:
        """Let go; a second call does nothing.

        Raises:
            GuestMemoryError: What was written to copies can't be written back. The
                region is released all the same.
        """
        if self._open:
            self._open = False
            try:
                for offset, length, gpa in sorted(self._copied):
                    self._memory.write(gpa, self._copy[offset : offset + length])
            finally:
                self._mapper.release(self.iova, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _view_of_copy(self, offset: int, size: int, gpa: int) -> memoryview:
        if Access.WRITE not in self.access:
            return memoryview(self._memory.read(gpa, size))
        if not self._copy:
            self._copy[:] = self.read() if Access.READ in self.access else bytes(self.size)
        self._copied.add((offset, size, gpa))
        return memoryview(self._copy)[offset : offset + size]

    def _pieces(self, offset: int, size: int | None) -> list[tuple[int, int]]:
        """Cut ``[offset, offset + size)`` into (gpa, length) pieces."""
        if not self._open:
            raise UsageError(f"IOVA {self.iova:#x} was released")
        end = self.size if size is None else offset + size
        if not 0 <= offset <= end <= self.size:
            raise UsageError(f"[{offset}, {end}) is outside the {self.size} bytes exported")
        pieces = []
        base = 0
        for gpa, length, _ in self.regions:
            low, high = max(offset, base), min(end, base + length)
            if low < high:
                pieces.append((gpa + low - base, high - low))
            base += length
        return pieces
