from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import RingError
from viommu.virtio.ring_takeover import unreturned

if TYPE_CHECKING:
    import random

SIZE: Final = 16


class Rings:
    """Both rings of a queue, and which heads a device really has."""

    def __init__(self, size: int = SIZE, start: int = 0) -> None:
        self.size = size
        self.avail = [0] * size
        self.used = [(0, 0)] * size
        self.avail_idx = self.used_idx = start
        self.free = list(range(size))
        self.taken: list[int] = []
        self.offers: dict[int, int] = {}  # at which index, by head

    def offer(self, head: int | None = None) -> None:
        head = self.free.pop(0) if head is None else head
        self.avail[self.avail_idx % self.size] = head
        self.offers[head] = self.avail_idx
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.taken.append(head)

    def give_back(self, which: int = 0, length: int = 1) -> None:
        head = self.taken.pop(which)
        self.used[self.used_idx % self.size] = (head, length)
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.free.append(head)

    def found(self) -> list[int]:
        return unreturned(self.avail_idx, self.avail, self.used_idx, self.used)


def test_nothing_is_in_flight_at_first() -> None:
    assert Rings().found() == []
    assert Rings(start=0xFFFF).found() == []


@pytest.mark.parametrize("rounds", [0, 3, 40, 70_000])
def test_a_device_that_keeps_the_order(rounds: int) -> None:
    rings = Rings()
    for _ in range(5):
        rings.offer()
    for _ in range(rounds):
        rings.give_back()
        rings.offer()

    assert sorted(rings.found()) == sorted(rings.taken)


def test_all_chains_are_in_flight() -> None:
    rings = Rings()
    for _ in range(20):
        rings.offer()
        rings.give_back()
    for _ in range(SIZE):
        rings.offer()

    assert sorted(rings.found()) == list(range(SIZE))


def test_one_head_again_and_again() -> None:
    rings = Rings()
    rings.free = [0]
    for _ in range(100):
        rings.offer()
        assert rings.found() == [0]
        rings.give_back(length=0)
        assert rings.found() == []


@given(st.randoms(use_true_random=False), st.integers(0, SIZE))
def test_before_the_rings_are_full_any_order_is_seen(rng: random.Random, steps: int) -> None:
    rings = Rings()
    for _ in range(steps):
        rings.offer()
        if rng.random() < 0.6:
            rings.give_back(rng.randrange(len(rings.taken)), length=rng.randrange(2))

    assert sorted(rings.found()) == sorted(rings.taken)


@given(st.randoms(use_true_random=False), st.integers(1, SIZE), st.integers(0, 200))
def test_any_order_is_seen_while_as_much_is_in_flight(
    rng: random.Random, depth: int, steps: int
) -> None:
    rings = Rings(start=0xFFA0)
    rng.shuffle(rings.free)
    for _ in range(depth):
        rings.offer()
    for step in range(3 * SIZE + steps):
        # One that waits for so long that the ring is full again can't be told any more.
        waited = rings.offers[rings.taken[0]] + SIZE & 0xFFFF == rings.avail_idx
        ordered = waited or step < 3 * SIZE
        rings.give_back(0 if ordered else rng.randrange(len(rings.taken)))
        rng.shuffle(rings.free)
        rings.offer()

    assert sorted(rings.found()) == sorted(rings.taken)


def test_more_than_fits_is_refused() -> None:
    with pytest.raises(RingError, match="17 chains are in flight in a ring of 16"):
        unreturned(3, [0] * SIZE, 0xFFF2, [(0, 0)] * SIZE)


@given(
    st.integers(0, 0xFFFF),
    st.lists(st.integers(0, 0xFFFF), min_size=8, max_size=8),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 3)), min_size=8, max_size=8),
)
def test_whatever_is_written_there(
    used_idx: int, avail: list[int], in_flight: int, used: list[tuple[int, int]]
) -> None:
    found = unreturned((used_idx + in_flight) & 0xFFFF, avail, used_idx, used)

    assert len(found) <= in_flight
    assert len(set(found)) == len(found)
    assert all(head < 8 for head in found)
