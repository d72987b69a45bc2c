"""Fault reports, virtio 1.2, 5.13.6.9."""
# ruff: noqa: N802 - a test is named after its row: FR1, not fr1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.rig import attach, detach, map_
from viommu.errors import Access, TranslationFault
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, Status

if TYPE_CHECKING:
    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

READ, WRITE = Access.READ, Access.WRITE
ALL_FLAGS = spec.FAULT_F_READ | spec.FAULT_F_WRITE | spec.FAULT_F_ADDRESS


@pytest.fixture
def mapped(rig: Rig) -> Rig:
    """Return a device with A in domain 1, which has a mapping to read from, and B unattached."""
    request = map_(1, 0x1000, 0x1FFF, 0x8000, flags=spec.MAP_F_READ)
    for each in (attach(1, A), request):
        assert rig.send(each).status == Status.OK
    return rig


# (endpoint, iova, access): every way to stray in the device above.
STRAYS = [
    (A, 0x2000, READ),
    (A, 0x2000, WRITE),
    (A, 0x2000, READ | WRITE),
    (A, 0x1234, WRITE),
    (A, (1 << 64) - 1, READ),
    (B, 0x1000, READ),
    (B, 0, WRITE),
]


def test_FR1_reserved_bytes_are_zero(mapped: Rig, clause: Clause) -> None:
    for endpoint, iova, access in STRAYS:
        report = mapped.stray(endpoint, iova, access)
        assert bytes(report.reserved) == bytes(3)
        assert bytes(report.reserved2) == bytes(4)
    clause.observed()


def test_FR2_undefined_flags_are_zero(mapped: Rig, clause: Clause) -> None:
    for endpoint, iova, access in STRAYS:
        assert not mapped.stray(endpoint, iova, access).flags & ~ALL_FLAGS
    clause.observed()


def test_FR3_the_endpoint_is_the_one_that_strayed(mapped: Rig, clause: Clause) -> None:
    for endpoint, iova, access in STRAYS:
        assert mapped.stray(endpoint, iova, access).endpoint == endpoint
    clause.observed()


def test_FR4_the_report_says_where_what_and_why(mapped: Rig, clause: Clause) -> None:
    for endpoint, iova, access in STRAYS:
        report = mapped.stray(endpoint, iova, access)
        assert report.flags & spec.FAULT_F_ADDRESS
        assert report.address == iova
        assert bool(report.flags & spec.FAULT_F_READ) == (READ in access)
        assert bool(report.flags & spec.FAULT_F_WRITE) == (WRITE in access)
        expected = FaultReason.MAPPING if endpoint == A else FaultReason.DOMAIN
        assert report.reason == expected
    clause.observed()


def test_FR4_the_address_is_that_of_the_first_byte_that_is_not_mapped(
    mapped: Rig, clause: Clause
) -> None:
    with pytest.raises(TranslationFault) as caught:
        mapped.reach(A, 0x1800, 0x1000)
    assert caught.value.iova == 0x2000
    clause.observed()


def test_FR4_an_address_past_the_end_is_reported_all_the_same(mapped: Rig, clause: Clause) -> None:
    # A transfer that begins in the last page and does not end there: no 64-bit
    # field holds the first address that is missing.
    mapped.iommu.report_fault(A, TranslationFault(1 << 64, READ))
    report = mapped.iommu.take_fault()
    assert report is not None
    fault = spec.Fault.from_buffer_copy(report)
    assert fault.endpoint == A
    assert not fault.flags & spec.FAULT_F_ADDRESS or fault.address >= 0
    clause.observed()


def test_FR4_the_reason_is_that_of_the_moment(mapped: Rig, clause: Clause) -> None:
    assert mapped.stray(A, 0x3000).reason == FaultReason.MAPPING
    assert mapped.send(detach(1, A)).status == Status.OK
    assert mapped.stray(A, 0x3000).reason == FaultReason.DOMAIN
    clause.observed()
