from __future__ import annotations

import errno
from bisect import insort
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, pages
from viommu.errors import InternalError, PeerError
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import AddressRange, MemoryKind
from viommu.memory.ledger import Placement
from viommu.memory.region import (
    MapParameters,
    Region,
    RegionError,
    RegionOverlapError,
    SubMapping,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def file(memfd: Callable[..., int]) -> Iterator[FileBacking]:
    with FileBacking(memfd()) as backing:
        yield backing


@pytest.fixture
def region(file: FileBacking) -> Region:
    """Eight pages at page 100, with memory in the pages 2, 3 and 5."""
    region = Region("ram", pages(100, 8), MemoryKind.RAM, 255)
    for within in (pages(5), pages(2, 2)):
        mapping = SubMapping(within, file, 0, writable=True)
        region.admit(mapping, PAGE)
        insort(region.mappings, mapping, key=lambda m: m.within)
    return region


@pytest.mark.parametrize(
    ("within", "offset", "number"),
    [
        (pages(2, 2), 0, errno.EEXIST),
        (pages(1, 2), 0, errno.EEXIST),
        (pages(3, 1), 0, errno.EEXIST),
        (pages(4, 2), 0, errno.EEXIST),
        (pages(0, 8), 0, errno.EEXIST),
        (pages(8, 1), 0, errno.EINVAL),
        (pages(7, 2), 0, errno.EINVAL),
        (pages(-1, 2), 0, errno.EINVAL),
        (pages(0, 0), 0, errno.EINVAL),
        (pages(1, -1), 0, errno.EINVAL),
        (AddressRange(0, 1 << 64), 0, errno.EINVAL),
        (AddressRange(1, PAGE), 0, errno.EINVAL),
        (AddressRange(0, PAGE - 1), 0, errno.EINVAL),
        (pages(0), 1, errno.EINVAL),
    ],
)
def test_what_does_not_fit_is_refused(
    region: Region, file: FileBacking, within: AddressRange, offset: int, number: int
) -> None:
    with pytest.raises(RegionError, match="'ram'") as caught:
        region.admit(SubMapping(within, file, offset, writable=True), PAGE)
    assert isinstance(caught.value, PeerError)
    assert caught.value.errno == number


@pytest.mark.parametrize("within", [pages(0, 2), pages(4), pages(6, 2)])
def test_what_fits_between_is_fine(region: Region, file: FileBacking, within: AddressRange) -> None:
    region.admit(SubMapping(within, file, 3 * PAGE, writable=False), PAGE)


def test_pages_count_from_address_zero_not_from_the_region(file: FileBacking) -> None:
    region = Region("odd", AddressRange(100, 100 + 4 * PAGE), MemoryKind.DEVICE, 0)
    region.admit(SubMapping(AddressRange(PAGE - 100, 2 * PAGE - 100), file, 0, writable=True), PAGE)
    with pytest.raises(RegionError, match="not on whole pages"):
        region.admit(SubMapping(pages(0), file, 0, writable=True), PAGE)


@pytest.mark.parametrize(
    ("parameters", "mapping_writable", "expected"),
    [
        (None, True, False),
        (MapParameters(writable=False), True, False),
        (MapParameters(), False, False),
        (MapParameters(), True, True),
    ],
)
def test_both_must_allow_writing(
    region: Region,
    file: FileBacking,
    parameters: MapParameters | None,
    mapping_writable: bool,
    expected: bool,
) -> None:
    region.parameters = parameters
    mapping = SubMapping(pages(0), file, 0, writable=mapping_writable)
    assert region.lets_write(mapping) is expected
    assert region.enabled is (parameters is not None)


def test_an_overlap_names_both_regions() -> None:
    one = Region("flash", pages(0, 2), MemoryKind.RAM, 255)
    other = Region("bar", pages(1, 2), MemoryKind.DEVICE, 0)
    error = RegionOverlapError(one, other)
    assert (error.existing, error.new, error.errno) == ("flash", "bar", errno.EEXIST)
    for part in ("'flash' [0x0, 0x2000), priority 255", "'bar' [0x1000, 0x3000), priority 0"):
        assert part in str(error)


@pytest.mark.parametrize("damage", ["order", "placed", "place", "failure"])
def test_check_finds_damage(region: Region, file: FileBacking, damage: str) -> None:
    region._check()
    match damage:
        case "order":
            region.mappings.reverse()
        case "placed":
            region.active = True
        case "failure":
            region.mappings.clear()
            region.active, region.failure = True, ValueError()
        case _:
            region.active, region.parameters = True, MapParameters()
            for mapping in region.mappings:
                mapping.placement = Placement(
                    "ram", pages(0), file, 0, writable=True, kind=MemoryKind.RAM
                )
    with pytest.raises(InternalError):
        region._check()
