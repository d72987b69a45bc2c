"""ATTACH, virtio 1.2, 5.13.6.3."""
# ruff: noqa: N802 - a test is named after its row: AT1, not at1

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.mappers import FaultyMapper
from tests.conformance.rig import attach, detach, map_, unmap
from viommu.domain import X86_MSI_WINDOW, DomainKind, ReservedRegion
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

C = 0x40


@pytest.fixture
def mapped(rig: Rig) -> Rig:
    """Return a device with A in domain 1, which has two mappings, and B unattached."""
    for request in (
        attach(1, A),
        map_(1, 0x1000, 0x1FFF, 0x8000),
        map_(1, 0x3000, 0x4FFF, 0xA000, flags=spec.MAP_F_READ),
    ):
        assert rig.send(request).status == Status.OK
    return rig


def test_AT1_reserved_bytes_are_zero(rig: Rig, clause: Clause) -> None:
    for reserved in (b"\1", b"\0\1", b"\0\0\1", b"\0\0\0\1", b"\xff" * 4):
        clause.rejects(rig.send(attach(1, A, reserved=reserved)), Status.INVAL)
    clause.accepts(rig.send(attach(1, A)))


def test_AT2_unknown_flags_are_refused(rig: Rig, clause: Clause) -> None:
    for bit in range(1, 32):
        clause.rejects(rig.send(attach(1, A, flags=1 << bit)), Status.INVAL)
        both = 1 << bit | ATTACH_F_BYPASS
        clause.rejects(rig.send(attach(1, A, flags=both)), Status.INVAL)
    clause.accepts(rig.send(attach(1, A)))
    clause.accepts(rig.send(attach(2, B, flags=ATTACH_F_BYPASS)))


def test_AT2_bypass_is_unknown_until_it_is_negotiated(rig: Rig, clause: Clause) -> None:
    rig.iommu.accept_features(rig.iommu.features & ~(1 << spec.Feature.BYPASS_CONFIG))
    clause.rejects(rig.send(attach(1, A, flags=ATTACH_F_BYPASS)), Status.INVAL)
    clause.accepts(rig.send(attach(1, A)))


def test_AT3_the_endpoint_exists(rig: Rig, clause: Clause) -> None:
    for stranger in (0, A + 1, 0xFFFF_FFFF):
        clause.rejects(rig.send(attach(1, stranger)), Status.NOENT)
    clause.accepts(rig.send(attach(1, A)))


def test_AT4_a_second_endpoint_sees_every_mapping(mapped: Rig, clause: Clause) -> None:
    clause.accepts(mapped.send(attach(1, B)))
    assert mapped.mappings(B) == mapped.mappings(A)
    assert len(mapped.mappings(B)) == 2
    # ... and every later one; so does the first, whose mapper must not be forgotten.
    assert mapped.send(map_(1, 0x6000, 0x6FFF, 0x6000)).status == Status.OK
    assert mapped.reach(A, 0x6000) == mapped.reach(B, 0x6000) == [(0x6000, 1)]
    assert mapped.send(unmap(1, 0x1000, 0x1FFF)).status == Status.OK
    assert mapped.is_blocked(A, 0x1000)
    assert mapped.is_blocked(B, 0x1000)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(
    ("number", "status"), [(errno.EIO, Status.DEVERR), (errno.ENOMEM, Status.NOMEM)]
)
def test_AT4_a_replay_that_fails_leaves_nothing(
    mapped: Rig, clause: Clause, nth: int, number: int, status: Status
) -> None:
    mapped.mappers[B].fail_add(nth, number)
    clause.rejects(mapped.send(attach(1, B)), status)
    assert mapped.mappings(B) == []
    clause.accepts(mapped.send(attach(1, B)))


def test_AT4_a_range_that_the_host_keeps_for_itself_stops_the_replay(
    mapped: Rig, clause: Clause
) -> None:
    mapped.mappers[B].reserve(0x4000, 0x1000)
    reply = mapped.send(attach(1, B))
    clause.rejects(reply, Status.INVAL, Status.UNSUPP)
    assert mapped.mappings(B) == []


@pytest.mark.parametrize(("first", "other"), [(0, ATTACH_F_BYPASS), (ATTACH_F_BYPASS, 0)])
@pytest.mark.parametrize("endpoint", [A, B], ids=["sole member", "newcomer"])
def test_AT5_the_bypass_flag_fits_the_domain(
    rig: Rig, clause: Clause, first: int, other: int, endpoint: int
) -> None:
    clause.accepts(rig.send(attach(1, A, flags=first)))
    clause.rejects(rig.send(attach(1, endpoint, flags=other)), Status.INVAL)
    clause.accepts(rig.send(attach(1, B, flags=first)))


def test_AT6_an_endpoint_moves_to_another_domain(mapped: Rig, clause: Clause) -> None:
    assert mapped.send(attach(2, B)).status == Status.OK
    assert mapped.send(map_(2, 0x9000, 0x9FFF, 0xC000)).status == Status.OK
    clause.accepts(mapped.send(attach(2, A)))
    assert mapped.reach(A, 0x9000) == [(0xC000, 1)]
    assert mapped.is_blocked(A, 0x1000)
    # Its old domain had no other endpoint, so it is gone.
    assert mapped.send(map_(1, 0x6000, 0x6FFF, 0)).status == Status.NOENT


def test_AT6_a_moved_endpoint_leaves_the_others_alone(mapped: Rig, clause: Clause) -> None:
    assert mapped.send(attach(1, B)).status == Status.OK
    before = mapped.mappings(B)
    clause.accepts(mapped.send(attach(2, A)))
    assert mapped.mappings(A) == []
    assert mapped.mappings(B) == before


@pytest.mark.parametrize("bypass", [False, True])
def test_AT6_between_bypass_and_translation(mapped: Rig, clause: Clause, bypass: bool) -> None:
    mapped.iommu.write_config(36, bytes([bypass]))
    clause.accepts(mapped.send(attach(2, A, flags=ATTACH_F_BYPASS)))
    assert mapped.reach(A, 0x1000) == [(0x1000, 1)]
    clause.accepts(mapped.send(attach(3, A)))
    assert mapped.is_blocked(A, 0x1000)


def test_AT6_a_mapper_that_cannot_leave_its_domain_is_unsupported(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    rig = make_rig()
    rig.add(A, mapper=FaultyMapper(detachable=False))
    rig.add(B)
    assert rig.send(attach(1, A)).status == Status.OK
    assert rig.send(map_(1, 0x1000, 0x1FFF, 0x8000)).status == Status.OK
    clause.rejects(rig.send(attach(2, A)), Status.UNSUPP)
    clause.rejects(rig.send(attach(2, A, flags=ATTACH_F_BYPASS)), Status.UNSUPP)
    assert rig.reach(A, 0x1000) == [(0x8000, 1)]


def test_AT6_endpoints_that_share_a_mapper_move_together_or_not_at_all(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    rig = make_rig()
    mapper = rig.add(A)
    rig.add(B, mapper=mapper)
    clause.accepts(rig.send(attach(1, A)))
    clause.rejects(rig.send(attach(2, B)), Status.UNSUPP)
    clause.accepts(rig.send(attach(1, B)))
    clause.accepts(rig.send(attach(2, A)))
    assert set(rig.iommu.domains[2].endpoints) == {A, B}


def test_AT6_prime_attaching_again_changes_nothing(mapped: Rig, clause: Clause) -> None:
    adds = mapped.mappers[A].adds
    before = mapped.snapshot()
    clause.accepts(mapped.send(attach(1, A)))
    assert mapped.snapshot() == before
    assert mapped.mappers[A].adds == adds
    clause.observed()


def test_AT6_prime_attaching_again_revokes_nothing(mapped: Rig, clause: Clause) -> None:
    mapper = mapped.mappers[A]
    with mapper.start_export_session() as fault:
        mapper.export(0x1000, 0x1000)
        clause.accepts(mapped.send(attach(1, A)))
        assert not fault.is_set()
        mapper.release(0x1000, 0x1000)
    clause.observed()


def test_AT7_reserved_regions_fit_those_of_the_domain(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    rig = make_rig()
    rig.add(A, [X86_MSI_WINDOW])
    rig.add(B, [X86_MSI_WINDOW])
    rig.add(C, [ReservedRegion(0x1000, 0x3000), X86_MSI_WINDOW])
    assert rig.send(attach(1, A)).status == Status.OK
    assert rig.send(map_(1, 0x2000, 0x2FFF, 0)).status == Status.OK
    clause.rejects(rig.send(attach(1, C)), Status.UNSUPP)
    clause.accepts(rig.send(attach(1, B)))
    clause.accepts(rig.send(attach(2, C)))
    assert rig.send(map_(2, 0x2000, 0x2FFF, 0)).status == Status.INVAL


def test_AT8_an_attached_endpoint_is_attached(mapped: Rig, clause: Clause) -> None:
    clause.accepts(mapped.send(attach(1, B)))
    assert mapped.iommu.endpoints[B].kind is DomainKind.TRANSLATING
    assert mapped.reach(B, 0x1000) == [(0x8000, 1)]
    clause.accepts(mapped.send(detach(1, B)))


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_AT8_a_move_that_fails_leaves_the_endpoint_where_it_was(
    mapped: Rig, clause: Clause, nth: int
) -> None:
    assert mapped.send(attach(2, B)).status == Status.OK
    for iova in (0x1000, 0x9000, 0xB000):
        assert mapped.send(map_(2, iova, iova + 0xFFF, 0xC000)).status == Status.OK
    mapped.mappers[A].fail_add(nth)
    clause.rejects(mapped.send(attach(2, A)), Status.DEVERR)
    assert mapped.reach(A, 0x3000) == [(0xA000, 1)]
    assert mapped.is_blocked(A, 0x9000)


def test_AT8_a_bypass_domain_that_the_host_refuses_is_not_made(mapped: Rig, clause: Clause) -> None:
    mapped.mappers[A].fail_add()
    clause.rejects(mapped.send(attach(2, A, flags=ATTACH_F_BYPASS)), Status.DEVERR)
    mapped.mappers[B].fail_add()
    clause.rejects(mapped.send(attach(2, B, flags=ATTACH_F_BYPASS)), Status.DEVERR)
    assert mapped.send(map_(2, 0x1000, 0x1FFF, 0)).status == Status.NOENT


def test_AT8_a_host_that_fails_twice_leaves_no_access_to_the_new_domain(
    mapped: Rig, clause: Clause
) -> None:
    assert mapped.send(attach(2, B)).status == Status.OK
    for iova in (0x9000, 0xB000):
        assert mapped.send(map_(2, iova, iova + 0xFFF, 0xC000)).status == Status.OK
    mapper = mapped.mappers[A]
    mapper.fail_add(2)  # the second mapping of domain 2 is refused ...
    mapper.fail_remove(1)  # ... and so is taking the first one back
    data = mapped.iommu.handle(attach(2, A), spec.TAIL_SIZE)
    assert isinstance(data, bytes)
    assert data[0] == Status.DEVERR
    mapped.check()
    assert mapped.is_blocked(A, 0x9000)
    clause.rejected()
