"""Feature bits, configuration and reset, virtio 1.2, 5.13.3 to 5.13.5."""
# ruff: noqa: N802 - a test is named after its row: FB1, not fb1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.mappers import FaultyMapper
from tests.conformance.rig import attach, map_, probe
from viommu.device import FEATURES
from viommu.errors import UsageError
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, Feature, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

BYPASS_OFFSET = 36


def bypass_field(rig: Rig) -> int:
    return spec.Config.from_buffer_copy(rig.iommu.config_bytes()).bypass


def offered(feature: Feature) -> bool:
    return bool(FEATURES >> feature & 1)


def test_FB1_map_and_unmap_are_offered(rig: Rig, clause: Clause) -> None:
    assert offered(Feature.MAP_UNMAP)
    assert rig.iommu.features == FEATURES
    clause.observed()


def test_FB2_the_old_bypass_bit_is_not_offered(clause: Clause) -> None:
    assert not offered(Feature.BYPASS)
    assert offered(Feature.BYPASS_CONFIG)
    clause.observed()


def test_FB3_the_two_bypass_bits_exclude_each_other(rig: Rig, clause: Clause) -> None:
    # Not even a driver that asks for both gets both.
    rig.iommu.accept_features(2**64 - 1)
    both = 1 << Feature.BYPASS | 1 << Feature.BYPASS_CONFIG
    assert rig.iommu.features & both == 1 << Feature.BYPASS_CONFIG
    clause.observed()


@pytest.mark.parametrize("mask", [0x1000, 1, 1 << 63, 0x40201000, 2**64 - 1])
def test_CF1_the_page_size_mask_has_a_bit(
    make_rig: Callable[..., Rig], clause: Clause, mask: int
) -> None:
    config = spec.Config.from_buffer_copy(make_rig(page_size_mask=mask).iommu.config_bytes())
    assert config.page_size_mask == mask
    clause.accepted()


@pytest.mark.parametrize("mask", [0, -1, 1 << 64])
def test_CF1_a_mask_without_a_bit_is_refused(
    make_rig: Callable[..., Rig], clause: Clause, mask: int
) -> None:
    with pytest.raises(UsageError):
        make_rig(page_size_mask=mask)
    clause.rejected()


@pytest.mark.parametrize("boot_bypass", [False, True])
@pytest.mark.parametrize("features", [0, FEATURES])
def test_CF2_unattached_endpoints_do_what_the_field_says(
    make_rig: Callable[..., Rig], clause: Clause, boot_bypass: bool, features: int
) -> None:
    rig = make_rig(boot_bypass=boot_bypass)
    rig.add(A)
    for accepted in (FEATURES, features):
        rig.iommu.accept_features(accepted)
        assert bypass_field(rig) == boot_bypass
        assert rig.is_blocked(A, 0x1000) == (not boot_bypass)
    if boot_bypass:
        assert rig.reach(A, 0x1000, 0x2000) == [(0x1000, 0x2000)]
        clause.accepted()
    else:
        clause.rejected()


def test_CF2_a_write_takes_effect_at_once(rig: Rig, clause: Clause) -> None:
    assert rig.send(attach(1, B)).status == Status.OK
    for value in (1, 0, 1, 1, 0, 0):
        rig.iommu.write_config(BYPASS_OFFSET, bytes([value]))
        rig.check()
        assert bypass_field(rig) == value
        assert rig.is_blocked(A, 0x1000) == (not value)
        # An attached endpoint is not concerned.
        assert rig.is_blocked(B, 0x1000)
    clause.accepted()
    clause.rejected()


def test_CF2_the_field_is_read_only_without_the_feature(rig: Rig, clause: Clause) -> None:
    rig.iommu.accept_features(FEATURES & ~(1 << Feature.BYPASS_CONFIG))
    rig.iommu.write_config(BYPASS_OFFSET, b"\1")
    assert bypass_field(rig) == 0
    assert rig.is_blocked(A, 0x1000)
    clause.rejected()


@pytest.mark.parametrize("boot_bypass", [False, True])
def test_CF2_an_endpoint_is_in_no_domain_before_it_is_attached_and_after_it_left(
    make_rig: Callable[..., Rig], clause: Clause, boot_bypass: bool
) -> None:
    rig = make_rig(boot_bypass=boot_bypass)
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    assert rig.is_blocked(A, 0x1000)
    clause.rejected()
    assert rig.send(attach(1, A)).status == Status.OK
    rig.iommu.reset()
    assert rig.is_blocked(A, 0x1000) == (not boot_bypass)
    clause.accepted()


@pytest.mark.parametrize("boot_bypass", [False, True])
def test_CF3_the_field_survives_a_device_reset_only(
    make_rig: Callable[..., Rig], clause: Clause, boot_bypass: bool
) -> None:
    rig = make_rig(boot_bypass=boot_bypass)
    rig.add(A)
    rig.iommu.write_config(BYPASS_OFFSET, bytes([not boot_bypass]))
    rig.iommu.reset()
    rig.check()
    assert bypass_field(rig) == (not boot_bypass)
    assert rig.is_blocked(A, 0) == boot_bypass
    rig.iommu.system_reset()
    rig.check()
    assert bypass_field(rig) == boot_bypass
    assert rig.is_blocked(A, 0) == (not boot_bypass)
    clause.observed()


@pytest.mark.parametrize("before", [0, 1])
def test_CF4_the_field_reads_0_or_1_whatever_is_written(
    rig: Rig, clause: Clause, before: int
) -> None:
    for value in range(256):
        rig.iommu.write_config(BYPASS_OFFSET, bytes([before]))
        rig.iommu.write_config(BYPASS_OFFSET, bytes([value]))
        assert bypass_field(rig) in {0, 1}
        if value < 2:
            assert bypass_field(rig) == value
            clause.accepted()
        else:
            assert bypass_field(rig) in {before, value & 1}
            clause.rejected()


def test_CF4_nothing_else_can_be_written(rig: Rig, clause: Clause) -> None:
    before = rig.iommu.config_bytes()
    for offset in range(48):
        for size in (1, 2, 4, 8):
            if not offset <= BYPASS_OFFSET < offset + size:
                rig.iommu.write_config(offset, b"\1" * size)
    assert rig.iommu.config_bytes() == before
    clause.rejected()
    # A wide write that covers the field writes the field alone.
    rig.iommu.write_config(BYPASS_OFFSET - 4, b"\xff\xff\xff\xff\1\xff\xff\xff")
    assert rig.iommu.config_bytes() == before[:36] + b"\1" + before[37:]
    clause.accepted()


@pytest.mark.parametrize("bypass", [0, 1])
def test_IN1_a_reset_leaves_no_endpoint_attached(rig: Rig, clause: Clause, bypass: int) -> None:
    rig.iommu.write_config(BYPASS_OFFSET, bytes([bypass]))
    for request in (
        attach(1, A),
        attach(1, B),
        map_(1, 0x1000, 0x1FFF, 0x8000),
        probe(A),
    ):
        assert rig.send(request).status == Status.OK
    assert rig.iommu.reset() == []
    rig.check()
    assert rig.iommu.domains == {}
    for endpoint in (A, B):
        assert not rig.iommu.endpoints[endpoint].attached
        assert rig.mappings(endpoint) == rig.mappings(A)
        if bypass:
            assert rig.reach(endpoint, 0x1000) == [(0x1000, 1)]
        else:
            assert rig.mappings(endpoint) == []
    assert rig.send(map_(1, 0x2000, 0x2FFF, 0)).status == Status.NOENT
    assert rig.send(attach(1, A)).status == Status.OK
    assert rig.is_blocked(A, 0x1000)
    clause.observed()


def test_IN1_a_bypass_domain_ends_with_a_reset(rig: Rig, clause: Clause) -> None:
    assert rig.send(attach(1, A, flags=ATTACH_F_BYPASS)).status == Status.OK
    assert rig.reach(A, 0x1000) == [(0x1000, 1)]
    assert rig.iommu.reset() == []
    rig.check()
    assert rig.is_blocked(A, 0x1000)
    clause.observed()


def test_IN1_a_reset_says_which_memory_is_still_in_use(rig: Rig, clause: Clause) -> None:
    for request in (attach(1, A), map_(1, 0x1000, 0x1FFF, 0x8000)):
        assert rig.send(request).status == Status.OK
    mapper = rig.mappers[A]
    with mapper.start_export_session() as fault:
        mapper.export(0x1000, 0x1000)
        (wait,) = rig.iommu.reset()
        assert fault.is_set()
        assert not wait.is_set()
        mapper.release(0x1000, 0x1000)
    assert wait.is_set()
    clause.observed()


@pytest.mark.parametrize("detachable", [False, True])
@pytest.mark.parametrize("flags", [0, ATTACH_F_BYPASS])
def test_IN1_a_mapper_that_cannot_leave_a_domain_is_emptied_too(
    make_rig: Callable[..., Rig], clause: Clause, detachable: bool, flags: int
) -> None:
    rig = make_rig()
    rig.add(A, mapper=FaultyMapper(detachable=detachable))
    assert rig.send(attach(1, A, flags=flags)).status == Status.OK
    if not flags:
        assert rig.send(map_(1, 0x1000, 0x1FFF, 0x8000)).status == Status.OK
    rig.iommu.reset()
    assert rig.mappings(A) == []
    assert rig.send(attach(2, A)).status == Status.OK
    clause.observed()


def test_IN1_a_host_that_refuses_bypass_leaves_the_endpoint_blocked(
    rig: Rig, clause: Clause
) -> None:
    rig.iommu.write_config(BYPASS_OFFSET, b"\1")
    for request in (attach(1, A), map_(1, 0x1000, 0x1FFF, 0x8000)):
        assert rig.send(request).status == Status.OK
    rig.mappers[A].fail_add()
    rig.iommu.reset()
    assert rig.is_blocked(A, 0x1000)
    assert rig.is_blocked(A, 0x8000)
    clause.observed()


def test_IN1_a_mapper_out_of_order_is_emptied(rig: Rig, clause: Clause) -> None:
    for request in (attach(1, A), attach(1, B)):
        assert rig.send(request).status == Status.OK
    rig.mappers[B].fail_add()  # B's host refuses the mapping ...
    rig.mappers[A].fail_remove()  # ... and A's won't give it up again
    data = rig.iommu.handle(map_(1, 0x1000, 0x1FFF, 0x8000), spec.TAIL_SIZE)
    assert data == bytes([Status.DEVERR, 0, 0, 0])
    rig.iommu.reset()
    assert rig.mappings(A) == []
    assert rig.mappings(B) == []
    for endpoint in (A, B):
        assert rig.send(attach(1, endpoint)).status == Status.OK
    clause.observed()
