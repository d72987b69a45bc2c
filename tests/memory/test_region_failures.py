"""The region manager when targets fail: what is undone, tolerated, remembered."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.memory.house import RESERVED
from tests.memory.recording import RecordingTarget, pages, peek
from viommu.errors import BackendError
from viommu.memory.dma_target import (
    DmaNeeds,
    HostAddressMissingError,
    MemoryKind,
)
from viommu.memory.incident import IncidentKind, IncompleteError
from viommu.memory.va_mapper import OutsideReservationError, VaMapper

if TYPE_CHECKING:
    from tests.memory.house import House
    from viommu.memory.dma_target import AddressRange

DEVICE = MemoryKind.DEVICE


# Failures to map


def test_a_failed_enable_is_undone_in_every_target(house: House) -> None:
    for name in "abc":
        house.target(name, DmaNeeds.HOST_VA).reject = {3} if name == "b" else set()
    region = house.region("ram", 0, 8, (0, 2), (3, 1), (5, 1), enable=False)
    with pytest.raises(BackendError, match="b rejects") as caught:
        house.manager.enable(region)
    assert caught.value.errno == errno.ENOMEM
    assert [(c.name, c.what, c.first) for c in house.calls] == [
        ("a", "map", 0), ("b", "map", 0), ("c", "map", 0),
        ("a", "map", 3), ("b", "map", 3),
        ("a", "unmap", 3),  # the current piece, from the targets before the one that failed
        ("a", "unmap", 0), ("b", "unmap", 0), ("c", "unmap", 0),  # then what was complete
    ]  # fmt: skip
    assert (region.enabled, region.active, region.failure) == (False, False, None)
    assert house.take_incidents() == []


def test_a_failed_enable_can_be_tried_again(house: House) -> None:
    """And a region inside it can be enabled meanwhile."""
    target = house.target()
    inside = house.region("inside", 1, 1, (0, 1), kind=DEVICE, enable=False)
    region = house.region("ram", 0, 4, (0, 2), enable=False)
    target.reject = {0}
    for _ in range(2):
        with pytest.raises(BackendError):
            house.manager.enable(region)
    house.manager.enable(inside)
    assert target.mapped() == [(1, 2, True)]
    target.reject.clear()
    house.manager.enable(region)
    assert target.mapped() == [(0, 2, True)]


def test_what_was_hidden_comes_back_when_enabling_fails(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    hidden = [house.region(str(at), at, 1, (0, 1), kind=DEVICE) for at in (0, 2)]
    window = house.region("window", 0, 4, (3, 1), priority=9, enable=False)
    target.reject = {3}
    with pytest.raises(BackendError):
        house.manager.enable(window)
    assert target.mapped() == [(0, 1, True), (2, 3, True)]
    assert all(region.active for region in hidden)
    assert house.take_incidents() == []


def test_a_sub_mapping_that_fails_is_not_added(house: House) -> None:
    good, bad = house.target("good", DmaNeeds.HOST_VA), house.target("bad")
    region = house.region("ram", 0, 4, (0, 1))
    bad.reject = {2}
    uses = house.file.uses
    with pytest.raises(BackendError, match="bad rejects"):
        house.manager.add_mapping(region, pages(2), house.file, 0)
    assert house.file.uses == uses
    assert good.mapped() == bad.mapped() == [(0, 1, True)]
    assert len(region.mappings) == 1
    bad.reject.clear()
    house.fill(region, 2)
    assert bad.mapped() == [(0, 1, True), (2, 3, True)]


def test_a_replay_that_fails_is_undone_in_reverse(house: House) -> None:
    house.region("ram", 0, 4, (0, 1), (1, 1), (2, 1))
    target = RecordingTarget("late", DmaNeeds.HOST_VA, house.calls)
    target.reject = {2}
    with pytest.raises(BackendError, match="late rejects"):
        house.manager.register(target, "late", target.needs)
    assert house.take_calls() == [
        ("map", 0, 1), ("map", 1, 2), ("map!", 2, 3), ("unmap", 1, 2), ("unmap", 0, 1),
    ]  # fmt: skip
    assert target.violations == []
    assert house.manager.snapshot()["targets"] == []
    house.region("later", 8, 1, (0, 1))
    assert house.take_calls() == []


def test_device_memory_that_cant_be_mapped_is_reported_and_not_fatal(house: House) -> None:
    able, unable = house.target("able"), house.target("unable")
    unable.reject = {1}
    bar = house.region("bar", 0, 4, (0, 1), (1, 1), (2, 1), kind=DEVICE)
    assert house.take_incidents() == [(IncidentKind.NOT_MAPPED, "bar", "unable")]
    assert able.mapped() == [(0, 1, True), (1, 2, True), (2, 3, True)]
    assert unable.mapped() == [(0, 1, True), (2, 3, True)]
    house.take_calls()

    house.manager.disable(bar)  # the gap is no error

    assert house.take_calls() == [("unmap", 0, 3), ("unmap", 0, 3)]
    assert house.take_incidents() == []
    unable.reject = {0, 1, 2}
    house.manager.enable(bar)
    assert unable.mapped() == []
    house.calls.clear()
    house.manager.remove_mappings(bar, pages(0, 2))
    assert {call.name for call in house.calls} == {"able"}


def test_replay_tolerates_device_memory_too(house: House) -> None:
    house.region("bar", 0, 2, (0, 1), (1, 1), kind=DEVICE)
    target = RecordingTarget("late")
    target.reject = {0}
    with house.manager.register(target, "late"):
        assert target.mapped() == [(1, 2, True)]
    assert house.take_incidents() == [(IncidentKind.NOT_MAPPED, "bar", "late")]


def test_a_target_that_needs_an_address_and_gets_none_says_so(house: House) -> None:
    target = house.target("type1", DmaNeeds.HOST_VA)
    house.region("bar", RESERVED, 2, (0, 1), kind=DEVICE)
    errors = [type(incident.error) for incident in house.incidents]
    assert errors == [OutsideReservationError, HostAddressMissingError]
    assert target.mapped() == []
    with pytest.raises(OutsideReservationError):
        house.region("ram", RESERVED + 8, 2, (0, 1))
    (region,) = (r for r in house.manager.regions() if r.name == "ram")
    assert not region.enabled
    house.take_incidents()


@pytest.mark.parametrize("first", [1 << 40, (1 << 52) - 1])
def test_no_address_is_cut_off(house: House, first: int) -> None:
    """The highest addresses that there are, first without a need for virtual ones."""
    target = house.target()
    house.region("far", first, 1, (0, 1))
    assert target.mapped() == [(first, first + 1, True)]
    with pytest.raises(OutsideReservationError, match="reserve more"):
        house.target("type1", DmaNeeds.HOST_VA)
    house.targets.pop()


# Failures to unmap


def test_an_unmap_that_fails_keeps_the_memory_and_says_so(house: House) -> None:
    good, bad = house.target("good"), house.target("bad", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4, (0, 1), (2, 1))
    bad.refuse = {2}
    with pytest.raises(IncompleteError, match=r"\[0x2000, 0x3000\) of 'ram' \(bad\)") as caught:
        house.manager.disable(region)
    assert caught.value.errno == errno.EBUSY
    assert house.take_incidents() == [(IncidentKind.NOT_UNMAPPED, "ram", "bad")]
    assert (region.enabled, region.active) == (False, False)
    assert good.mapped() == []
    (left,) = bad.entries.values()
    assert left.host_va is not None
    assert peek(left.host_va) == b"\3"
    house.manager._check()

    with pytest.raises(IncompleteError):
        house.manager.retry()
    bad.refuse.clear()
    house.manager.retry()

    assert bad.mapped() == []
    assert peek(left.host_va) is None


def test_the_same_region_can_be_enabled_over_what_was_left(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4, (0, 1), (2, 1))
    target.refuse = {2}
    with pytest.raises(IncompleteError):
        house.manager.disable(region)
    house.take_calls()
    house.manager.enable(region)
    assert house.take_calls() == [("map", 0, 1)]
    assert target.mapped() == [(0, 1, True), (2, 3, True)]


@pytest.mark.parametrize("needs", [DmaNeeds.NONE, DmaNeeds.HOST_VA])
def test_nothing_else_is_enabled_over_what_was_left(house: House, needs: DmaNeeds) -> None:
    target = house.target("target", needs)
    region = house.region("ram", 0, 4, (0, 1))
    target.refuse = {0}
    with pytest.raises(IncompleteError):
        house.manager.remove_region(region)
    assert house.manager.regions() == []
    region = house.region("ram", 0, 4, enable=False)
    house.fill(region, 0, writable=False)
    with pytest.raises(BackendError) as caught:
        house.manager.enable(region)
    assert caught.value.errno == errno.EBUSY
    assert not region.enabled
    assert target.mapped() == [(0, 1, True)]

    target.refuse.clear()
    house.manager.enable(region)  # it tries to clear the way itself

    assert target.mapped() == [(0, 1, False)]
    house.take_incidents()


def test_when_what_hides_cant_replace_what_is_stuck_all_stays(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    bar = house.region("bar", 0, 1, (0, 1), kind=DEVICE)
    window = house.region("window", 0, 4, (0, 4), enable=False)
    target.refuse = {0}
    with pytest.raises(BackendError):
        house.manager.enable(window)
    assert bar.active
    assert target.mapped() == [(0, 1, True)]
    house.take_incidents()
    target.refuse.clear()
    house.manager.disable(bar)
    assert target.mapped() == []


def test_a_stuck_read_write_mapping_does_not_become_read_only_by_wishing(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4, (0, 1), (1, 1))
    target.refuse = {1}
    with pytest.raises(BackendError):
        house.manager.enable(region, writable=False)
    assert region.parameters == (True,)
    assert target.mapped() == [(0, 1, True), (1, 2, True)]
    assert region.active
    house.take_incidents()


def test_a_sub_mapping_that_is_not_unmapped_is_removed_all_the_same(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4, (0, 1), (1, 1), (2, 1))
    target.refuse = {1}
    with pytest.raises(IncompleteError) as caught:
        house.manager.remove_mappings(region, pages(0, 3))
    assert [(i.kind, i.where) for i in caught.value.incidents] == [
        (IncidentKind.NOT_UNMAPPED, pages(1))
    ]
    assert region.mappings == []
    assert target.mapped() == [(1, 2, True)]
    house.manager._check()
    house.fill(region, 0)
    house.manager.disable(region)  # asks for [0, 1) only, and so says nothing of page 1
    target.refuse.clear()
    house.manager.retry()
    assert target.mapped() == []
    house.take_incidents()


def test_a_release_that_fails_can_be_tried_again(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4, (0, 1), (1, 1))
    target.refuse = {0}
    with pytest.raises(IncompleteError), house.registrations[0]:
        pass
    assert target.mapped() == [(0, 1, True)]
    house.fill(region, 2)
    assert target.mapped() == [(0, 1, True)]
    with pytest.raises(IncompleteError):
        house.registrations[0].release()
    with pytest.raises(IncompleteError):
        house.manager.disable(region)
    house.take_incidents()
    target.refuse.clear()
    house.registrations[0].release()
    assert target.mapped() == []


# What was hidden can't come back


def test_what_cant_come_back_is_reported_and_tried_again(house: House) -> None:
    target = house.target("target", DmaNeeds.HOST_VA)
    low = house.region("low", 0, 4, (0, 1), (1, 1), priority=0)
    high = house.region("high", 0, 4, (2, 1), priority=1)
    target.reject = {1}
    with pytest.raises(IncompleteError, match=r"'low'.*region can't be active.*rejects"):
        house.manager.disable(high)
    assert (high.active, low.active) == (False, False)
    assert "rejects" in str(low.failure)
    assert target.mapped() == []
    assert house.take_incidents() == [(IncidentKind.NOT_ACTIVE, "low", None)]
    with pytest.raises(IncompleteError):
        house.manager.retry()
    with pytest.raises(BackendError, match="rejects"):
        house.manager.enable(low)
    house.take_incidents()
    target.reject.clear()
    house.manager.enable(low)
    assert (low.active, low.failure) == (True, None)
    assert target.mapped() == [(0, 1, True), (1, 2, True)]


def test_what_one_target_made_impossible_works_without_it(house: House) -> None:
    good, bad = house.target("good"), house.target("bad")
    low = house.region("low", 0, 4, (0, 1), priority=0)
    high = house.region("high", 0, 4, priority=1)
    bad.reject = {0}
    with pytest.raises(IncompleteError):
        house.manager.disable(high)
    house.registrations[1].release()
    assert low.active
    assert good.mapped() == [(0, 1, True)]
    house.take_incidents()


def test_a_target_registered_while_a_region_fails_gets_it_when_that_works(house: House) -> None:
    failing = house.target("failing")
    low = house.region("low", 0, 4, (0, 1), (1, 1), priority=0)
    high = house.region("high", 0, 4, (2, 1), priority=1)
    failing.reject = {1}
    with pytest.raises(IncompleteError):
        house.manager.disable(high)
    house.take_calls()
    late = house.target("late", DmaNeeds.HOST_VA)
    assert house.take_calls() == []  # what one target can't have is nobody's

    failing.reject.clear()
    house.manager.retry()

    assert low.active
    assert failing.mapped() == late.mapped() == [(0, 1, True), (1, 2, True)]
    house.take_incidents()


# The host itself fails


def test_an_address_that_the_host_does_not_take_back_is_reported_and_tried_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of kernel memory, which no test can have in earnest."""
    target = house.target("target", DmaNeeds.HOST_VA)
    region = house.region("ram", 0, 4, (0, 1))

    def out_of_memory(mapper: VaMapper, where: AddressRange) -> None:
        raise BackendError(errno.ENOMEM, f"vacate {where} of {mapper.size:#x}")

    with monkeypatch.context() as patch:
        patch.setattr(VaMapper, "unmap", out_of_memory)
        with pytest.raises(IncompleteError, match="host virtual address not given back"):
            house.manager.disable(region)
        house.manager._check()
    assert target.mapped() == []
    assert house.take_incidents() == [(IncidentKind.NOT_VACATED, "ram", None)]
    house.manager.enable(region)  # the same memory takes the place that it never lost
    assert target.mapped() == [(0, 1, True)]


def test_only_what_is_left_in_the_end_is_complained_about(house: House) -> None:
    """Taking away a window brings back a BAR, which one target can't map: that is tolerated."""
    target = house.target("target", DmaNeeds.HOST_VA)
    bar = house.region("bar", 0, 1, (0, 1), kind=DEVICE)
    window = house.region("window", 0, 4, (1, 1), kind=DEVICE, priority=1)
    target.reject = {0}
    house.manager.disable(window)
    assert bar.active
    assert house.take_incidents() == [(IncidentKind.NOT_MAPPED, "bar", "target")]
