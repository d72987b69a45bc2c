"""UNMAP, virtio 1.2, 5.13.6.6 (ends are inclusive)."""
# ruff: noqa: N802 - a test is named after its row: UN1, not un1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.rig import attach, map_, unmap
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

LAST = (1 << 64) - 1


@pytest.fixture
def mapped(rig: Rig) -> Rig:
    """Return a device with A and B in domain 1 and three mappings: 1 page, a gap, 2 and 1."""
    for request in (
        attach(1, A),
        attach(1, B),
        map_(1, 0x1000, 0x1FFF, 0x8000),
        map_(1, 0x4000, 0x5FFF, 0x10000),
        map_(1, 0x6000, 0x6FFF, 0x20000),
    ):
        assert rig.send(request).status == Status.OK
    return rig


def starts(rig: Rig) -> list[int]:
    assert rig.mappings(A) == rig.mappings(B)
    return [mapping.iova for mapping in rig.mappings(A)]


def test_UN1_reserved_bytes_are_ignored(mapped: Rig, clause: Clause) -> None:
    clause.accepts(mapped.send(unmap(1, 0x1000, 0x1FFF, reserved=b"\xff\xff\xff\xff")))
    assert starts(mapped) == [0x4000, 0x6000]
    clause.observed()


def test_UN2_the_domain_exists(mapped: Rig, clause: Clause) -> None:
    for stranger in (0, 2, 0xFFFF_FFFF):
        clause.rejects(mapped.send(unmap(stranger, 0x1000, 0x1FFF)), Status.NOENT)
    clause.accepts(mapped.send(unmap(1, 0x1000, 0x1FFF)))


def test_UN3_the_domain_is_no_bypass_domain(mapped: Rig, clause: Clause) -> None:
    assert mapped.send(attach(2, B, flags=ATTACH_F_BYPASS)).status == Status.OK
    clause.rejects(mapped.send(unmap(2, 0, 0xFFFF_FFFF)), Status.INVAL)
    clause.accepts(mapped.send(unmap(1, 0, 0xFFFF_FFFF)))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0x4000, 0x4FFF),
        (0x5000, 0x5FFF),
        (0x1000, 0x4FFF),  # one whole mapping before the split one
        (0x5000, 0x6FFF),  # ... and one after it
        (0x0000, 0x6FFE),
        (0x1001, 0xFFFF),
        (0x4800, 0x4801),
    ],
)
def test_UN4_no_mapping_is_split(mapped: Rig, clause: Clause, first: int, last: int) -> None:
    clause.rejects(mapped.send(unmap(1, first, last)), Status.RANGE)
    assert starts(mapped) == [0x1000, 0x4000, 0x6000]
    clause.accepts(mapped.send(unmap(1, 0x4000, 0x5FFF)))


@pytest.mark.parametrize(
    ("first", "last", "left"),
    [
        (0x0000, 0x0FFF, [0x1000, 0x4000, 0x6000]),
        (0x2000, 0x3FFF, [0x1000, 0x4000, 0x6000]),
        (0x0000, 0x1FFF, [0x4000, 0x6000]),
        (0x1000, 0x3FFF, [0x4000, 0x6000]),
        (0x2000, 0x6FFF, [0x1000]),
        (0x0000, 0xFFFF, []),
    ],
)
def test_UN5_gaps_are_no_error(
    mapped: Rig, clause: Clause, first: int, last: int, left: list[int]
) -> None:
    clause.accepts(mapped.send(unmap(1, first, last)))
    assert starts(mapped) == left
    clause.observed()


def test_UN5_a_range_may_end_anywhere_in_a_gap(mapped: Rig, clause: Clause) -> None:
    # The standard asks no alignment of an UNMAP; mappers never hear of such a range.
    clause.accepts(mapped.send(unmap(1, 0x0FF0, 0x2010)))
    assert starts(mapped) == [0x4000, 0x6000]
    clause.observed()


def test_UN5_the_reply_waits_for_memory_in_use(mapped: Rig, clause: Clause) -> None:
    mapper = mapped.mappers[B]
    with mapper.start_export_session() as fault:
        mapper.export(0x4000, 0x10)
        # What is not in use is gone at once.
        clause.accepts(mapped.send(unmap(1, 0x1000, 0x1FFF)))
        assert not fault.is_set()
        parked = mapped.send_parked(unmap(1, 0x4000, 0x6FFF))
        assert fault.is_set()
        assert starts(mapped) == []
        assert not any(event.is_set() for event in parked.events)
        mapper.release(0x4000, 0x10)
    assert all(event.is_set() for event in parked.events)
    assert parked.reply == bytes(4)
    clause.observed()


# The examples of the standard, "map" and "unmap" with a granule of one byte.
EXAMPLES = {
    1: ([], (0, 4), Status.OK, []),
    2: ([(0, 9)], (0, 9), Status.OK, []),
    3: ([(0, 4), (5, 9)], (0, 9), Status.OK, []),
    4: ([(0, 9)], (0, 4), Status.RANGE, [0]),
    5: ([(0, 4), (5, 9)], (0, 4), Status.OK, [5]),
    6: ([(0, 4)], (0, 9), Status.OK, []),
    7: ([(0, 4), (10, 14)], (0, 14), Status.OK, []),
}


def run_example(rig: Rig, number: int) -> tuple[int | None, list[int]]:
    maps, (first, last), _, _ = EXAMPLES[number]
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    for low, high in maps:
        assert rig.send(map_(1, low, high, 0x100)).status == Status.OK
    reply = rig.send(unmap(1, first, last))
    return reply.status, [mapping.iova for mapping in rig.mappings(A)]


@pytest.mark.parametrize("number", EXAMPLES)
def test_UN4_the_examples_of_the_standard(
    make_rig: Callable[..., Rig], clause: Clause, number: int
) -> None:
    _, _, status, left = EXAMPLES[number]
    assert run_example(make_rig(page_size_mask=1), number) == (status, left)
    if status == Status.OK:
        clause.accepted()
    else:
        clause.rejected()


def test_UN6_the_whole_space_can_be_unmapped(make_rig: Callable[..., Rig], clause: Clause) -> None:
    rig = make_rig(input_range=(0, 1 << 64))
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    for first, last in ((0, 0xFFF), (LAST - 0xFFF, LAST)):
        assert rig.send(map_(1, first, last, 0)).status == Status.OK
    clause.accepts(rig.send(unmap(1, 0, LAST)))
    assert rig.mappings(A) == []
    assert rig.send(map_(1, 0, LAST, 0)).status == Status.OK
    clause.rejects(rig.send(unmap(1, 0, LAST - 1)), Status.RANGE)
    clause.rejects(rig.send(unmap(1, 1, LAST)), Status.RANGE)
    clause.rejects(rig.send(unmap(1, LAST, LAST)), Status.RANGE)
    clause.accepts(rig.send(unmap(1, 0, LAST)))


def test_UN6_an_inverted_range_is_refused(mapped: Rig, clause: Clause) -> None:
    for first, last in ((0x2000, 0x1FFF), (0x2000, 0xFFF), (0x7000, 0), (0x1000, 0xFFF)):
        clause.rejects(mapped.send(unmap(1, first, last)), Status.INVAL, Status.RANGE)
    clause.accepts(mapped.send(unmap(1, 0x1000, 0x1FFF)))
