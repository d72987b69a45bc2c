"""Which regions are active; the rules seen from outside are in test_regions.py."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, RecordingTarget, pages
from viommu.errors import BackendError, InternalError
from viommu.memory.activation import Activation
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import EVERYWHERE, DmaNeeds, MemoryKind
from viommu.memory.incident import IncidentKind
from viommu.memory.ledger import TargetLedger
from viommu.memory.overlay import Overlay
from viommu.memory.placements import Placements
from viommu.memory.region import MapParameters, Region, SubMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class House:
    """An overlay, its placements and one target."""

    def __init__(self, file: FileBacking) -> None:
        self.file = file
        self.overlay = Overlay()
        self.placements = Placements(64 * PAGE)
        self.activation = Activation(self.overlay, self.placements)
        self.target = RecordingTarget("target")
        self.placements.register(TargetLedger(self.target, "target", DmaNeeds.NONE))

    def region(self, name: str, first: int, priority: int, *filled: tuple[int, int]) -> Region:
        """Add an enabled region of eight pages with memory in the pages ``filled``."""
        region = Region(name, pages(first, 8), MemoryKind.RAM, priority)
        region.parameters = MapParameters()
        for start, count in filled:
            mapping = SubMapping(pages(start, count), self.file, start * PAGE, writable=True)
            insort(region.mappings, mapping, key=lambda m: m.within)
        self.overlay.add(region)
        return region

    def settle(self, needed: Region | None = None) -> list[tuple[str, int, int]]:
        self.activation.settle(EVERYWHERE, needed)
        return self.target.take_calls()


@pytest.fixture
def house(memfd: Callable[..., int]) -> Iterator[House]:
    with FileBacking(memfd()) as file:
        house = House(file)
        yield house
        house.activation._check()
        house.target.refuse.clear()
        for region in house.overlay.all():
            region.parameters = None
        house.settle()
        house.placements.retry(EVERYWHERE)
        assert house.target.entries == {}
        assert house.target.violations == []
        assert file.uses == 1


def test_what_is_seen_is_placed_once(house: House) -> None:
    house.region("ram", 0, 0, (4, 1), (0, 2))
    assert house.settle() == [("map", 0, 2), ("map", 4, 5)]
    assert house.settle() == []


def test_what_is_hidden_goes_before_what_hides_it_comes(house: House) -> None:
    low = house.region("low", 0, 0, (0, 2), (6, 2))
    house.settle()
    high = house.region("high", 0, 1, (1, 1))
    assert house.settle() == [("unmap", 0, 8), ("map", 1, 2)]
    assert (low.active, high.active) == (False, True)
    high.parameters = None
    assert house.settle() == [("unmap", 1, 2), ("map", 0, 2), ("map", 6, 8)]


def test_a_change_of_parameters_goes_from_one_mapping_to_the_next(house: House) -> None:
    """So that as little as possible is unmapped at any time."""
    region = house.region("ram", 0, 0, (0, 1), (2, 1), (4, 1))
    region.mappings[1].writable = False
    house.settle()
    region.parameters = MapParameters(writable=False)
    assert house.settle() == [("unmap", 0, 1), ("map", 0, 1), ("unmap", 4, 5), ("map", 4, 5)]
    assert house.target.mapped() == [(0, 1, False), (2, 3, False), (4, 5, False)]


def test_the_failure_of_the_region_that_matters_is_an_exception(house: House) -> None:
    region = house.region("ram", 0, 0, (0, 1), (2, 1))
    house.target.reject = {2}
    with pytest.raises(BackendError, match="rejects"):
        house.settle(region)
    assert not region.active
    region.parameters = None
    assert house.settle() == [("map", 0, 1), ("map!", 2, 3), ("unmap", 0, 1)]


def test_the_failure_of_another_region_is_remembered_and_tried_again(house: House) -> None:
    region = house.region("ram", 0, 0, (0, 1), (2, 1))
    other = house.region("other", 8, 0, (0, 1))
    house.target.reject = {2}
    house.settle(other)
    assert (region.active, other.active) == (False, True)
    assert "rejects" in str(region.failure)
    (incident,) = house.placements.incidents
    assert incident[:4] == (IncidentKind.NOT_ACTIVE, "ram", region.where, None)
    assert house.target.mapped() == [(8, 9, True)]
    house.activation._check()

    house.target.reject.clear()
    house.settle(other)

    assert (region.active, region.failure) == (True, None)


def test_what_failed_hides_what_is_under_it(house: House) -> None:
    """Better nothing than memory that the guest doesn't see there."""
    low = house.region("low", 0, 0, (0, 1))
    high = house.region("high", 0, 1, (1, 1))
    house.target.reject = {1}
    house.settle()
    assert (low.active, high.active) == (False, False)
    assert "rejects" in str(high.failure)
    assert house.target.entries == {}
    high.parameters = None
    house.settle()
    assert (low.active, high.failure) == (True, None)


def test_only_what_touches_the_range_is_settled(house: House) -> None:
    near, far = house.region("near", 0, 0, (0, 1)), house.region("far", 8, 0, (0, 1))
    house.activation.settle(pages(7))
    assert (near.active, far.active) == (True, False)
    house.settle()


@pytest.mark.parametrize("damage", ["active", "count"])
def test_check_finds_damage(house: House, damage: str) -> None:
    region = house.region("ram", 0, 0, (0, 1))
    house.settle()
    mapping = region.mappings[0]
    placement = mapping.placement
    if damage == "active":
        region.active, mapping.placement = False, None
    else:
        region.mappings.clear()
    with pytest.raises(InternalError):
        house.activation._check()
    region.active, region.mappings, mapping.placement = True, [mapping], placement
