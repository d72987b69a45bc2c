from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, RecordingTarget, pages
from viommu.errors import BackendError, InternalError
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import EVERYWHERE, DmaNeeds, MemoryKind
from viommu.memory.ledger import Placement, TargetLedger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def file(memfd: Callable[..., int]) -> Iterator[FileBacking]:
    with FileBacking(memfd()) as backing:
        yield backing


@pytest.fixture
def target() -> Iterator[RecordingTarget]:
    target = RecordingTarget("target")
    yield target
    assert target.violations == []


@pytest.fixture
def ledger(target: RecordingTarget) -> Iterator[TargetLedger]:
    ledger = TargetLedger(target, target.name, target.needs)
    yield ledger
    ledger._check()


def placement(
    file: FileBacking, first: int, count: int = 1, *, writable: bool = True, offset: int = 0
) -> Placement:
    return Placement(
        "region", pages(first, count), file, offset, writable=writable, kind=MemoryKind.RAM
    )


def test_a_target_is_told_all_there_is_to_know(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    piece = placement(file, 3, 2, writable=False, offset=PAGE)
    ledger.map(piece)

    (entry,) = target.entries.values()
    assert entry == (pages(3, 2), None, file, PAGE, False, MemoryKind.RAM, ())
    assert list(ledger) == [piece]
    assert piece.holders == len(ledger) == 1


def test_private_memory_comes_without_a_file(ledger: TargetLedger, target: RecordingTarget) -> None:
    with PrivateBacking(PAGE) as backing:
        ledger.map(Placement("region", pages(0), backing, 0, writable=True, kind=MemoryKind.DEVICE))
    assert target.entries[0].file is None
    assert target.entries[0].kind is MemoryKind.DEVICE


def test_what_was_not_mapped_is_not_held(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    target.reject = {1}
    piece = placement(file, 0, 2)
    with pytest.raises(BackendError):
        ledger.map(piece)
    assert (len(ledger), piece.holders) == (0, 0)


def test_unmapping_is_one_call_from_the_first_to_the_last(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    pieces = [placement(file, 2), placement(file, 4, 2), placement(file, 9)]
    for piece in pieces:
        ledger.map(piece)
    target.take_calls()

    assert ledger.unmap([pieces[1], pieces[0], placement(file, 20)]) == []

    assert target.take_calls() == [("unmap", 2, 6)]
    assert list(ledger) == [pieces[2]]
    assert [piece.holders for piece in pieces] == [0, 0, 1]


def test_nothing_held_is_nothing_asked(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    assert ledger.unmap([placement(file, 0)]) == []
    assert ledger.unmap_all() == []
    assert target.calls == []


def test_everything_is_unmapped_backwards_and_one_by_one(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    for first in (4, 0, 2):
        ledger.map(placement(file, first))
    target.take_calls()

    ledger.unmap_all()

    assert target.take_calls() == [("unmap", 4, 5), ("unmap", 2, 3), ("unmap", 0, 1)]


def test_after_a_failure_each_is_asked_for_so_that_it_is_known_what_is_left(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    pieces = [placement(file, first) for first in range(4)]
    for piece in pieces:
        ledger.map(piece)
    target.take_calls()
    target.refuse = {1}

    stuck = ledger.unmap(pieces)

    assert target.take_calls() == [
        ("unmap!", 0, 4),  # page 0 is gone by now
        ("unmap", 0, 1),
        ("unmap!", 1, 2),
        ("unmap", 2, 3),
        ("unmap", 3, 4),
    ]
    assert [entry.placement for entry in stuck] == [pieces[1]]
    assert ledger.stuck() == stuck
    assert "refuses" in str(stuck[0].error)
    assert ledger.refused == 2
    assert [piece.holders for piece in pieces] == [0, 1, 0, 0]
    ledger._check()


def test_a_retry_asks_for_what_is_stuck_in_the_range(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    for first in range(4):
        ledger.map(placement(file, first))
    target.refuse = {1, 3}
    ledger.unmap(list(ledger)[1:])
    target.take_calls()

    (left,) = ledger.retry(pages(0, 3))
    assert left.placement.where == pages(1)
    assert target.take_calls() == [("unmap!", 1, 2)]
    target.refuse.clear()
    assert ledger.retry(EVERYWHERE) == []

    assert target.take_calls() == [("unmap", 1, 2), ("unmap", 3, 4)]
    assert target.mapped() == [(0, 1, True)]


def test_what_is_stuck_is_held_again_when_the_same_is_mapped(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    piece = placement(file, 0)
    ledger.map(piece)
    target.refuse = {0}
    ledger.unmap([piece])
    target.take_calls()

    ledger.map(piece)

    assert target.take_calls() == []
    assert ledger.stuck() == []
    assert piece.holders == 1


def test_nothing_is_mapped_over_what_is_stuck(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    piece = placement(file, 2, 2)
    ledger.map(piece)
    target.refuse = {2}
    ledger.unmap([piece])
    target.take_calls()

    for other in (placement(file, 2, 2), placement(file, 3), placement(file, 0, 3)):
        with pytest.raises(BackendError, match="could not unmap") as caught:
            ledger.map(other)
        assert caught.value.errno == errno.EBUSY
    assert target.take_calls() == []
    ledger.map(placement(file, 4))
    ledger.map(placement(file, 1))


def test_a_range_that_covers_what_is_stuck_takes_it_along(
    ledger: TargetLedger, target: RecordingTarget, file: FileBacking
) -> None:
    pieces = [placement(file, first) for first in range(3)]
    for piece in pieces:
        ledger.map(piece)
    target.refuse = {1}
    ledger.unmap([pieces[1]])
    target.refuse.clear()

    assert ledger.unmap([pieces[0], pieces[2]]) == []

    assert (len(ledger), ledger.stuck(), target.entries) == (0, [], {})
    assert pieces[1].holders == 0


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), KeyError("a bug of the target")])
def test_whatever_a_target_raises_the_entry_stays_in_the_books(
    file: FileBacking, error: Exception
) -> None:
    class Broken(RecordingTarget):
        def unmap_dma(self, where: object, /) -> None:
            raise error

    ledger = TargetLedger(Broken("broken"), "broken", DmaNeeds.NONE)
    ledger.map(placement(file, 0))

    assert [entry.error for entry in ledger.unmap_all()] == [error]
    assert len(ledger) == 1


def test_placements_are_the_same_when_a_target_would_not_notice(
    file: FileBacking, memfd: Callable[..., int]
) -> None:
    piece = placement(file, 1, 2)
    assert piece.is_same_as(placement(file, 1, 2))
    with FileBacking(memfd()) as other:
        for different in (
            placement(other, 1, 2),
            placement(file, 0, 2),
            placement(file, 1, 1),
            placement(file, 1, 2, writable=False),
            placement(file, 1, 2, offset=PAGE),
        ):
            assert not piece.is_same_as(different)


@pytest.mark.parametrize("damage", ["start", "overlap", "holders", "stuck"])
def test_check_finds_damage(file: FileBacking, damage: str) -> None:
    ledger = TargetLedger(RecordingTarget("target"), "target", DmaNeeds.NONE)
    ledger.map(placement(file, 0))
    ledger.map(placement(file, 1))
    match damage:
        case "start":
            ledger._held[5] = ledger._held.pop(0)
        case "overlap":
            ledger._held[0].where = pages(0, 2)
        case "holders":
            ledger._held[0].holders = 0
        case _:
            ledger._stuck[5] = ValueError()
    with pytest.raises(InternalError):
        ledger._check()
