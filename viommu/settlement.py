"""Requests that are answered later: who is waited for, and what if a mapper refuses after all.

Exports that a request revoked must be released, and mappers whose hosts answer later
(:class:`~viommu.mapper.DeferredMapper`) must have settled, before the guest may be told.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import status_of
from viommu.spec.virtio_iommu import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from viommu.domain import EndpointGroup
    from viommu.errors import BackendError
    from viommu.events import Event

__all__ = ["REPLIES", "Parked", "Refusal", "break_groups", "refusals_of", "settle", "unsettled"]

#: The tail of a reply, by status.
REPLIES = [bytes((status, 0, 0, 0)) for status in range(len(Status))]


class Parked:
    """A request whose reply waits for clients that hold memory, and for mappers.

    Wait until each of ``events`` is readable, close them, and :meth:`conclude`. Take no
    further request meanwhile. ``reply`` is what to expect: a mapper that refuses changes it.
    """

    __slots__ = ("_conclude", "events", "reply")

    def __init__(
        self,
        events: Iterable[Event],
        reply: bytes,
        conclude: Callable[[], bytes | Parked] | None = None,
    ) -> None:
        self.events = tuple(events)
        self.reply = reply
        self._conclude = conclude

    def conclude(self) -> bytes | Parked:
        """Return the reply to put on the used ring.

        When a mapper has refused, the request is undone first. That may have to be
        waited for as well: then it is parked again. To be called once.
        """
        return self.reply if self._conclude is None else self._conclude()


class Refusal(NamedTuple):
    """What a mapper said later."""

    group: EndpointGroup
    error: BackendError


def unsettled(groups: Iterable[EndpointGroup]) -> list[Event]:
    """Return the events of those mappers of ``groups`` that have not settled."""
    mappers = [group.deferred for group in groups if group.deferred is not None]
    return [event for mapper in mappers if (event := mapper.unsettled()) is not None]


def refusals_of(groups: Iterable[EndpointGroup]) -> list[Refusal]:
    """Take what the mappers of ``groups`` refused, now that they have settled."""
    return [
        Refusal(group, error)
        for group in groups
        if group.deferred is not None and (error := group.deferred.take_refusal()) is not None
    ]


def settle(
    groups: Sequence[EndpointGroup],
    waits: Iterable[Event],
    reply: bytes,
    undo: Callable[[list[Refusal]], list[Event]] | None,
) -> bytes | Parked:
    """Answer ``reply`` when ``waits`` have fired and the mappers of ``groups`` have settled.

    If one has refused by then, ``undo`` is called, and the events that it returns are
    waited for as well. What succeeded so far gets the status of the first refusal.
    Without ``undo`` a refusal changes nothing.
    """
    events = [*waits, *unsettled(groups)]
    conclude = partial(_conclude, groups, reply, undo)
    return Parked(events, reply, conclude) if events else conclude()


def _conclude(
    groups: Sequence[EndpointGroup],
    reply: bytes,
    undo: Callable[[list[Refusal]], list[Event]] | None,
) -> bytes | Parked:
    refusals = refusals_of(groups)
    if not refusals or undo is None:
        return reply
    waits = undo(refusals)
    if reply == REPLIES[Status.OK]:
        reply = REPLIES[status_of(refusals[0].error)]
    # Undoing maps again what was unmapped, which can be refused, once more; then
    # nothing but unmapping is left.
    return settle(groups, waits, reply, break_groups if undo is not break_groups else None)


def break_groups(refusals: list[Refusal]) -> list[Event]:
    """Empty mappers that refused what they held before: they are out of order."""
    waits = [
        group.domain.quarantine(group, f"putting its domain back was refused ({error})")
        for group, error in refusals
    ]
    return [event for event in waits if event is not None]
