from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import PAGE
from viommu.errors import InternalError, PeerError
from viommu.memory import MappedFile, MappedFiles
from viommu.vfio_user.ioas import Ioas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BASE = 0x10 * PAGE
APERTURES = ((BASE, BASE + 8 * PAGE),)


class House:
    """An address space, and a file to map there."""

    def __init__(self, ioas: Ioas, file: MappedFile) -> None:
        self.ioas = ioas
        self.file = file

    def map(
        self,
        size: int,
        offset: int = 0,
        *,
        iova: int | None = None,
        readable: bool = True,
        writable: bool = True,
    ) -> int:
        file = self.file.retain()
        try:
            return self.ioas.map(
                size, file, offset, readable=readable, writable=writable, iova=iova
            )
        except PeerError:
            file.close()
            raise

    def unmap(self, iova: int, size: int) -> None:
        self.ioas.unmap(iova, size).file.close()

    def mapped(self) -> list[tuple[int, int, int]]:
        return [(region.gpa, region.size, region.offset) for region in self.ioas.regions()]


@pytest.fixture
def house(memfd: Callable[..., int]) -> Iterator[House]:
    files = MappedFiles()
    file = files.get(memfd(16 * PAGE), 0, 16 * PAGE, writable=True)
    house = House(Ioas(1, APERTURES), file)
    yield house
    house.ioas._check()
    for mapping in house.ioas.clear():
        mapping.file.close()
    house.ioas._check()
    file.close()
    assert len(files) == 0


def errno_of(act: Callable[[], object]) -> int:
    with pytest.raises(PeerError) as caught:
        act()
    return caught.value.errno


def test_addresses_are_whole_pages_of_the_aperture(house: House) -> None:
    assert house.map(PAGE) == BASE
    assert house.map(3 * PAGE) == BASE + PAGE
    assert house.map(4 * PAGE) == BASE + 4 * PAGE
    assert errno_of(lambda: house.map(1)) == errno.ENOSPC
    house.unmap(BASE + PAGE, 3 * PAGE)
    assert errno_of(lambda: house.map(3 * PAGE + 1)) == errno.ENOSPC
    assert house.map(3 * PAGE) == BASE + PAGE


@pytest.mark.parametrize(
    ("offset", "size", "in_page", "pages"),
    [
        (0, 1, 0, 1),
        (5 * PAGE, PAGE, 0, 1),
        (0x123, 0x10, 0x123, 1),
        (2 * PAGE + 0xFFF, 1, 0xFFF, 1),
        (2 * PAGE + 0xFFF, 2, 0xFFF, 2),
        (0x800, 2 * PAGE, 0x800, 3),
    ],
)
def test_an_address_begins_as_far_into_its_page_as_the_file_does(
    house: House, offset: int, size: int, in_page: int, pages: int
) -> None:
    assert house.map(size, offset) == BASE + in_page
    # The next one does not share a page with it.
    assert house.map(1) == BASE + pages * PAGE


def test_the_access_and_the_file_are_kept(house: House) -> None:
    first = house.map(PAGE, 3 * PAGE, writable=False)
    second = house.map(PAGE, 5 * PAGE, readable=False)

    regions = house.ioas.regions()

    assert [region.gpa for region in regions] == [first, second]
    assert [(region.readable, region.writable) for region in regions] == [
        (True, False),
        (False, True),
    ]
    assert [region.offset for region in regions] == [3 * PAGE, 5 * PAGE]
    assert {region.file for region in regions} == {house.file}


@pytest.mark.parametrize(
    "iova", [0, 0x123, BASE + 0x10, (1 << 64) - PAGE], ids=["zero", "odd", "aperture", "top"]
)
def test_a_chosen_address_may_be_anywhere(house: House, iova: int) -> None:
    assert house.map(PAGE, iova=iova) == iova
    assert house.mapped() == [(iova, PAGE, 0)]


@pytest.mark.parametrize(
    ("iova", "size", "number"),
    [
        (BASE, PAGE, errno.EEXIST),
        (BASE - 1, 2, errno.EEXIST),
        (BASE + 2 * PAGE - 1, PAGE, errno.EEXIST),
        (BASE - PAGE, 4 * PAGE, errno.EEXIST),
        ((1 << 64) - PAGE, PAGE + 1, errno.EINVAL),
        ((1 << 64) - 1, 2, errno.EINVAL),
    ],
)
def test_a_chosen_address_that_can_t_be_is_refused(
    house: House, iova: int, size: int, number: int
) -> None:
    house.map(2 * PAGE)
    before = house.mapped()

    assert errno_of(lambda: house.map(size, iova=iova)) == number
    assert house.mapped() == before


def test_no_address_is_given_out_that_somebody_chose(house: House) -> None:
    house.map(0x10, iova=BASE + PAGE + 0x20)
    house.map(0x10, iova=BASE + PAGE + 0x80)

    assert house.map(2 * PAGE) == BASE + 2 * PAGE
    assert house.map(PAGE) == BASE
    # A page is free again only when the last mapping in it has gone.
    house.unmap(BASE + PAGE + 0x20, 0x10)
    assert house.map(PAGE) == BASE + 4 * PAGE
    house.unmap(BASE + PAGE + 0x80, 0x10)
    assert house.map(PAGE) == BASE + PAGE


def test_pages_that_neighbours_touch_stay_taken(house: House) -> None:
    house.map(PAGE, iova=BASE + 0x800)
    house.map(PAGE, iova=BASE + 0x800 + PAGE)
    house.map(PAGE, iova=BASE + 0x800 + 2 * PAGE)

    house.unmap(BASE + 0x800 + PAGE, PAGE)

    assert house.map(PAGE) == BASE + 4 * PAGE


@pytest.mark.parametrize(
    ("iova", "size"),
    [(BASE, PAGE), (BASE + PAGE, PAGE), (BASE, 3 * PAGE), (BASE - PAGE, PAGE), (0, 0)],
)
def test_only_exactly_what_was_mapped_is_unmapped(house: House, iova: int, size: int) -> None:
    house.map(2 * PAGE)

    assert errno_of(lambda: house.unmap(iova, size)) == errno.ENOENT
    assert house.mapped() == [(BASE, 2 * PAGE, 0)]


def test_a_part_of_a_mapping_is_found(house: House) -> None:
    house.map(2 * PAGE, 4 * PAGE)

    assert house.ioas.find(BASE, 2 * PAGE).offset == 4 * PAGE
    assert house.ioas.find(BASE + 0x10, 0x10).iova == BASE


@pytest.mark.parametrize(
    ("iova", "size"),
    [(BASE, 3 * PAGE), (BASE - 1, 2), (0, PAGE), (BASE + 3 * PAGE, 1), (BASE, 1 << 63)],
)
def test_what_is_not_in_one_mapping_is_not_found(house: House, iova: int, size: int) -> None:
    house.map(2 * PAGE)
    house.map(PAGE, iova=BASE + 2 * PAGE)

    assert errno_of(lambda: house.ioas.find(iova, size)) == errno.ENOENT


def test_clearing_gives_every_mapping_back(house: House) -> None:
    for _ in range(4):
        house.map(PAGE)

    removed = house.ioas.clear()

    assert [mapping.iova for mapping in removed] == [BASE + n * PAGE for n in range(4)]
    assert len(house.ioas) == 0
    assert house.map(8 * PAGE) == BASE
    for mapping in removed:
        mapping.file.close()


def test_addresses_say_nothing_of_where_this_process_has_the_file(
    house: House, memfd: Callable[..., int]
) -> None:
    files = MappedFiles()
    other = House(Ioas(2, APERTURES), files.get(memfd(64 * PAGE), 0, PAGE, writable=True))

    assert [house.map(PAGE) for _ in range(3)] == [other.map(PAGE) for _ in range(3)]

    for mapping in other.ioas.clear():
        mapping.file.close()
    other.file.close()


@pytest.mark.parametrize("damage", ["address", "offset", "file", "free"])
def test_the_check_notices_damage(house: House, damage: str) -> None:
    iova = house.map(PAGE)
    mapping = house.ioas._mappings[iova]
    if damage == "address":
        house.ioas._mappings[0] = mapping
    elif damage == "offset":
        house.ioas._mappings[iova] = mapping._replace(offset=7)
    elif damage == "free":
        house.ioas._free.give(iova, iova + PAGE)
    else:
        house.ioas._mappings[iova] = mapping._replace(file=Closed())  # type: ignore[arg-type] # as far as is looked at

    with pytest.raises(InternalError):
        house.ioas._check()
    house.ioas._mappings = {iova: mapping}
    house.ioas._free.take(iova, iova + PAGE)


class Closed:
    """A file that nobody uses."""

    uses = 0
