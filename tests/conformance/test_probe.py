"""PROBE and its properties, virtio 1.2, 5.13.6.7 and 5.13.6.8 (ends are inclusive)."""
# ruff: noqa: N802 - a test is named after its row: PR1, not pr1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.rig import attach, map_, probe
from viommu.device import FEATURES
from viommu.domain import X86_MSI_WINDOW, ReservedRegion
from viommu.errors import UsageError
from viommu.spec import virtio_iommu as spec
from viommu.spec._struct import sizeof
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, Feature, ReservedKind, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

LOW = ReservedRegion(0x1000, 0x3000)
HIGH = ReservedRegion((1 << 64) - 0x1000, 1 << 64)
# Given out of order, as a host may.
REGIONS = (HIGH, X86_MSI_WINDOW, LOW)


@pytest.fixture
def probed(make_rig: Callable[..., Rig]) -> Rig:
    """Return a device with A, which has three reserved regions, and B, which has none."""
    rig = make_rig(probe_size=128)
    rig.add(A, REGIONS)
    rig.add(B)
    return rig


def properties(rig: Rig, endpoint: int) -> list[spec.ResvMemProperty]:
    """Walk the properties as a driver does."""
    data = rig.send(probe(endpoint)).properties
    found = []
    at = 0
    while at + 4 <= len(data):
        header = spec.ProbeProperty.from_buffer_copy(data, at)
        if header.type == spec.PROBE_T_NONE:
            break
        found.append(spec.ResvMemProperty.from_buffer_copy(data, at))
        at += 4 + header.length
    return found


def test_PR1_reserved_bytes_are_ignored(probed: Rig, clause: Clause) -> None:
    plain = probed.send(probe(A))
    for at in range(64):
        noisy = probed.send(probe(A, reserved=bytes(at) + b"\xff"))
        clause.accepts(noisy)
        assert noisy == plain
    clause.observed()


def test_PR2_the_endpoint_exists(probed: Rig, clause: Clause) -> None:
    for stranger in (0, A + 1, 0xFFFF_FFFF):
        reply = probed.send(probe(stranger))
        clause.rejects(reply, Status.NOENT)
        assert reply.properties == bytes(128)
    clause.accepts(probed.send(probe(A)))


def test_PR3_probe_is_offered_and_answered(probed: Rig, clause: Clause) -> None:
    assert FEATURES >> Feature.PROBE & 1
    config = spec.Config.from_buffer_copy(probed.iommu.config_bytes())
    assert config.probe_size == 128
    reply = probed.send(probe(A))
    assert (reply.status, len(reply.data)) == (Status.OK, 128 + 4)
    clause.observed()


def test_PR4_reserved_bits_of_a_property_are_zero(probed: Rig, clause: Clause) -> None:
    found = properties(probed, A)
    assert [prop.head.type for prop in found] == [spec.PROBE_T_RESV_MEM] * 3
    assert all(prop.head.type >> 12 == 0 for prop in found)
    clause.observed()


def test_PR5_the_length_leaves_the_header_out(probed: Rig, clause: Clause) -> None:
    assert [prop.head.length for prop in properties(probed, A)] == [20, 20, 20]
    assert sizeof(spec.ResvMemProperty) == 24
    clause.observed()


def test_PR6_properties_follow_each_other_without_a_gap(probed: Rig, clause: Clause) -> None:
    assert [(prop.start, prop.end, prop.subtype) for prop in properties(probed, A)] == [
        (0x1000, 0x2FFF, ReservedKind.RESERVED),
        (0xFEE00000, 0xFEEFFFFF, ReservedKind.MSI),
        (0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF_FFFF_FFFF, ReservedKind.RESERVED),
    ]
    assert properties(probed, B) == []
    clause.observed()


def test_PR6_the_properties_may_fill_all_of_probe_size(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    rig = make_rig(probe_size=72)
    rig.add(A, REGIONS)
    assert len(properties(rig, A)) == 3
    with pytest.raises(UsageError):
        rig.add(B, (*REGIONS, ReservedRegion(0x8000, 0x9000)))
    clause.observed()


def test_PR7_a_small_buffer_gets_no_property(probed: Rig, clause: Clause) -> None:
    for room in range(4, 128 + 4):
        reply = probed.send(probe(A), room)
        clause.rejects(reply, Status.INVAL)
        assert reply.properties == bytes(room - 4)
    clause.accepts(probed.send(probe(A), 128 + 4))
    clause.accepts(probed.send(probe(A), 4096))


def test_PR8_what_is_left_is_zero(probed: Rig, clause: Clause) -> None:
    assert probed.send(probe(A)).properties[72:] == bytes(56)
    assert probed.send(probe(B)).properties == bytes(128)
    clause.observed()


def test_RM1_reserved_bytes_are_zero(probed: Rig, clause: Clause) -> None:
    assert [bytes(prop.reserved) for prop in properties(probed, A)] == [bytes(3)] * 3
    clause.observed()


def test_RM2_there_is_one_msi_region_at_the_most(probed: Rig, clause: Clause) -> None:
    second = ReservedRegion(0x8000, 0x9000, ReservedKind.MSI)
    with pytest.raises(UsageError):
        probed.add(1, [X86_MSI_WINDOW, second])
    assert probed.send(probe(1)).status == Status.NOENT
    clause.rejected()
    probed.add(1, [second])
    assert len(properties(probed, 1)) == 1
    clause.accepted()


@pytest.mark.parametrize(
    "other",
    [
        LOW,
        ReservedRegion(0x2000, 0x4000),
        ReservedRegion(0, 0x1001),
        ReservedRegion(0x1800, 0x1900),
        ReservedRegion(0, 1 << 64, ReservedKind.MSI),
        ReservedRegion(0x5000, 0x5000),
        ReservedRegion(0x5000, 0x4000),
        ReservedRegion(0x5000, (1 << 64) + 1),
        ReservedRegion(-0x1000, 0x1000),
    ],
)
def test_RM3_regions_do_not_overlap(probed: Rig, clause: Clause, other: ReservedRegion) -> None:
    for regions in ([LOW, other], [other, LOW]):
        with pytest.raises(UsageError):
            probed.add(1, regions)
    clause.rejected()
    probed.add(1, [ReservedRegion(0x3000, 0x4000), LOW, ReservedRegion(0, 0x1000)])
    assert len(properties(probed, 1)) == 3
    clause.accepted()


def test_RM5_no_mapping_leads_out_of_a_reserved_region(probed: Rig, clause: Clause) -> None:
    assert probed.send(attach(1, A)).status == Status.OK
    assert probed.send(map_(1, 0x3000, 0xFEDFFFFF, 0)).status == Status.OK
    for region in (LOW, X86_MSI_WINDOW, HIGH):
        assert probed.is_blocked(A, region.start)
        assert probed.is_blocked(A, region.end - 1)
    clause.observed()


@pytest.mark.parametrize("flags", [None, ATTACH_F_BYPASS], ids=["unattached", "bypass domain"])
def test_RM5_bypass_stops_at_reserved_regions(
    probed: Rig, clause: Clause, flags: int | None
) -> None:
    probed.iommu.write_config(36, b"\1")
    if flags is not None:
        assert probed.send(attach(1, A, flags=flags)).status == Status.OK
    for region in (LOW, X86_MSI_WINDOW, HIGH):
        assert probed.is_blocked(A, region.start)
        assert probed.is_blocked(A, region.end - 1)
    assert probed.reach(A, 0) == [(0, 1)]
    assert probed.reach(A, 0x3000) == [(0x3000, 1)]
    clause.observed()
