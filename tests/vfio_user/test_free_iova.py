from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import InternalError
from viommu.vfio_user.free_iova import FreeIova

APERTURES = ((0x10, 0x40), (0x50, 0x60))
EVERYTHING = frozenset(range(0x10, 0x40)) | frozenset(range(0x50, 0x60))


def free_bytes(free: FreeIova) -> frozenset[int]:
    return frozenset(at for start, end in free for at in range(start, end))


@pytest.mark.parametrize(
    ("taken", "size", "found"),
    [
        ([], 0x30, 0x10),
        ([], 0x31, None),
        # The smaller aperture, which this fits, leaves the larger one whole.
        ([], 0x10, 0x50),
        ([], 0x11, 0x10),
        ([(0x10, 0x40)], 8, 0x50),
        ([(0x10, 0x40), (0x50, 0x60)], 1, None),
        # A hole that fits is filled before anything larger is broken up.
        ([(0x10, 0x18), (0x1C, 0x30)], 4, 0x18),
        ([(0x10, 0x18), (0x1C, 0x30)], 5, 0x30),
        # Of holes of one size the lowest.
        ([(0x10, 0x14), (0x18, 0x20), (0x24, 0x60)], 4, 0x14),
    ],
)
def test_the_smallest_place_that_fits_is_found(
    taken: list[tuple[int, int]], size: int, found: int | None
) -> None:
    free = FreeIova(APERTURES)
    for start, end in taken:
        free.take(start, end)

    assert free.find(size) == found
    free._check()


def test_what_is_taken_need_not_be_free_nor_in_an_aperture() -> None:
    free = FreeIova(APERTURES)
    free.take(0x20, 0x28)

    free.take(0, 0x24)
    free.take(0x26, 0x58)
    free.take(0x70, 0x80)

    assert free_bytes(free) == frozenset(range(0x58, 0x60))


def test_what_is_given_back_grows_together() -> None:
    free = FreeIova([(0, 0x30)])
    free.take(0, 0x30)
    for start in (0x10, 0, 0x20):
        free.give(start, start + 0x10)

    assert free.find(0x30) == 0


def test_what_is_given_back_outside_stays_outside() -> None:
    free = FreeIova(APERTURES)
    free.take(0, 0x80)
    free.give(0, 0x80)

    assert free_bytes(free) == EVERYTHING


@given(st.lists(st.tuples(st.integers(0, 0x7F), st.integers(1, 0x30)), max_size=40))
def test_it_equals_a_set_of_addresses(steps: list[tuple[int, int]]) -> None:
    free = FreeIova(APERTURES)
    expected = set(EVERYTHING)
    taken: list[tuple[int, int]] = []
    for start, size in steps:
        if taken and start % 3 == 0:  # what was taken goes back, without what others hold
            low, high = taken.pop(size % len(taken))
            free.give(low, high)
            expected |= EVERYTHING & set(range(low, high))
        else:
            where = set(range(start, start + size))
            if any(where & set(range(low, high)) for low, high in taken):
                continue
            free.take(start, start + size)
            taken.append((start, start + size))
            expected -= where
        free._check()
        assert free_bytes(free) == expected
    for size in (1, 8, 0x20):
        found = free.find(size)
        fits = any(set(range(at, at + size)) <= expected for at in range(0x80))
        assert (found is not None) == fits
        if found is not None:
            assert set(range(found, found + size)) <= expected


@pytest.mark.parametrize("damage", ["size", "empty", "outside"])
def test_the_check_notices_damage(damage: str) -> None:
    free = FreeIova(APERTURES)
    if damage == "size":
        free._sizes.clear()
    elif damage == "empty":
        free._add(0x30, 0x38)
    else:
        free._add(0x70, 0x80)

    with pytest.raises(InternalError):
        free._check()
