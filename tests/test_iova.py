"""The interval map against hand-picked edges and a naive model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import Access, InternalError, TranslationFault, UsageError
from viommu.iova import ADDRESS_SPACE_END, IntervalMap
from viommu.mapper import MappingInfo

RW = Access.READ | Access.WRITE
R = Access.READ


def mapping(start: int, end: int, gpa: int = 0, prot: Access = RW) -> MappingInfo:
    return MappingInfo(start, gpa, end - start, prot)


def filled(*mappings: MappingInfo) -> IntervalMap:
    space = IntervalMap()
    for each in mappings:
        assert space.add(each)
    return space


def test_neighbours_do_not_overlap() -> None:
    space = filled(mapping(10, 20), mapping(0, 10), mapping(20, 30))

    assert [m.iova for m in space] == [0, 10, 20]
    assert len(space) == 3


@pytest.mark.parametrize(
    ("start", "end"), [(10, 20), (9, 11), (19, 21), (12, 13), (0, 100), (0, 11), (19, 100)]
)
def test_an_overlap_changes_nothing(start: int, end: int) -> None:
    space = filled(mapping(10, 20))

    assert not space.add(mapping(start, end))
    assert list(space) == [mapping(10, 20)]


@pytest.mark.parametrize(
    "bad",
    [
        MappingInfo(0, 0, 0, RW),
        MappingInfo(0, 0, -1, RW),
        MappingInfo(-1, 0, 1, RW),
        MappingInfo(0, -1, 1, RW),
        MappingInfo(ADDRESS_SPACE_END - 1, 0, 2, RW),
        MappingInfo(0, ADDRESS_SPACE_END - 1, 2, RW),
    ],
)
def test_a_mapping_outside_the_address_space_is_refused(bad: MappingInfo) -> None:
    space = IntervalMap()

    with pytest.raises(UsageError, match="outside the address space"):
        space.add(bad)
    assert not len(space)


def test_the_last_byte_can_be_mapped_found_and_removed() -> None:
    last = ADDRESS_SPACE_END - 1
    space = filled(mapping(last, ADDRESS_SPACE_END))

    assert space.find(last) == mapping(last, ADDRESS_SPACE_END)
    assert space.find(last - 1) is None
    assert space.remove(last, ADDRESS_SPACE_END) == [mapping(last, ADDRESS_SPACE_END)]


def test_one_mapping_can_be_the_whole_space() -> None:
    space = filled(mapping(0, ADDRESS_SPACE_END))

    assert not space.add(mapping(5, 6))
    assert list(space.pieces(7, 9)) == [MappingInfo(7, 7, 2, RW)]


def test_the_last_byte_of_a_mapping_is_not_its_neighbours() -> None:
    space = filled(mapping(0, 0x1000, 0x5000), mapping(0x1000, 0x2000, 0x9000))

    (piece,) = space.pieces(0xFFF, 0x1000)

    assert piece.gpa == 0x5FFF


@pytest.mark.parametrize(
    ("start", "end", "splits"),
    [
        (10, 20, False),
        (10, 30, False),
        (0, 40, False),
        (0, 10, False),
        (15, 20, True),
        (10, 15, True),
        (15, 40, True),
        (0, 25, True),
        (12, 13, True),
    ],
)
def test_removal_never_splits(start: int, end: int, splits: bool) -> None:
    space = filled(mapping(10, 20), mapping(20, 30))

    if splits:
        assert space.remove(start, end) is None
        assert len(space) == 2
    else:
        inside = [m for m in space if start <= m.iova < end]
        assert space.remove(start, end) == inside
        assert len(space) == 2 - len(inside)


def test_pieces_are_clipped_and_ordered() -> None:
    space = filled(mapping(10, 20, 100, R), mapping(20, 30, 500))

    assert list(space.pieces(15, 25)) == [MappingInfo(15, 105, 5, R), MappingInfo(20, 500, 5, RW)]


@pytest.mark.parametrize(("start", "end", "hole"), [(0, 20, 0), (15, 45, 30), (50, 51, 50)])
def test_a_hole_faults_at_its_first_address(start: int, end: int, hole: int) -> None:
    space = filled(mapping(10, 30), mapping(40, 50))

    with pytest.raises(TranslationFault) as caught:
        list(space.pieces(start, end))
    assert caught.value.iova == hole


@pytest.mark.parametrize(
    ("start", "end", "count"),
    [
        (0, 100, 3),
        (0, 10, 0),
        (0, 11, 1),
        (15, 16, 1),
        (15, 21, 2),
        (29, 40, 1),
        (30, 40, 0),
        (30, 41, 1),
        (50, ADDRESS_SPACE_END, 0),
    ],
)
def test_mappings_are_counted_without_being_looked_at(start: int, end: int, count: int) -> None:
    space = filled(mapping(10, 20), mapping(20, 30), mapping(40, 50))

    assert space.count(start, end) == len(space.overlapping(start, end)) == count


def test_clear_forgets_everything() -> None:
    space = filled(mapping(0, 1), mapping(5, 6))

    space.clear()

    assert list(space) == []
    space._check()


@pytest.mark.parametrize("damage", ["start", "size", "overlap", "end"])
def test_check_finds_damage(damage: str) -> None:
    space = filled(mapping(10, 20), mapping(20, 30))
    match damage:
        case "start":
            space._starts.add(25)
        case "size":
            space._mappings[10] = MappingInfo(10, 0, 0, RW)
        case "overlap":
            space._mappings[10] = mapping(10, 21)
        case _:
            space._mappings[20] = MappingInfo(20, 0, ADDRESS_SPACE_END, RW)

    with pytest.raises(InternalError):
        space._check()


SPAN = 24
spans = st.tuples(st.integers(0, SPAN - 1), st.integers(1, SPAN)).map(
    lambda pair: (pair[0], min(SPAN, pair[0] + pair[1]))
)


@given(
    st.sampled_from([0, ADDRESS_SPACE_END - SPAN]),
    st.lists(st.tuples(st.sampled_from(["add", "remove", "find", "walk"]), spans), max_size=40),
)
def test_it_agrees_with_a_naive_model(base: int, steps: list[tuple[str, tuple[int, int]]]) -> None:
    space = IntervalMap()
    model: dict[int, int] = {}  # address: start of its mapping
    for step, (low, high) in steps:
        start, end = base + low, base + high
        span = range(start, end)
        if step == "add":
            free = not any(a in model for a in span)
            assert space.add(MappingInfo(start, start - base, end - start, RW)) is free
            if free:
                model.update(dict.fromkeys(span, start))
        elif step == "remove":
            touched = {model[a] for a in span if a in model}
            whole = {a for a, s in model.items() if s in touched}
            removed = space.remove(start, end)
            if whole <= set(span):
                assert removed is not None
                assert [m.iova for m in removed] == sorted(touched)
                model = {a: s for a, s in model.items() if a not in whole}
            else:
                assert removed is None
        elif step == "find":
            found = space.find(start)
            assert (found.iova if found else None) == model.get(start)
        elif all(a in model for a in span):
            walked = list(space.pieces(start, end))
            assert [m.iova + i for m in walked for i in range(m.size)] == list(span)
            assert all(m.gpa == m.iova - base for m in walked)
        else:
            with pytest.raises(TranslationFault) as caught:
                list(space.pieces(start, end))
            assert caught.value.iova == next(a for a in span if a not in model)
        space._check()
    assert {m.iova for m in space} == set(model.values())
