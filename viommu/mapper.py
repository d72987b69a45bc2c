"""The contract between a domain and what stands behind an endpoint.

Source: crosvm's ``MemoryMapper`` (names and fault semantics), extended so that
every call is all or nothing. Ranges are half-open.
"""

from __future__ import annotations

import enum
import itertools
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.errors import Access, BackendError
    from viommu.events import Event

__all__ = [
    "AddMapResult",
    "DeferredMapper",
    "Exporter",
    "MappingInfo",
    "MemRegion",
    "MemoryMapper",
    "RemoveMapResult",
    "SwitchingMapper",
    "next_mapper_id",
]

_ids = itertools.count(1)


def next_mapper_id() -> int:
    """Return a number that no mapper of this process had before, for ``MemoryMapper.id``."""
    return next(_ids)


class MappingInfo(NamedTuple):
    """One mapping: ``[iova, iova + size)`` to ``[gpa, gpa + size)``, sizes in bytes."""

    iova: int
    gpa: int
    size: int
    prot: Access


class MemRegion(NamedTuple):
    """A piece of exported memory: ``len`` bytes at ``gpa``, accessible as ``prot``."""

    gpa: int
    len: int
    prot: Access


class AddMapResult(enum.Enum):
    """The outcome of :meth:`MemoryMapper.add_map`."""

    OK = "ok"
    OVERLAP_FAILURE = "overlap"


class RemoveMapResult(NamedTuple):
    """The outcome of :meth:`MemoryMapper.remove_map`.

    ``ok`` is false when the range would split a mapping; nothing was removed.
    ``resolution``, when there is one, becomes readable once every export that
    the removal revoked has been released: until then the guest must not be told
    that the removal is done.
    """

    ok: bool
    resolution: Event | None = None


class Exporter(Protocol):
    """What a client of a mapper needs: memory by IOVA, for as long as the guest lets it.

    It is half of a :class:`MemoryMapper`. A client in another process has it from
    :class:`viommu.ipc.client.ExportClient`.
    """

    def start_export_session(self) -> Event:
        """Start an export session; return its fault event.

        The event is signalled once, when exported memory is unmapped. From then
        on nothing can be exported and the client must release everything. The
        caller owns the event.

        Raises:
            ExportError: The session before this one still holds exports, or the
                host has no events to give.
        """

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Export ``[iova, iova + size)``; regions merge when contiguous and equally protected.

        Raises:
            TranslationFault: Some byte is not mapped; ``iova`` is the first such address.
            SessionFaulted: An IOMMU fault has ended this session.
            ExportError: No session was started, or a limit is reached.
        """

    def release(self, iova: int, size: int) -> None:
        """Release one export of exactly this range.

        A range exported several times must be released as often.

        Raises:
            ExportError: This range is not exported.
        """


@runtime_checkable
class MemoryMapper(Exporter, Protocol):
    """The address space of one endpoint, or of endpoints the host can't tell apart.

    The caller passes page-aligned, non-empty ranges below ``2**64`` and holds no
    more than one request in flight. An overlap is a result; a host failure is a
    :exc:`~viommu.errors.BackendError`. A failed call changes nothing.
    """

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Add one mapping.

        Raises:
            BackendError: The host refused; nothing was mapped.
            UsageError: The mapping is empty or passes the end of an address space.
        """

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Remove every mapping inside ``[iova_start, iova_start + size)``.

        Gaps, and a range with no mapping at all, are no error. If a removed
        mapping was exported, the session's fault event is signalled.

        Raises:
            BackendError: The host refused; nothing was removed.
        """

    def get_mask(self) -> int:
        """Return the page sizes that can be mapped, one bit each; the lowest is the granule."""

    def supports_detach(self) -> bool:
        """Return whether the endpoint can leave its domain (:meth:`reset_domain` works)."""

    def id(self) -> int:
        """Return a number unique among live mappers of this process.

        Two endpoints with the same number share one address space. The number
        of a mapper that can :meth:`join` another is that of the space it is in.
        """

    def join(self, other: MemoryMapper) -> bool:
        """Share the address space of ``other`` instead of holding a copy of its mappings.

        This mapper is empty. Afterwards both have the same :meth:`id`, what is
        mapped through one is mapped for both, and :meth:`reset_domain` leaves
        what is shared as it is. False, and no change, where that can't be:
        the caller then adds mapping after mapping.

        Raises:
            BackendError: The host refused; this mapper is still empty.
        """

    def reset_domain(self) -> Event | None:
        """Remove every mapping; return a resolution event as in :class:`RemoveMapResult`.

        The device calls it only where :meth:`supports_detach`.

        Raises:
            BackendError: The host refused; nothing was removed.
        """

    def vfio_dma_map(self, iova: int, hva: int, size: int, prot: Access) -> AddMapResult:
        """Map host memory at ``hva`` (device BARs) instead of guest memory.

        Raises:
            BackendError: ENOTSUP where this mapper has no host address space.
        """


@runtime_checkable
class SwitchingMapper(MemoryMapper, Protocol):
    """A mapper whose devices can go from one address space to another in one step.

    No DMA is blocked in between that both spaces allow, and what the host can't do
    shows before anything has changed.
    """

    def switch(self, mappings: Iterable[MappingInfo], mates: Iterable[MemoryMapper]) -> bool:
        """Leave the address space for the one of a mate, or else for a new one with ``mappings``.

        ``mates`` are mappers of the domain that is entered. False, and no change,
        where that can't be: the caller empties this mapper and fills it again.
        Never raises for what the host refuses.
        """


@runtime_checkable
class DeferredMapper(MemoryMapper, Protocol):
    """A mapper whose host answers later: a device in another process, say.

    Every call is recorded as done and sent to the host, so the mapper's own side (exports,
    overlaps, :meth:`id`) is up to date at once. Whoever asked then waits for
    :meth:`unsettled`, and looks with :meth:`take_refusal` whether all of it was done.

    Only a mapping can be refused, at once or later. To remove one never raises: a host
    that does not do it, or does not answer in a bounded time, must be cut off from all
    memory by the mapper, and then everything is settled. So it is when the host dies,
    which is no refusal either. :meth:`MemoryMapper.supports_detach` is true.
    """

    def unsettled(self) -> Event | None:
        """Return an event that is readable once the host has answered all it was asked.

        ``None`` when it has. It is the same event until it fires. The caller closes it, and
        may do so before.
        """

    def take_refusal(self) -> BackendError | None:
        """Return the first refusal since the last call, and forget the others.

        The host has no part of a mapping that was refused. On the mapper's side it is
        still there: whoever asked for it removes it. What has been removed meanwhile,
        or was asked for by nobody (guest memory came where a mapping leads), is not reported.
        """
