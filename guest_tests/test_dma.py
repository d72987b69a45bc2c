"""A driver in the guest's user space (VFIO) lets ``edu`` do DMA, and stray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_tests.rig import EDU, OTHER_EDU, endpoint_id

if TYPE_CHECKING:
    from typing import Any

    from guest_tests.rig import Rig

FINISH, RELEASE = 0, 1  # what a held transfer does when its memory is unmapped
HOLD_MS = 600
CLOCKS_AGREE = 0.99  # the guest's clock is calibrated against an emulated timer


def test_memory_is_copied_through_the_device(guest: Rig) -> None:
    guest.call("dma.both_ways", bdf=EDU)


def test_strays_are_blocked_and_reported(guest: Rig) -> None:
    outcomes = guest.call("dma.strays", bdf=EDU)

    assert [outcome["what"] for outcome in outcomes] == [
        "read of an unmapped address",
        "write to an unmapped address",
        "write to a read-only mapping",
        "read after unmap",
        "write after unmap",
    ]
    for outcome in outcomes:
        kind = "R" if "read of" in outcome["what"] or "read after" in outcome["what"] else "W"
        assert outcome["result"] == "translation fault"
        assert_reported(outcome, EDU, kind)


def test_two_endpoints_share_one_domain(guest: Rig) -> None:
    outcomes = guest.call("dma.one_domain", first=EDU, second=OTHER_EDU)

    assert [outcome["bdf"] for outcome in outcomes] == [EDU, OTHER_EDU]
    for outcome in outcomes:
        assert_reported(outcome, outcome["bdf"], "W")


def test_an_endpoint_moves_to_another_domain(guest: Rig) -> None:
    assert_reported(guest.call("dma.successive_domains", bdf=EDU), EDU, "W")


def test_an_unmap_waits_for_a_held_transfer(guest: Rig) -> None:
    parked = guest.server.snapshot()["iommu"]["counters"]["parked"]
    guest.vm.start("dma.unmap_held", bdf=EDU, milliseconds=HOLD_MS, policy=FINISH)
    guest.wait_until("the unmap is parked", lambda snapshot: snapshot["iommu"]["waiting"])
    outcome = guest.vm.finish()

    times = outcome["times"]
    assert guest.server.snapshot()["iommu"]["counters"]["parked"] == parked + 1
    assert times["exported"] <= times["faulted"] < times["released"]
    assert times["released"] - times["exported"] >= HOLD_MS * 1_000_000
    waited = times["released"] - times["faulted"]
    assert outcome["seconds"] * 1e9 >= waited * CLOCKS_AGREE, "it returned before the release"
    assert outcome["result"] == "ok"
    assert outcome["arrived"], "the unmap returned before the data was there"


def test_an_unmap_ends_a_transfer_that_lets_go(guest: Rig) -> None:
    outcome = guest.call("dma.unmap_held", bdf=EDU, milliseconds=HOLD_MS, policy=RELEASE)

    times = outcome["times"]
    assert times["exported"] <= times["faulted"] <= times["released"]
    assert times["released"] - times["exported"] < HOLD_MS * 1_000_000
    assert outcome["result"] == "aborted"
    assert not outcome["arrived"]


def assert_reported(outcome: dict[str, Any], bdf: str, kind: str) -> None:
    """Check the line of the guest's log: which endpoint, where, and for what."""
    expected = f"page fault from EP {endpoint_id(bdf)} at {outcome['iova']:#x} [{kind}]"
    assert outcome["log"].endswith(expected), f"{outcome['log']!r} is not {expected!r}"
