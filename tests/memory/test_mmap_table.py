from __future__ import annotations

import errno
import inspect
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.mmap_lifecycle import BASE, LIFECYCLE, Service, TableService, run
from tests.memory.recording import PAGE, pages
from viommu.errors import InternalError, PeerError, UsageError
from viommu.memory.dma_target import AddressRange
from viommu.memory.mmap_table import MmapArea, MmapMapping, MmapOwner, MmapTable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def table() -> Iterator[MmapTable]:
    table = MmapTable(PAGE)
    yield table
    table._check()
    table.close()
    table._check()


def refused(number: int) -> pytest.RaisesExc[PeerError]:
    return pytest.raises(PeerError, check=lambda error: error.errno == number)


def test_the_lifecycle_step_by_step() -> None:
    service = TableService()
    run(service)
    assert service.released == [
        "first", "first", "second", "third", "parent",
        "fourth", "first", "parent",  # on close, and "first" only when it was unmapped
    ]  # fmt: skip


def test_the_table_of_steps_uses_every_call() -> None:
    calls = {name for name, _ in inspect.getmembers(Service, inspect.isfunction)}
    assert {step.call for step in LIFECYCLE} == {c for c in calls if not c.startswith("_")}


@pytest.mark.parametrize(
    ("base", "length"),
    [
        (1, PAGE),
        (BASE + 8, PAGE),
        (BASE, 0),
        (BASE, -PAGE),
        (BASE, 1),
        (BASE, PAGE + 1),
        (-PAGE, PAGE),
    ],
)
def test_an_area_is_whole_pages(table: MmapTable, base: int, length: int) -> None:
    owner = table.add_owner("owner")
    with refused(errno.EINVAL):
        table.offer(owner, base, length)
    assert table.areas() == []


def test_an_area_says_where_its_memory_is(table: MmapTable) -> None:
    owner = table.add_owner("owner")
    area = table.offer(owner, BASE, 3 * PAGE)
    assert area == MmapArea(owner, BASE, 3 * PAGE, PAGE)
    mapping = table.map(area.offset, area.length)
    assert mapping.area is area
    assert mapping.pieces == [pages(0, 3)]
    assert owner.users == 1


def test_the_lowest_offset_that_is_free_is_taken(table: MmapTable) -> None:
    owners = [table.add_owner(name) for name in "abc"]
    areas = [table.offer(owner, BASE, 2 * PAGE) for owner in owners]
    assert [area.offset // PAGE for area in areas] == [1, 3, 5]
    table.destroy(owners[1])
    assert table.offer(owners[0], BASE, 3 * PAGE).offset // PAGE == 7
    assert table.offer(owners[0], BASE, PAGE).offset // PAGE == 3
    assert table.offer(owners[0], BASE, PAGE).offset // PAGE == 4
    assert [area.offset // PAGE for area in owners[0].areas] == [1, 7, 3, 4]


def test_a_file_with_a_layout_of_its_own_says_where_its_areas_are(table: MmapTable) -> None:
    """A VFIO device's begins with BAR 0."""
    owner = table.add_owner("owner")
    given = [table.offer(owner, 0, PAGE, offset=at * PAGE) for at in (4, 0)]
    found = table.offer(owner, 0, 3 * PAGE)
    assert [area.offset // PAGE for area in (*given, found)] == [4, 0, 1]
    mapping = table.map(0, PAGE)
    assert mapping.area is given[1]
    mapping.unmap()


@pytest.mark.parametrize(
    ("offset", "length", "number"),
    [
        (-PAGE, PAGE, errno.EINVAL),
        (1, PAGE, errno.EINVAL),
        (2 * PAGE, PAGE, errno.EEXIST),
        (PAGE, 2 * PAGE, errno.EEXIST),
        (3 * PAGE, 2 * PAGE, errno.EEXIST),
        (PAGE, 4 * PAGE, errno.EEXIST),
        ((1 << 63) - PAGE, 2 * PAGE, errno.ENOSPC),
    ],
)
def test_an_area_is_where_there_is_room_for_it(
    table: MmapTable, offset: int, length: int, number: int
) -> None:
    owner = table.add_owner("owner")
    there = table.offer(owner, 0, 2 * PAGE, offset=2 * PAGE)
    with refused(number):
        table.offer(owner, 0, length, offset=offset)
    assert table.areas() == [there]
    table.offer(owner, 0, PAGE, offset=PAGE)
    table.offer(owner, 0, PAGE, offset=4 * PAGE)


def test_areas_are_limited_in_number_and_size() -> None:
    table = MmapTable(PAGE, max_areas=2)
    owner = table.add_owner("owner")
    with refused(errno.ENOSPC):
        table.offer(owner, 0, 1 << 63)
    largest = table.offer(owner, 0, (1 << 63) - PAGE)
    assert largest.offset == PAGE
    with refused(errno.ENOSPC):
        table.offer(owner, 0, PAGE)
    table.destroy(owner)
    owner = table.add_owner("owner")
    table.offer(owner, 0, PAGE)
    table.offer(owner, 0, PAGE)
    with refused(errno.ENOSPC):
        table.offer(owner, 0, PAGE)
    table.close()


@pytest.mark.parametrize("length", [0, -PAGE, 1, 2 * PAGE - 1])
def test_a_length_is_whole_pages(table: MmapTable, length: int) -> None:
    owner = table.add_owner("owner")
    area = table.offer(owner, BASE, 2 * PAGE)
    with refused(errno.EINVAL):
        table.map(area.offset, length)
    assert owner.users == 0


@pytest.mark.parametrize("offset", [-PAGE, 0, 1, PAGE + 1, PAGE - 1, 1 << 64])
def test_an_offset_that_was_never_given_out_is_unknown(table: MmapTable, offset: int) -> None:
    owner = table.add_owner("owner")
    table.offer(owner, BASE, PAGE)
    with refused(errno.ENXIO):
        table.map(offset, PAGE)
    assert owner.users == 0


@pytest.mark.parametrize(
    ("part", "left"),
    [
        (None, []),
        (pages(0, 6), []),
        (pages(-3, 20), []),
        (pages(0, 2), [pages(2, 4)]),
        (pages(4, 2), [pages(0, 4)]),
        (pages(2, 1), [pages(0, 2), pages(3, 3)]),
        (pages(6, 3), [pages(0, 6)]),
    ],
)
def test_each_piece_that_is_left_is_a_use(
    table: MmapTable, part: AddressRange | None, left: list[AddressRange]
) -> None:
    owner = table.add_owner("owner")
    mapping = table.map(table.offer(owner, BASE, 6 * PAGE).offset, 6 * PAGE)
    mapping.unmap(part)
    assert mapping.pieces == left
    assert owner.users == len(left)
    child = mapping.fork()
    assert owner.users == 2 * len(left)
    mapping.unmap()
    assert owner.users == len(left)
    child.unmap()
    child.unmap()
    assert owner.users == 0
    table.destroy(owner)


@pytest.mark.parametrize("part", [AddressRange(0, 0), AddressRange(1, PAGE), AddressRange(0, 1)])
def test_a_part_is_whole_pages(table: MmapTable, part: AddressRange) -> None:
    owner = table.add_owner("owner")
    mapping = table.map(table.offer(owner, BASE, PAGE).offset, PAGE)
    with refused(errno.EINVAL):
        mapping.unmap(part)
    assert owner.users == 1


def test_what_is_destroyed_offers_nothing_and_has_no_children(table: MmapTable) -> None:
    owner = table.add_owner("owner")
    table.destroy(owner)
    with refused(errno.ENOENT):
        table.offer(owner, BASE, PAGE)
    with refused(errno.ENOENT):
        table.add_owner("child", parent=owner)


def test_after_closing_nothing_works_but_unmapping() -> None:
    released: list[str] = []
    table = MmapTable()
    parent = table.add_owner("parent", on_release=lambda: released.append("parent"))
    child = table.add_owner("child", parent=parent, on_release=lambda: released.append("child"))
    area = table.offer(child, 0, 1 << 16)
    mapping = table.map(area.offset, area.length)
    mapping.unmap(AddressRange(1 << 14, 1 << 15))
    table.close()
    table.close()
    for call in (
        lambda: table.map(area.offset, area.length),
        lambda: table.destroy(child),
        lambda: table.offer(child, 0, 1 << 16),
        lambda: table.add_owner("other"),
    ):
        with refused(errno.EBADF):
            call()
    assert released == []
    mapping.unmap(AddressRange(0, 1 << 14))
    assert released == []
    mapping.unmap()
    assert released == ["child", "parent"]


def test_to_let_go_too_often_is_a_mistake(table: MmapTable) -> None:
    with pytest.raises(UsageError, match="more often"):
        table.add_owner("owner").let_go()


@pytest.mark.parametrize("damage", ["offset", "zero", "owner", "count", "dead", "closed"])
def test_check_finds_damage(damage: str) -> None:
    table = MmapTable(PAGE)
    owner = table.add_owner("owner")
    area = table.offer(owner, BASE, PAGE)
    match damage:
        case "offset":
            table._areas[5 * PAGE] = table._areas.pop(area.offset)
        case "zero":
            table._areas[0] = area._replace(offset=0)
        case "owner":
            owner.areas.clear()
        case "count":
            owner.areas.append(area)
        case "dead":
            owner.alive = False
        case _:
            table.closed = True
    with pytest.raises(InternalError):
        table._check()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 2), st.integers(1, 3)),
        st.tuples(st.just("place"), st.integers(0, 8), st.integers(1, 3)),
        st.tuples(st.just("map"), st.integers(0, 8), st.integers(1, 3)),
        st.tuples(st.just("unmap"), st.integers(0, 3), st.integers(1, 3)),
        st.tuples(st.just("destroy"), st.integers(0, 2), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
def test_it_agrees_with_a_model_of_pages(script: list[tuple[str, int, int]]) -> None:
    table = MmapTable(PAGE)
    owners = [table.add_owner(name) for name in "abc"]
    taken: dict[int, MmapArea] = {}  # page of an offset: what is there
    mappings: list[tuple[MmapMapping, set[int]]] = []
    for step, one, other in script:
        if step == "offer":
            area = table.offer(owners[one], BASE, other * PAGE)
            first = next(
                at for at in range(1, 999) if taken.keys().isdisjoint(range(at, at + other))
            )
            assert area.offset == first * PAGE
            taken.update(dict.fromkeys(range(first, first + other), area))
        elif step == "place":
            at = range(one, one + other)
            if taken.keys().isdisjoint(at):
                area = table.offer(owners[one % 3], BASE, other * PAGE, offset=one * PAGE)
                taken.update(dict.fromkeys(at, area))
            else:
                with refused(errno.EEXIST):
                    table.offer(owners[one % 3], BASE, other * PAGE, offset=one * PAGE)
        elif step == "map":
            there = taken.get(one)
            if there and (there.offset, there.length) == (one * PAGE, other * PAGE):
                mappings.append((table.map(one * PAGE, other * PAGE), set(range(other))))
            else:
                with refused(errno.ENXIO):
                    table.map(one * PAGE, other * PAGE)
        elif step == "unmap":
            if mappings:
                mapping, mapped = mappings[one % len(mappings)]
                mapping.unmap(pages(one, other))
                mapped -= set(range(one, one + other))
        elif uses(mappings, owners[one]):
            with refused(errno.EBUSY):
                table.destroy(owners[one])
        else:
            table.destroy(owners[one])
            taken = {at: area for at, area in taken.items() if area.owner is not owners[one]}
            owners[one] = table.add_owner("again")
        table._check()
        assert [owner.users for owner in owners] == [uses(mappings, owner) for owner in owners]
    table.close()


def uses(mappings: list[tuple[MmapMapping, set[int]]], owner: MmapOwner) -> int:
    """Count runs of mapped pages."""
    return sum(
        sum(page - 1 not in mapped for page in mapped)
        for mapping, mapped in mappings
        if mapping.area.owner is owner
    )
