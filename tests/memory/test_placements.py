"""Order, rollback and what lingers; which region wins is tested with the region manager."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, Call, RecordingTarget, pages, peek
from viommu.errors import BackendError, InternalError
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import EVERYWHERE, DmaNeeds, HostAddressMissingError, MemoryKind
from viommu.memory.incident import Incident, IncidentKind
from viommu.memory.ledger import Placement, TargetLedger
from viommu.memory.placements import Placements
from viommu.memory.va_mapper import OutsideReservationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESERVED = 64


@pytest.fixture
def calls() -> list[Call]:
    """What all targets of a test are asked, in one order."""
    return []


@pytest.fixture
def file(memfd: Callable[..., int]) -> Iterator[FileBacking]:
    with FileBacking(memfd()) as backing:
        yield backing
        assert backing.uses == 1, "a use was not given back"


@pytest.fixture
def placements(file: FileBacking) -> Iterator[Placements]:
    placements = Placements(RESERVED * PAGE)
    yield placements
    placements._check()
    for ledger in placements.targets():
        if isinstance(ledger.target, RecordingTarget):
            ledger.target.refuse.clear()
        placements.unregister(ledger)
    placements.unplace(list(placements._placed.values()))
    assert (len(placements), placements.lingering, placements.addresses) == (0, [], None)


def register(
    placements: Placements, calls: list[Call], name: str, needs: DmaNeeds = DmaNeeds.NONE
) -> RecordingTarget:
    target = RecordingTarget(name, needs, calls)
    placements.register(TargetLedger(target, name, needs))
    return target


def piece(
    file: FileBacking,
    first: int,
    count: int = 1,
    *,
    writable: bool = True,
    kind: MemoryKind = MemoryKind.RAM,
) -> Placement:
    return Placement("region", pages(first, count), file, 0, writable=writable, kind=kind)


def kinds(incidents: list[Incident]) -> list[IncidentKind]:
    return [incident.kind for incident in incidents]


def test_an_address_comes_first_and_goes_last(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    """The target itself looks at the address, when it maps and when it unmaps."""
    target = register(placements, calls, "type1", DmaNeeds.HOST_VA)
    placed = placements.place(piece(file, 2, 2))
    assert placed.host_va is not None
    assert target.entries[2 * PAGE].host_va == placed.host_va
    assert peek(placed.host_va) == b"\0"

    address = placed.host_va
    placements.unplace([placed])

    assert target.violations == []
    assert peek(address) is None
    assert target.take_calls() == [("map", 2, 4), ("unmap", 2, 4)]


def test_targets_are_told_in_the_order_of_registration(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    for name in "abc":
        register(placements, calls, name)
    placed = placements.place(piece(file, 0))
    placements.unplace([placed])
    assert [(call.name, call.what) for call in calls] == [
        ("a", "map"), ("b", "map"), ("c", "map"),
        ("a", "unmap"), ("b", "unmap"), ("c", "unmap"),
    ]  # fmt: skip


def test_ram_that_one_target_cant_map_is_unmapped_from_the_others_backwards(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    for name in "abcd":
        target = register(placements, calls, name, DmaNeeds.HOST_VA)
        target.reject = {0} if name == "c" else set()
    with pytest.raises(BackendError, match="c rejects") as caught:
        placements.place(piece(file, 0))
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.__notes__ == ["while c mapped [0x0, 0x1000) of 'region'"]
    assert [(call.name, call.what, call.ok) for call in calls] == [
        ("a", "map", True), ("b", "map", True), ("c", "map", False),
        ("b", "unmap", True), ("a", "unmap", True),
    ]  # fmt: skip
    assert placements.addresses is not None
    assert list(placements.addresses) == []
    assert len(placements) == 0


def test_device_memory_is_mapped_by_whoever_can(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    able, unable = (register(placements, calls, name) for name in ("able", "unable"))
    unable.reject = {0}
    placed = placements.place(piece(file, 0, kind=MemoryKind.DEVICE))
    (incident,) = placements.incidents
    assert incident[:4] == (IncidentKind.NOT_MAPPED, "region", pages(0), "unable")
    assert incident.times == placements.targets()[1].tolerated == 1
    assert str(incident) == (
        "[0x0, 0x1000) of 'region' (unable): device memory not mapped:"
        " unable rejects [0x0, 0x1000): Cannot allocate memory"
    )

    calls.clear()
    placements.unplace([placed])

    assert calls == [Call("able", "unmap", 0, 1)]  # nothing there: nothing asked
    assert able.entries == {}


def test_a_target_without_an_address_says_so_and_the_others_go_on(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    register(placements, calls, "type1", DmaNeeds.HOST_VA)
    other = register(placements, calls, "iommufd", DmaNeeds.FILE)
    placements.place(piece(file, RESERVED, kind=MemoryKind.DEVICE))
    assert [type(incident.error) for incident in placements.incidents] == [
        OutsideReservationError,
        HostAddressMissingError,
    ]
    assert kinds(placements.incidents) == [IncidentKind.NO_ADDRESS, IncidentKind.NOT_MAPPED]
    assert other.mapped() == [(RESERVED, RESERVED + 1, True)]


def test_ram_beyond_the_reservation_is_an_error_once_an_address_is_needed(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    register(placements, calls, "iommufd", DmaNeeds.FILE)
    placements.place(piece(file, 0))
    far = placements.place(piece(file, RESERVED - 1, 2))
    with pytest.raises(OutsideReservationError) as caught:
        register(placements, calls, "type1", DmaNeeds.HOST_VA)
    assert caught.value.__notes__ == ["while placing [0x3f000, 0x41000) of 'region'"]
    assert placements.addresses is None
    placements.unplace([far])

    register(placements, calls, "type1", DmaNeeds.HOST_VA)
    with pytest.raises(OutsideReservationError):
        placements.place(piece(file, RESERVED - 1, 2))
    assert len(placements) == 1


def test_the_host_refusing_the_reservation_is_an_error(calls: list[Call]) -> None:
    placements = Placements(1 << 60)
    with pytest.raises(BackendError) as caught:
        register(placements, calls, "type1", DmaNeeds.HOST_VA)
    assert caught.value.errno == errno.ENOMEM
    assert placements.targets() == []
    placements._check()


def test_a_target_that_comes_late_is_told_of_everything_in_order(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    for first in (5, 1, 3):
        placements.place(piece(file, first))
    target = register(placements, calls, "late", DmaNeeds.HOST_VA)
    assert target.take_calls() == [("map", 1, 2), ("map", 3, 4), ("map", 5, 6)]
    assert target.violations == []


def test_a_replay_that_fails_is_undone_backwards(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    for first in range(4):
        placements.place(piece(file, first))
    target = RecordingTarget("late", DmaNeeds.HOST_VA)
    target.reject = {2}
    with pytest.raises(BackendError, match="late rejects"):
        placements.register(TargetLedger(target, "late", target.needs))
    assert target.take_calls() == [
        ("map", 0, 1), ("map", 1, 2), ("map!", 2, 3), ("unmap", 1, 2), ("unmap", 0, 1),
    ]  # fmt: skip
    assert target.violations == []
    assert (placements.targets(), placements.addresses) == ([], None)


def test_a_replay_that_cant_be_undone_keeps_the_memory(
    placements: Placements, file: FileBacking
) -> None:
    placed = [placements.place(piece(file, first)) for first in range(3)]
    target = RecordingTarget("late", DmaNeeds.HOST_VA)
    target.reject, target.refuse = {2}, {0}
    with pytest.raises(BackendError, match="late rejects"):
        placements.register(TargetLedger(target, "late", target.needs))
    assert placements.registered == []
    (ledger,) = placements.leaving
    assert [entry.placement for entry in ledger.stuck()] == [placed[0]]
    assert kinds(placements.incidents) == [IncidentKind.NOT_UNMAPPED]
    placements.unplace(placed)
    assert placements.lingering == [placed[0]]
    assert placed[0].host_va is not None
    placements._check()

    target.refuse.clear()
    placements.retry(EVERYWHERE)

    assert target.violations == []
    assert (target.entries, placements.targets(), placements.lingering) == ({}, [], [])
    assert placements.addresses is None


def test_the_addresses_live_as_long_as_somebody_needs_them(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    placed = placements.place(piece(file, 0))
    one = register(placements, calls, "one", DmaNeeds.HOST_VA)
    register(placements, calls, "other", DmaNeeds.HOST_VA | DmaNeeds.FILE)
    register(placements, calls, "none")
    addresses = placements.addresses
    assert addresses is not None
    assert addresses.uses == 2
    first, second, third = placements.targets()
    placements.unregister(first)
    placements.unregister(third)
    assert placed.host_va is not None
    assert peek(placed.host_va) == b"\0"

    placements.unregister(second)

    assert addresses.uses == 0
    assert one.violations == []


def test_what_the_last_target_gives_back_the_next_one_gets_anew(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    placed = placements.place(piece(file, 0))
    for cycle in range(3):
        bad = RecordingTarget("bad", DmaNeeds.HOST_VA, calls)
        bad.reject = {0}
        with pytest.raises(BackendError):
            placements.register(TargetLedger(bad, "bad", bad.needs))
        assert (placements.addresses, placed.host_va) == (None, None)

        target = register(placements, calls, f"target {cycle}", DmaNeeds.HOST_VA)
        (entry,) = target.entries.values()
        assert entry.first == (b"\0",)
        placements.unregister(*placements.targets())
        assert (placements.addresses, placed.host_va) == (None, None)
        assert target.violations == bad.violations == []


def test_what_a_target_refuses_to_unmap_stays_where_it_is(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    good = register(placements, calls, "good", DmaNeeds.HOST_VA)
    bad = register(placements, calls, "bad", DmaNeeds.HOST_VA)
    placed = placements.place(piece(file, 0))
    bad.refuse = {0}
    placements.unplace([placed])
    (incident,) = placements.incidents
    assert incident[:4] == (IncidentKind.NOT_UNMAPPED, "region", pages(0), "bad")
    assert (good.mapped(), bad.mapped()) == ([], [(0, 1, True)])
    assert placements.lingering == [placed]
    assert placed.host_va is not None
    assert peek(placed.host_va) == b"\0"
    assert file.uses == 2
    placements._check()

    bad.refuse.clear()
    placements.retry(pages(5))
    assert placements.lingering == [placed]
    placements.retry(pages(0))

    assert placements.lingering == []
    assert file.uses == 1
    assert bad.violations == []


def test_the_same_memory_takes_the_place_of_what_lingers(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    register(placements, calls, "good", DmaNeeds.HOST_VA)
    bad = register(placements, calls, "bad", DmaNeeds.HOST_VA)
    placed = placements.place(piece(file, 0))
    address = placed.host_va
    bad.refuse = {0}
    placements.unplace([placed])
    calls.clear()

    again = placements.place(piece(file, 0))

    assert again is placed
    assert again.host_va == address
    assert calls == [Call("good", "map", 0, 1)]  # "bad" has it already
    assert placements.lingering == []


@pytest.mark.parametrize("needs", [DmaNeeds.NONE, DmaNeeds.HOST_VA])
def test_other_memory_has_to_wait_for_what_lingers(
    placements: Placements, file: FileBacking, calls: list[Call], needs: DmaNeeds
) -> None:
    bad = register(placements, calls, "bad", needs)
    placed = placements.place(piece(file, 0, 2))
    bad.refuse = {0}
    placements.unplace([placed])
    calls.clear()

    with pytest.raises(BackendError) as caught:
        placements.place(piece(file, 0, 2, writable=False))
    assert caught.value.errno == errno.EBUSY
    assert calls == [Call("bad", "unmap", 0, 2, ok=False)]  # it was asked once more
    assert placements.lingering == [placed]
    placements._check()

    bad.refuse.clear()
    placements.place(piece(file, 1, writable=False))
    assert bad.mapped() == [(1, 2, False)]
    assert placements.lingering == []
    assert bad.violations == []


def test_device_memory_over_what_lingers_does_without_that_target(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    bad = register(placements, calls, "bad", DmaNeeds.HOST_VA)
    good = register(placements, calls, "good")
    placed = placements.place(piece(file, 0, kind=MemoryKind.DEVICE))
    bad.refuse = {0}
    placements.unplace([placed])
    placements.incidents.clear()

    placements.place(piece(file, 0, writable=False, kind=MemoryKind.DEVICE))

    assert kinds(placements.incidents) == [
        IncidentKind.NOT_UNMAPPED,
        IncidentKind.NO_ADDRESS,
        IncidentKind.NOT_MAPPED,
    ]
    assert bad.mapped() == [(0, 1, True)]
    assert good.mapped() == [(0, 1, False)]


def test_a_released_target_that_refuses_keeps_memory_and_addresses(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    bad = register(placements, calls, "bad", DmaNeeds.HOST_VA)
    placed = placements.place(piece(file, 0))
    bad.refuse = {0}
    (ledger,) = placements.targets()
    assert [entry.placement for entry in placements.unregister(ledger)] == [placed]
    assert (placements.registered, placements.leaving) == ([], [ledger])
    placements.place(piece(file, 1))
    assert bad.mapped() == [(0, 1, True)]  # it is told of nothing new
    assert list(placements.addresses or ()) == [pages(0), pages(1)]
    placements._check()

    bad.refuse.clear()
    assert placements.unregister(ledger) == []

    assert placements.targets() == []
    assert placements.addresses is None
    assert bad.violations == []


def test_a_bug_of_a_target_is_undone_and_not_hidden(
    placements: Placements, file: FileBacking, calls: list[Call]
) -> None:
    class Broken(RecordingTarget):
        def map_dma(self, *args: object, **options: object) -> None:
            raise ZeroDivisionError

    other = register(placements, calls, "other", DmaNeeds.HOST_VA)
    broken = TargetLedger(Broken("broken"), "broken", DmaNeeds.NONE)
    placements.register(broken)
    with pytest.raises(ZeroDivisionError):
        placements.place(piece(file, 0, kind=MemoryKind.DEVICE))
    assert (other.entries, len(placements), placements.lingering) == ({}, 0, [])


@pytest.mark.parametrize(
    "damage", ["holders", "unknown", "backing", "stuck", "missing", "users", "addresses"]
)
def test_check_finds_damage(memfd: Callable[..., int], damage: str) -> None:
    with FileBacking(memfd()) as file:
        placements = Placements(RESERVED * PAGE)
        target = register(placements, [], "target", DmaNeeds.HOST_VA)
        placed = placements.place(piece(file, 0))
        placements._check()
        (ledger,) = placements.targets()
        addresses = placements.addresses
        assert addresses is not None
        match damage:
            case "holders":
                placed.holders = 2
            case "unknown":
                placements._placed.clear()
            case "backing":
                placed.backing._uses = 0
            case "stuck":
                ledger._stuck[0] = ValueError()
            case "missing":
                ledger._held.clear()
                placed.holders = 0
            case "users":
                addresses.retain()
            case _:
                placed.host_va = None
        with pytest.raises(InternalError):
            placements._check()
        while addresses.uses:
            addresses.close()
        file._uses = 1
        assert target.violations == []
