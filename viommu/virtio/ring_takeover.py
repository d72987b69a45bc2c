"""What a device that is gone had taken from a split ring and not given back.

Memory says how much that is, and nearly always what: which chain came back at
which position of the used ring is still there, and so is which was offered at
which position of the available ring.

Source: virtio 1.2, 2.7 "Split Virtqueues".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.errors import RingError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["unreturned"]

_WRAP = 0xFFFF


def unreturned(
    avail_idx: int, avail: Sequence[int], used_idx: int, used: Sequence[tuple[int, int]]
) -> list[int]:
    """Return the heads of chains in flight, those that surely are before those that may be.

    ``avail`` and ``used`` are the arrays of both rings as they lie in memory, the
    latter with the lengths; the indices are the ones that driver and device published.

    A chain offered at position p of the one ring and given back at position q of the
    other: while ``n`` chains are in flight, ``q`` comes when ``q + n`` have been offered.
    So one that has come back since has ``p - q < n``, and one that was offered again
    ``p - q >= n``: those in flight are the ones with the largest differences. That is
    exact for a device that returns chains in order, for any device before the rings
    have been filled once, and later as long as the driver kept about as much in flight.

    Raises:
        RingError: More is in flight than fits a ring.
    """
    size = len(avail)
    in_flight = (avail_idx - used_idx) & _WRAP
    if in_flight > size:
        raise RingError(f"{in_flight} chains are in flight in a ring of {size}")
    # Positions from here on: they don't wrap, and the oldest that are visible may be negative.
    end_of_used, end_of_avail = used_idx, used_idx + in_flight
    start_of_used, start_of_avail = end_of_used - size, end_of_avail - size
    if end_of_avail <= size and not any(avail[end_of_avail:]) and not _any(used[used_idx:]):
        start_of_used = start_of_avail = 0  # nothing was ever written behind
    offered = {avail[p % size]: p for p in range(start_of_avail, end_of_avail)}
    returned = {used[q % size][0]: q for q in range(start_of_used, end_of_used)}
    before = start_of_used - 2 * size  # of a chain that has not been seen to come back
    ranked = sorted(
        (p - returned.get(head, before), head) for head, p in offered.items() if head < size
    )
    return [head for _, head in reversed(ranked[len(ranked) - min(in_flight, len(ranked)) :])]


def _any(used: Sequence[tuple[int, int]]) -> bool:
    return any(head or length for head, length in used)
