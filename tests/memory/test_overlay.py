from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.recording import PAGE, pages
from viommu.errors import InternalError
from viommu.memory.dma_target import EVERYWHERE, AddressRange, MemoryKind
from viommu.memory.overlay import Overlay
from viommu.memory.region import MapParameters, Region, RegionOverlapError

TOP = 1 << 64


def region(name: str, first: int, count: int, priority: int, *, enabled: bool = True) -> Region:
    made = Region(name, pages(first, count), MemoryKind.RAM, priority)
    made.parameters = MapParameters() if enabled else None
    return made


@pytest.mark.parametrize(
    ("first", "count", "priority", "fits"),
    [
        (4, 4, 5, True),  # the same place
        (4, 2, 5, False),
        (2, 8, 5, False),
        (4, 4, 4, True),  # lower: inside
        (5, 2, 4, True),
        (3, 2, 4, False),
        (7, 2, 4, False),
        (3, 6, 4, False),
        (4, 4, 6, True),  # higher: around
        (3, 6, 6, True),
        (4, 3, 6, False),
        (5, 2, 6, False),
        (6, 4, 6, False),
        (0, 4, 6, True),  # beside
        (8, 4, 4, True),
    ],
)
def test_how_regions_may_overlap(first: int, count: int, priority: int, fits: bool) -> None:
    overlay = Overlay()
    old = region("old", 4, 4, 5)
    overlay.add(old)
    new = region("new", first, count, priority)
    if fits:
        overlay.add(new)
        assert set(overlay.all()) == {old, new}
    else:
        with pytest.raises(RegionOverlapError) as caught:
            overlay.add(new)
        assert (caught.value.existing, caught.value.new) == ("old", "new")
        assert overlay.all() == [old]
    overlay._check()


def test_a_region_must_fit_with_every_other_one() -> None:
    overlay = Overlay()
    for each in (region("a", 0, 2, 0), region("b", 4, 2, 0), region("all", 0, 6, 9)):
        overlay.add(each)
    with pytest.raises(RegionOverlapError, match="'b'"):
        overlay.add(region("middle", 0, 5, 5))
    overlay.add(region("b's", 4, 2, 5))


def test_the_highest_enabled_region_is_seen_and_of_equals_the_oldest() -> None:
    overlay = Overlay()
    low = region("low", 1, 1, 0)
    first, second = region("first", 0, 4, 5), region("second", 0, 4, 5)
    high = region("high", 0, 8, 9)
    for each in (second_place := [low, first, second, high]):
        overlay.add(each)
    assert [overlay.shadow_of(r) for r in second_place] == [high, high, high, None]
    high.parameters = None
    assert [overlay.shadow_of(r) for r in second_place] == [first, None, first, None]
    first.parameters = None
    assert overlay.shadow_of(low) is second
    overlay.remove(second)
    assert overlay.shadow_of(low) is None
    assert overlay.all() == [high, first, low]


def test_a_region_that_should_be_seen_and_failed_casts_a_shadow() -> None:
    overlay = Overlay()
    low, high = region("low", 0, 1, 0), region("high", 0, 1, 1)
    overlay.add(low)
    overlay.add(high)
    high.failure = ValueError()
    assert overlay.shadow_of(low) is high


def test_the_whole_address_space_is_a_region() -> None:
    overlay = Overlay()
    everything = Region("everything", EVERYWHERE, MemoryKind.RAM, 255)
    everything.parameters = MapParameters()
    last = Region("last", AddressRange(TOP - 1, TOP), MemoryKind.DEVICE, 0)
    overlay.add(everything)
    overlay.add(last)
    assert overlay.meeting(AddressRange(TOP - 1, TOP)) == [everything, last]
    assert overlay.shadow_of(last) is everything


def test_looking_costs_what_is_found_not_what_is_there() -> None:
    overlay = Overlay()
    for index in range(1000):
        overlay.add(region(str(index), 2 * index, 1, 0))
    assert [r.name for r in overlay.meeting(pages(501, 4))] == ["251", "252"]
    assert overlay.meeting(pages(501)) == []


@pytest.mark.parametrize("damage", ["empty", "start", "unlike", "overlap", "cross"])
def test_check_finds_damage(damage: str) -> None:
    overlay = Overlay()
    low, high = region("low", 1, 2, 0), region("high", 0, 4, 1)
    other = region("other", 6, 1, 0)
    for each in (low, high, other):
        overlay.add(each)
    places = overlay._layers[0].places
    match damage:
        case "empty":
            places.clear()
        case "start":
            places[0] = places.pop(low.where.start)
        case "unlike":
            places[low.where.start].append(high)
        case "overlap":
            other.where = pages(6, 1)
            low.where = pages(1, 7)
        case _:
            high.where = pages(0, 2)
    with pytest.raises(InternalError):
        overlay._check()


SPAN = 6
made = st.tuples(
    st.integers(0, SPAN - 1), st.integers(1, SPAN), st.sampled_from([0, 1, 2]), st.booleans()
)


@given(st.lists(st.one_of(made, st.integers(0, 5)), max_size=14))
def test_it_agrees_with_a_model_that_looks_at_every_page(
    steps: list[tuple[int, int, int, bool] | int],
) -> None:
    overlay = Overlay()
    model: list[Region] = []  # by age
    for number, step in enumerate(steps):
        if isinstance(step, int):
            if step < len(model):
                overlay.remove(model.pop(step))
        else:
            first, count, priority, enabled = step
            new = region(str(number), first, count, priority, enabled=enabled)
            if all(may_overlap(new, old) for old in model):
                overlay.add(new)
                model.append(new)
            else:
                with pytest.raises(RegionOverlapError):
                    overlay.add(new)
        overlay._check()
        assert sorted(map(id, overlay.all())) == sorted(map(id, model))
        for page in range(2 * SPAN):
            there = [r for r in model if r.where.meets(pages(page))]
            assert set(overlay.meeting(pages(page))) == set(there)
            enabled_there = [r for r in there if r.enabled]
            best = max(enabled_there, key=lambda r: r.priority, default=None)
            seen = [r for r in enabled_there if overlay.shadow_of(r) is None]
            assert seen == ([best] if best else [])


def may_overlap(new: Region, old: Region) -> bool:
    mine, theirs = set(range(*new.where, PAGE)), set(range(*old.where, PAGE))
    if mine.isdisjoint(theirs):
        return True
    if new.priority == old.priority:
        return mine == theirs
    return mine <= theirs if new.priority < old.priority else theirs <= mine
