"""The region manager, seen by recording targets."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, Call, RecordingTarget, pages, peek
from viommu.errors import BackendError, InternalError, PeerError, UsageError
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import (
    EVERYWHERE,
    AddressRange,
    DmaNeeds,
    DmaTarget,
    FileMissingError,
    MemoryKind,
)
from viommu.memory.incident import Incident, IncidentKind
from viommu.memory.region import RegionError, RegionOverlapError
from viommu.memory.regions import RegionManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.memory.house import House
    from viommu.memory.incident import Incident

DEVICE = MemoryKind.DEVICE


# Regions


def test_overlapping_regions_are_refused_by_name(house: House) -> None:
    house.region("ram", 0, 8)
    house.region("window", 8, 4, kind=DEVICE, priority=7)
    with pytest.raises(RegionOverlapError) as caught:
        house.region("bar", 7, 2, kind=DEVICE)
    assert (caught.value.existing, caught.value.new) == ("window", "bar")
    assert caught.value.errno == errno.EEXIST
    assert [region.name for region in house.manager.regions()] == ["ram", "window"]
    house.region("bar", 8, 2, kind=DEVICE)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        (pages(1, 0), errno.EINVAL),
        (pages(1, -1), errno.EINVAL),
        (pages(-1, 2), errno.EINVAL),
        (AddressRange((1 << 64) - PAGE, (1 << 64) + 1), errno.EINVAL),
        (AddressRange(1 << 64, (1 << 64) + PAGE), errno.EINVAL),
    ],
)
def test_a_region_outside_the_address_space_is_refused(
    house: House, where: AddressRange, number: int
) -> None:
    with pytest.raises(RegionError) as caught:
        house.manager.add_region("bad", where)
    assert caught.value.errno == number
    assert isinstance(caught.value, PeerError)
    assert house.manager.regions() == []


def test_names_and_priorities_are_checked(house: House) -> None:
    house.region("ram", 0, 1)
    with pytest.raises(RegionError, match="'ram' already") as caught:
        house.region("ram", 5, 1)
    assert caught.value.errno == errno.EEXIST
    for priority in (-1, 256):
        with pytest.raises(UsageError, match=str(priority)):
            house.region("other", 5, 1, priority=priority)


def test_the_numbers_of_regions_and_mappings_are_limited(memfd: Callable[..., int]) -> None:
    manager = RegionManager(max_regions=2)
    regions = [manager.add_region(name, pages(at)) for at, name in enumerate("ab")]
    with pytest.raises(RegionError, match="more than 2 regions") as caught:
        manager.add_region("c", pages(2))
    assert caught.value.errno == errno.ENOSPC
    with FileBacking(memfd()) as file:
        for region in regions:
            manager.add_mapping(region, pages(0), file.retain())
        manager.remove_region(regions.pop())
        other = manager.add_region("c", pages(2, 2))
        manager.add_mapping(other, pages(0), file.retain())
        with pytest.raises(RegionError, match="more than 2 sub-mappings") as caught:
            manager.add_mapping(other, pages(1), file)
        assert caught.value.errno == errno.ENOSPC
        for region in manager.regions():
            manager.remove_region(region)
        assert file.uses == 1


def test_a_region_of_somebody_else_is_a_mistake(house: House) -> None:
    region = house.region("ram", 0, 1)
    house.manager.remove_region(region)
    for call in (house.manager.enable, house.manager.disable, house.manager.remove_region):
        with pytest.raises(UsageError, match="not one of these regions"):
            call(region)


# Targets are told


def test_registration_replays_what_is_active_in_order(house: House) -> None:
    house.region("high", 8, 4, (2, 1), (0, 1))
    house.region("low", 0, 4, (1, 2))
    house.region("off", 16, 4, (0, 4), enable=False)
    target = house.target()
    assert house.take_calls() == [("map", 1, 3), ("map", 8, 9), ("map", 10, 11)]
    assert isinstance(target, DmaTarget)


def test_changes_are_told_live(house: House) -> None:
    house.target()
    region = house.region("ram", 4, 8, (0, 2))
    assert house.take_calls() == [("map", 4, 6)]
    house.fill(region, 3)
    assert house.take_calls() == [("map", 7, 8)]
    house.manager.remove_mappings(region, pages(0, 2))
    assert house.take_calls() == [("unmap", 4, 6)]
    house.manager.remove_region(region)
    assert house.take_calls() == [("unmap", 7, 8)]


def test_a_target_gets_everything_it_may_need(house: House) -> None:
    type1 = house.target("type1", DmaNeeds.HOST_VA)
    iommufd = house.target("iommufd", DmaNeeds.FILE)
    region = house.region("bar", 4, 4, kind=DEVICE)
    house.fill(region, 2, 2, writable=False)
    (one,), (other,) = type1.entries.values(), iommufd.entries.values()
    assert one[:6] == (pages(6, 2), one.host_va, house.file, 2 * PAGE, False, DEVICE)
    assert one.first == (b"\3", b"\4")
    assert other[:6] == (pages(6, 2), None, house.file, 2 * PAGE, False, DEVICE)


def test_a_disabled_region_is_nobodys_business(house: House) -> None:
    house.target()
    region = house.region("ram", 0, 4, (0, 1), enable=False)
    house.fill(region, 2)
    house.manager.remove_mappings(region, pages(0))
    house.manager.disable(region)
    house.manager.remove_region(region)
    assert house.take_calls() == []


def test_disabling_is_one_unmap_for_all_of_a_region(house: House) -> None:
    house.target()
    region = house.region("ram", 4, 8, (1, 1), (3, 2), (7, 1))
    house.take_calls()
    house.manager.disable(region)
    assert house.take_calls() == [("unmap", 5, 12)]
    assert not region.active
    house.manager.disable(region)
    house.manager.enable(region)
    assert house.take_calls() == [("map", 5, 6), ("map", 7, 9), ("map", 11, 12)]


def test_to_enable_twice_is_to_enable_once(house: House) -> None:
    house.target()
    region = house.region("ram", 0, 4, (0, 1))
    house.take_calls()
    house.manager.enable(region)
    assert house.take_calls() == []


def test_release_unmaps_all_backwards_and_ends_it(house: House) -> None:
    house.target("other")
    target = house.target("released", DmaNeeds.HOST_VA)
    house.region("ram", 0, 4, (0, 1), (2, 1))
    house.region("bar", 8, 1, (0, 1), kind=DEVICE)
    house.take_calls()
    with house.registrations[-1]:
        pass
    assert house.take_calls() == [("unmap", 8, 9), ("unmap", 2, 3), ("unmap", 0, 1)]
    assert target.entries == {}
    house.registrations[-1].release()
    house.region("later", 16, 1, (0, 1))
    assert house.calls == [Call("other", "map", 16, 17)]


def test_contiguous_regions_have_contiguous_addresses(house: House) -> None:
    target = house.target("type1", DmaNeeds.HOST_VA)
    house.region("ram", 0, 2, (0, 2))
    house.region("bar", 2, 1, (0, 1), kind=DEVICE)
    ram, bar = target.entries.values()
    assert ram.host_va is not None
    assert bar.host_va == ram.host_va + 2 * PAGE
    assert peek(ram.host_va + PAGE, PAGE + 1) == b"\2" + bytes(PAGE - 1) + b"\1"


# Overlays


def test_a_region_hides_what_it_contains_and_gives_it_back(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    one = house.region("one", 1, 1, (0, 1), kind=DEVICE)
    other = house.region("other", 3, 2, (0, 2), kind=DEVICE)
    house.take_calls()
    window = house.region("window", 0, 8, (1, 4), kind=DEVICE, priority=9)
    assert house.take_calls() == [("unmap", 1, 2), ("unmap", 3, 5), ("map", 1, 5)]
    assert [region.active for region in (one, other, window)] == [False, False, True]
    house.manager.disable(other)
    house.manager.enable(other, writable=False)
    assert house.take_calls() == []
    house.manager.disable(window)
    assert house.take_calls() == [("unmap", 1, 5), ("map", 1, 2), ("map", 3, 5)]
    assert target.mapped() == [(1, 2, True), (3, 5, False)]


def test_a_hidden_region_changes_in_secret(house: House) -> None:
    house.target()
    house.region("ram", 0, 4, (0, 1))
    bar = house.region("bar", 0, 4, kind=DEVICE)
    house.take_calls()
    house.fill(bar, 1)
    house.fill(bar, 2)
    house.manager.remove_mappings(bar, pages(1))
    assert house.take_calls() == []
    house.manager.remove_region(house.manager.regions()[0])
    assert house.take_calls() == [("unmap", 0, 1), ("map", 2, 3)]


def test_of_equals_the_older_one_is_seen(house: House) -> None:
    target = house.target()
    first = house.region("first", 0, 2, (0, 1), kind=DEVICE)
    second = house.region("second", 0, 2, (1, 1), kind=DEVICE)
    assert target.mapped() == [(0, 1, True)]
    house.manager.disable(first)
    assert target.mapped() == [(1, 2, True)]
    house.manager.enable(first)
    assert target.mapped() == [(0, 1, True)]
    house.manager.remove_region(first)
    assert second.active
    assert target.mapped() == [(1, 2, True)]


def test_a_target_registered_meanwhile_sees_the_overlay(house: House) -> None:
    house.region("bar", 1, 1, (0, 1), kind=DEVICE)
    window = house.region("window", 0, 4, (3, 1), kind=DEVICE, priority=1)
    target = house.target()
    assert target.mapped() == [(3, 4, True)]
    house.manager.disable(window)
    assert target.mapped() == [(1, 2, True)]


# Parameters


def test_read_only_reaches_targets_and_addresses(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    region = house.region("rom", 0, 4, (0, 2))
    house.fill(region, 3, writable=False)
    house.take_calls()
    house.manager.enable(region, writable=False)
    # Only what changes is touched, and each piece for as short as possible.
    assert house.take_calls() == [("unmap", 0, 2), ("map", 0, 2)]
    assert target.mapped() == [(0, 2, False), (3, 4, False)]
    house.manager.enable(region)
    assert target.mapped() == [(0, 2, True), (3, 4, False)]


def test_parameters_change_everywhere_or_nowhere(house: House) -> None:
    good, bad = house.target("good", DmaNeeds.HOST_VA), house.target("bad")
    region = house.region("ram", 0, 4, (0, 1), (1, 1))
    bad.reject = {1}
    before = good.mapped()
    with pytest.raises(BackendError, match="bad rejects"):
        house.manager.enable(region, writable=False)
    # Mapping it back fails as well here: then nobody has it, and it is known why.
    assert house.take_incidents() == [(IncidentKind.NOT_ACTIVE, "ram", None)]
    assert (region.enabled, region.active) == (True, False)
    assert good.entries == bad.entries == {}
    bad.reject.clear()
    house.manager.retry()
    assert good.mapped() == bad.mapped() == before


def test_a_failed_change_of_parameters_is_undone(house: House) -> None:
    class Once(RecordingTarget):
        """Fails the first time that it is to map read-only."""

        failures = 1

        def map_dma(self, where: AddressRange, /, *, writable: bool, **rest: object) -> None:
            if not writable and where == pages(1) and self.failures:
                self.failures -= 1
                raise BackendError(errno.ENOMEM, "no more page tables")
            super().map_dma(where, writable=writable, **rest)  # type: ignore[arg-type]  # passed on

    region = house.region("ram", 0, 4, (0, 1), (1, 1), (2, 1))
    house.target("good", DmaNeeds.HOST_VA)
    bad = Once("bad")
    house.targets.append(bad)
    house.registrations.append(house.manager.register(bad, "bad"))
    with pytest.raises(BackendError, match="page tables"):
        house.manager.enable(region, writable=False)
    for target in house.targets:
        assert target.mapped() == [(0, 1, True), (1, 2, True), (2, 3, True)]
    assert region.parameters == (True,)
    assert region.active
    assert house.take_incidents() == []
    house.manager.enable(region, writable=False)
    assert bad.mapped() == [(0, 1, False), (1, 2, False), (2, 3, False)]


# Private memory


def test_private_memory_is_mapped_by_address(house: House) -> None:
    target = house.target("type1", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4)
    memory = PrivateBacking(4 * PAGE)
    memory.view[2 * PAGE] = ord("P")
    house.manager.add_mapping(region, pages(1, 2), memory, 2 * PAGE)
    (entry,) = target.entries.values()
    assert entry.file is None
    assert entry.first == (b"P", b"\0")
    house.manager.disable(region)
    assert memory.view[2 * PAGE] == ord("P")
    house.manager.enable(region)
    assert target.entries[PAGE].first == (b"P", b"\0")


def test_a_target_that_needs_files_refuses_private_memory_that_is_there(house: House) -> None:
    region = house.region("ram", 0, 4, (0, 1), enable=False)
    house.manager.add_mapping(region, pages(1), PrivateBacking(PAGE))
    with pytest.raises(FileMissingError, match="'ram'") as caught:
        house.target("iommufd", DmaNeeds.FILE)
    house.targets.pop()
    assert caught.value.errno == errno.EOPNOTSUPP
    house.target("type1", DmaNeeds.HOST_VA)
    house.manager.remove_mappings(region, pages(1))
    house.target("iommufd", DmaNeeds.FILE)


def test_private_memory_is_refused_while_a_target_needs_files(house: House) -> None:
    house.target("iommufd", DmaNeeds.FILE)
    region = house.region("ram", 0, 4, enable=False)
    with PrivateBacking(PAGE) as memory:
        with pytest.raises(FileMissingError, match="iommufd"):
            house.manager.add_mapping(region, pages(0), memory)
        assert memory.uses == 1
        house.registrations[0].release()
        house.manager.add_mapping(region, pages(0), memory.retain())


# Sub-mappings


def test_a_sub_mapping_is_checked_before_anything_is_done(house: House) -> None:
    house.target()
    region = house.region("ram", 0, 4, (1, 1))
    house.take_calls()
    uses = house.file.uses
    for within, offset, number in (
        (pages(1), 0, errno.EEXIST),
        (pages(4), 0, errno.EINVAL),
        (pages(0), 1, errno.EINVAL),
        (pages(2), 16 * PAGE, errno.EINVAL),
        (EVERYWHERE, 0, errno.EINVAL),
    ):
        with pytest.raises(PeerError) as caught:
            house.manager.add_mapping(region, within, house.file, offset)
        assert caught.value.errno == number
    assert house.take_calls() == []
    assert house.file.uses == uses


def test_a_read_only_file_is_not_mapped_for_writing(house: House) -> None:
    """Not even where nobody looks: iommufd would not refuse it."""
    region = house.region("rom", 0, 4, enable=False)
    fd = os.open(f"/proc/self/fd/{house.fd}", os.O_RDONLY)
    with FileBacking(fd) as file:
        os.close(fd)
        with pytest.raises(PeerError, match="can't be written"):
            house.manager.add_mapping(region, pages(0), file)
        house.manager.add_mapping(region, pages(0), file.retain(), writable=False)
    target = house.target("type1", DmaNeeds.HOST_VA)
    house.manager.enable(region)
    assert target.mapped() == [(0, 1, False)]


def test_removal_is_exact_and_may_cover_gaps(house: House) -> None:
    target = house.target()
    region = house.region("ram", 0, 12, (0, 1), (2, 2), (4, 1), (8, 2))
    house.take_calls()
    with pytest.raises(RegionError, match=r"splits \[0x2000, 0x4000\)") as caught:
        house.manager.remove_mappings(region, pages(3, 9))
    assert caught.value.errno == errno.EINVAL
    assert len(target.mapped()) == 4
    house.manager.remove_mappings(region, pages(1, 5))
    assert house.take_calls() == [("unmap", 2, 4), ("unmap", 4, 5)]
    house.manager.remove_mappings(region, pages(1, 5))
    assert house.take_calls() == []
    assert target.mapped() == [(0, 1, True), (8, 10, True)]


# One change at a time


def test_a_target_cant_change_regions_while_they_change(house: House) -> None:
    class Meddler(RecordingTarget):
        def map_dma(self, where: AddressRange, /, **rest: object) -> None:
            house.manager.register(RecordingTarget("friend"), "friend")

    meddler = Meddler("meddler")
    house.registrations.append(house.manager.register(meddler, "meddler"))
    with pytest.raises(UsageError, match="from within a change"):
        house.region("ram", 0, 1, (0, 1))
    house.manager.remove_region(house.manager.regions()[0])
    house.registrations.pop().release()


def test_who_is_told_may_change_regions(memfd: Callable[..., int]) -> None:
    """Reports come when the change is over."""
    removed: list[str] = []

    def report(incident: Incident) -> None:
        removed.append(incident.region)
        manager.remove_region(next(r for r in manager.regions() if r.name == incident.region))

    manager = RegionManager(report=report)
    target = RecordingTarget("target")
    target.reject = {0}
    manager.register(target, "target")
    bar = manager.add_region("bar", pages(0), DEVICE)
    manager.add_mapping(bar, pages(0), FileBacking(memfd()))
    manager.enable(bar)
    assert removed == ["bar"]
    assert manager.regions() == []


def test_the_log_tells_of_incidents_less_and_less_often(
    memfd: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    manager = RegionManager()
    target = RecordingTarget("target")
    target.reject = {0}
    manager.register(target, "target")
    bar = manager.add_region("bar", pages(0), DEVICE)
    manager.add_mapping(bar, pages(0), FileBacking(memfd()))
    with caplog.at_level(logging.WARNING, "viommu"):
        for _ in range(9):
            manager.enable(bar)
            manager.disable(bar)
    assert len(caplog.records) == 4  # the 1st, 2nd, 4th and 8th
    assert "of 'bar' (target): device memory not mapped: target rejects" in caplog.text
    manager.remove_region(bar)


@pytest.mark.parametrize("damage", ["names", "count"])
def test_check_finds_damage(house: House, damage: str) -> None:
    region = house.region("ram", 0, 1, (0, 1))
    if damage == "names":
        house.manager._regions["other"] = house.manager._regions.pop("ram")
        house.manager._regions["again"] = region
    else:
        house.manager._mappings = 5
    with pytest.raises(InternalError):
        house.manager._check()
    house.manager._regions = {"ram": region}
    house.manager._mappings = 1
