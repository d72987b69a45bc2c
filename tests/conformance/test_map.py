"""MAP, virtio 1.2, 5.13.6.5 (ends are inclusive)."""
# ruff: noqa: N802 - a test is named after its row: MA1, not ma1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.rig import RW, attach, detach, map_
from viommu.domain import X86_MSI_WINDOW, ReservedRegion
from viommu.errors import Access
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

LAST = (1 << 64) - 1


@pytest.fixture
def attached(rig: Rig) -> Rig:
    """Return a device with A and B in domain 1."""
    for endpoint in (A, B):
        assert rig.send(attach(1, endpoint)).status == Status.OK
    return rig


@pytest.mark.parametrize(
    ("first", "last", "phys"),
    [
        (0x1001, 0x1FFF, 0),
        (0x1800, 0x1FFF, 0),
        (0x1000, 0x1FFE, 0),
        (0x1000, 0x2000, 0),
        (0x1000, 0x1FFF, 1),
        (0x1000, 0x1FFF, 0x800),
        (0x1800, 0x27FF, 0x800),
    ],
)
def test_MA1_starts_and_end_are_aligned(
    attached: Rig, clause: Clause, first: int, last: int, phys: int
) -> None:
    clause.rejects(attached.send(map_(1, first, last, phys)), Status.RANGE)
    clause.accepts(attached.send(map_(1, 0x1000, 0x1FFF, 0)))


@pytest.mark.parametrize("granule", [1, 0x10000, 1 << 63])
def test_MA1_the_granule_is_the_lowest_bit_of_the_mask(
    make_rig: Callable[..., Rig], clause: Clause, granule: int
) -> None:
    rig = make_rig(page_size_mask=granule | 1 << 63, input_range=(0, 1 << 64))
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    if granule > 1:
        half = granule // 2
        clause.rejects(rig.send(map_(1, half, granule - 1, 0)), Status.RANGE)
        clause.rejects(rig.send(map_(1, 0, half - 1, 0)), Status.RANGE)
        clause.rejects(rig.send(map_(1, 0, granule - 1, half)), Status.RANGE)
    clause.accepts(rig.send(map_(1, granule, 2 * granule - 1, 0)))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0x3000, 0x4FFF),  # the same
        (0x3000, 0x3FFF),
        (0x4000, 0x4FFF),
        (0x2000, 0x3FFF),
        (0x4000, 0x5FFF),
        (0x2000, 0x5FFF),
        (0x0000, 0xFFFF),
    ],
)
def test_MA2_mappings_do_not_overlap(attached: Rig, clause: Clause, first: int, last: int) -> None:
    clause.accepts(attached.send(map_(1, 0x3000, 0x4FFF, 0x8000)))
    clause.rejects(attached.send(map_(1, first, last, 0x8000)), Status.INVAL)


def test_MA2_neighbours_and_aliases_are_no_overlap(attached: Rig, clause: Clause) -> None:
    for first, last in ((0x3000, 0x3FFF), (0x2000, 0x2FFF), (0x4000, 0x4FFF)):
        clause.accepts(attached.send(map_(1, first, last, 0x8000)))


def test_MA2_each_domain_has_a_space_of_its_own(attached: Rig, clause: Clause) -> None:
    assert attached.send(attach(2, B)).status == Status.OK
    clause.accepts(attached.send(map_(1, 0x1000, 0x1FFF, 0x8000)))
    clause.accepts(attached.send(map_(2, 0x1000, 0x1FFF, 0x9000)))
    assert attached.reach(A, 0x1000) == [(0x8000, 1)]
    assert attached.reach(B, 0x1000) == [(0x9000, 1)]


def test_MA3_unknown_flags_are_refused(attached: Rig, clause: Clause) -> None:
    for bit in range(3, 32):
        clause.rejects(attached.send(map_(1, 0x1000, 0x1FFF, 0, flags=1 << bit)), Status.INVAL)
        both = 1 << bit | RW | spec.MAP_F_MMIO
        clause.rejects(attached.send(map_(1, 0x1000, 0x1FFF, 0, flags=both)), Status.INVAL)
    for flags in range(1, 8):
        first = flags << 12
        clause.accepts(attached.send(map_(1, first, first + 0xFFF, 0, flags=flags)))


def test_MA3_mmio_is_unknown_until_it_is_negotiated(attached: Rig, clause: Clause) -> None:
    attached.iommu.accept_features(attached.iommu.features & ~(1 << spec.Feature.MMIO))
    mmio = RW | spec.MAP_F_MMIO
    clause.rejects(attached.send(map_(1, 0x1000, 0x1FFF, 0, flags=mmio)), Status.INVAL)
    clause.accepts(attached.send(map_(1, 0x1000, 0x1FFF, 0)))


def test_MA4_the_domain_exists(attached: Rig, clause: Clause) -> None:
    for stranger in (0, 2, 0xFFFF_FFFF):
        clause.rejects(attached.send(map_(stranger, 0x1000, 0x1FFF, 0)), Status.NOENT)
    clause.accepts(attached.send(map_(1, 0x1000, 0x1FFF, 0)))
    for endpoint in (A, B):
        assert attached.send(detach(1, endpoint)).status == Status.OK
    clause.rejects(attached.send(map_(1, 0x1000, 0x1FFF, 0)), Status.NOENT)


def test_MA5_the_domain_is_no_bypass_domain(attached: Rig, clause: Clause) -> None:
    assert attached.send(attach(2, A, flags=ATTACH_F_BYPASS)).status == Status.OK
    clause.rejects(attached.send(map_(2, 0x1000, 0x1FFF, 0)), Status.INVAL)
    clause.accepts(attached.send(map_(1, 0x1000, 0x1FFF, 0)))


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (0, Access.NONE),
        (spec.MAP_F_READ, Access.READ),
        (spec.MAP_F_WRITE, Access.WRITE),
        (RW, Access.READ | Access.WRITE),
        (RW | spec.MAP_F_MMIO, Access.READ | Access.WRITE),
    ],
)
def test_MA6_access_is_what_the_flags_say(
    attached: Rig, clause: Clause, flags: int, allowed: Access
) -> None:
    assert attached.send(map_(1, 0x1000, 0x1FFF, 0x8000, flags=flags)).status == Status.OK
    for endpoint in (A, B):
        for access in (Access.READ, Access.WRITE, Access.READ | Access.WRITE):
            blocked = attached.is_blocked(endpoint, 0x1000, 0x1000, access)
            assert blocked == bool(access & ~allowed)
            if blocked:
                clause.rejected()
            else:
                clause.accepted()


def test_MA6_one_page_without_the_flag_stops_the_whole_write(attached: Rig, clause: Clause) -> None:
    for iova, flags in ((0x1000, RW), (0x2000, spec.MAP_F_READ), (0x3000, RW)):
        assert attached.send(map_(1, iova, iova + 0xFFF, iova, flags=flags)).status == Status.OK
    assert attached.is_blocked(A, 0x1000, 0x3000, Access.WRITE)
    assert attached.is_blocked(A, 0x1FFF, 2, Access.WRITE)
    clause.rejected()
    assert not attached.is_blocked(A, 0x1000, 0x3000, Access.READ)
    clause.accepted()


def test_MA7_the_end_is_not_before_the_start(attached: Rig, clause: Clause) -> None:
    for first, last in ((0x2000, 0x1FFF), (0x2000, 0x0FFF), (0x2000, 0), (0x8000_0000, 0xFFF)):
        clause.rejects(attached.send(map_(1, first, last, 0)), Status.INVAL, Status.RANGE)
    clause.accepts(attached.send(map_(1, 0x2000, 0x2FFF, 0)))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0xFEE00000, 0xFEEFFFFF),
        (0xFEE01000, 0xFEE01FFF),
        (0xFEDFF000, 0xFEE00FFF),
        (0xFEEFF000, 0xFEF00FFF),
        (0xFED00000, 0xFEFFFFFF),
        (0, 0xFFFFFFFF),
        (0x10000, 0x10FFF),
    ],
)
def test_MA8_reserved_regions_stay_clear(
    make_rig: Callable[..., Rig], clause: Clause, first: int, last: int
) -> None:
    rig = make_rig()
    rig.add(A, [X86_MSI_WINDOW, ReservedRegion(0x10000, 0x11000)])
    assert rig.send(attach(1, A)).status == Status.OK
    clause.rejects(rig.send(map_(1, first, last, 0)), Status.INVAL)
    clause.accepts(rig.send(map_(1, 0x11000, 0xFEDFFFFF, 0)))
    clause.accepts(rig.send(map_(1, 0xFEF00000, 0xFFFFFFFF, 0)))


def test_MA9_all_of_the_address_space_is_one_mapping(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    rig = make_rig(input_range=(0, 1 << 64))
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    passes_the_end = rig.send(map_(1, 0, LAST, 0x1000))
    clause.rejects(passes_the_end, Status.RANGE, Status.INVAL)
    clause.accepts(rig.send(map_(1, 0, LAST, 0)))
    assert rig.reach(A, LAST) == [(LAST, 1)]
    assert rig.reach(A, 0, 1 << 64) == [(0, 1 << 64)]
    clause.rejects(rig.send(map_(1, LAST - 0xFFF, LAST, 0)), Status.INVAL)


def test_MA9_the_last_page_maps_like_any_other(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    rig = make_rig(input_range=(0, 1 << 64))
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    top = LAST - 0xFFF
    clause.rejects(rig.send(map_(1, 0, 0x1FFF, top)), Status.RANGE, Status.INVAL)
    clause.accepts(rig.send(map_(1, top, LAST, 0x8000)))
    clause.accepts(rig.send(map_(1, 0, 0xFFF, top)))
    assert rig.reach(A, LAST) == [(0x8FFF, 1)]
    assert rig.reach(A, 0xFFF) == [(LAST, 1)]
    assert rig.is_blocked(A, LAST, 2)


@pytest.mark.parametrize("neighbour", [0x9000, 0x20000], ids=["contiguous", "elsewhere"])
def test_XC2_the_last_byte_of_a_mapping_is_its_own(
    attached: Rig, clause: Clause, neighbour: int
) -> None:
    assert attached.send(map_(1, 0x1000, 0x1FFF, 0x8000)).status == Status.OK
    assert attached.send(map_(1, 0x2000, 0x2FFF, neighbour, flags=spec.MAP_F_READ)).status == 0
    assert attached.reach(A, 0x1FFE) == [(0x8FFE, 1)]
    assert attached.reach(A, 0x1FFF) == [(0x8FFF, 1)]
    assert attached.reach(A, 0x2000) == [(neighbour, 1)]
    assert attached.reach(A, 0x1FFF, 2) == [(0x8FFF, 1), (neighbour, 1)]
    # The neighbour's protection is not that of the last byte either.
    assert not attached.is_blocked(A, 0x1FFF, 1, Access.WRITE)
    assert attached.is_blocked(A, 0x2000, 1, Access.WRITE)
    clause.observed()


def test_XC2_the_last_byte_before_a_gap_is_mapped(attached: Rig, clause: Clause) -> None:
    assert attached.send(map_(1, 0x1000, 0x1FFF, 0x8000)).status == Status.OK
    assert attached.reach(A, 0x1FFF) == [(0x8FFF, 1)]
    assert attached.is_blocked(A, 0x2000)
    assert attached.is_blocked(A, 0x1FFF, 2)
    assert attached.is_blocked(A, 0x0FFF, 2)
    clause.observed()
