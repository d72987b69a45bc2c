"""What holds for every request, virtio 1.2, 5.13.6."""
# ruff: noqa: N802 - a test is named after its row: OP1, not op1

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.rig import READABLE, attach, detach, map_, probe, unmap
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, FaultReason, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

# One valid request of each type, in an order in which all succeed.
ALL_OK = (
    probe(A),
    attach(1, A),
    map_(1, 0x1000, 0x1FFF, 0x8000),
    unmap(1, 0x1000, 0x1FFF),
    detach(1, A),
)


@pytest.fixture
def shared(rig: Rig) -> Rig:
    """Return a device with A and B in domain 1, which has two mappings."""
    for request in (
        attach(1, A),
        attach(1, B),
        map_(1, 0x1000, 0x1FFF, 0x8000),
        map_(1, 0x2000, 0x2FFF, 0x20000),
    ):
        assert rig.send(request).status == Status.OK
    return rig


def test_OP1_success_is_ok(rig: Rig, clause: Clause) -> None:
    for request in ALL_OK:
        clause.accepts(rig.send(request))


@pytest.mark.parametrize("refusing", [A, B])
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EIO, Status.DEVERR),
        (errno.ENOMEM, Status.NOMEM),
        (errno.ENOSPC, Status.NOMEM),
        (errno.EFAULT, Status.FAULT),
    ],
)
def test_OP1_a_map_that_one_host_refuses_is_not_ok(
    shared: Rig, clause: Clause, refusing: int, number: int, status: Status
) -> None:
    shared.mappers[refusing].fail_add(1, number)
    clause.rejects(shared.send(map_(1, 0x3000, 0x3FFF, 0)), status)
    clause.accepts(shared.send(map_(1, 0x3000, 0x3FFF, 0)))


@pytest.mark.parametrize("refusing", [A, B])
def test_OP1_an_unmap_that_one_host_refuses_is_not_ok(
    shared: Rig, clause: Clause, refusing: int
) -> None:
    shared.mappers[refusing].fail_remove()
    clause.rejects(shared.send(unmap(1, 0, 0xFFFF)), Status.DEVERR)
    clause.accepts(shared.send(unmap(1, 0, 0xFFFF)))


def test_OP1_a_range_that_a_host_keeps_for_itself_is_not_mapped(
    shared: Rig, clause: Clause
) -> None:
    shared.mappers[B].reserve(0x4000, 0x1000)
    clause.rejects(shared.send(map_(1, 0x3000, 0x4FFF, 0)), Status.INVAL)
    clause.accepts(shared.send(map_(1, 0x3000, 0x3FFF, 0)))


def test_OP1_an_unmap_that_fails_after_revoking_still_answers(shared: Rig, clause: Clause) -> None:
    mapper = shared.mappers[A]
    with mapper.start_export_session() as fault:
        mapper.export(0x1000, 0x1000)
        shared.mappers[B].fail_remove()
        clause.rejects(shared.send(unmap(1, 0, 0xFFFF)), Status.DEVERR)
        assert fault.is_set()
        mapper.release(0x1000, 0x1000)
    clause.accepts(shared.send(unmap(1, 0, 0xFFFF)))


def test_OP1_a_host_that_fails_twice_loses_the_endpoint_its_mappings_until_it_attaches_again(
    shared: Rig, clause: Clause
) -> None:
    mapper = shared.mappers[A]
    with mapper.start_export_session() as fault:
        mapper.export(0x1000, 0x1000)
        shared.mappers[B].fail_remove()  # B's host refuses the removal ...
        mapper.fail_add()  # ... and A's refuses to map again what it had removed
        data = shared.iommu.handle(unmap(1, 0x1000, 0x1FFF), spec.TAIL_SIZE)
        assert data == bytes([Status.DEVERR, 0, 0, 0])
        shared.check()
        assert fault.is_set()
        assert mapper.mappings() == []
        clause.rejected()
        # The guest tries again: what it may reuse after the reply is no longer in use.
        parked = shared.send_parked(unmap(1, 0x1000, 0x1FFF))
        assert not any(event.is_set() for event in parked.events)
        mapper.release(0x1000, 0x1000)
    assert all(event.is_set() for event in parked.events)
    assert shared.is_blocked(B, 0x1000)
    clause.rejects(shared.send(map_(1, 0x5000, 0x5FFF, 0)), Status.DEVERR)
    clause.accepts(shared.send(attach(1, A)))
    clause.accepts(shared.send(map_(1, 0x5000, 0x5FFF, 0)))
    assert shared.mappings(A) == shared.mappings(B)


def test_OP2_unknown_types_are_given_back(rig: Rig, clause: Clause) -> None:
    for request in ALL_OK:
        clause.accepts(rig.send(request))
    for kind in set(range(256)) - READABLE.keys():
        for size in (1, 4, 20, 128):
            clause.rejects(rig.send(bytes([kind]) + bytes(size - 1), 4))
            clause.rejects(rig.send(bytes([kind]) + bytes(size - 1), 600))


def test_OP3_reserved_bytes_of_the_head_are_ignored(rig: Rig, clause: Clause) -> None:
    requests = (
        probe(A, head=b"\xff\xff\xff"),
        attach(1, A, head=b"\1\2\3"),
        map_(1, 0x1000, 0x1FFF, 0, head=b"\0\0\1"),
        unmap(1, 0x1000, 0x1FFF, head=b"\1"),
        detach(1, A, head=b"\x80"),
    )
    for request in requests:
        clause.accepts(rig.send(request))
    clause.observed()


def test_OP3_reserved_bytes_of_the_tail_are_zero(rig: Rig, clause: Clause) -> None:
    for request in (*ALL_OK, attach(1, 1), detach(1, A), map_(9, 0, 0xFFF, 0), probe(1)):
        assert rig.send(request).data[-3:] == bytes(3)
    clause.observed()


def test_OP4_unattached_endpoints_reach_nothing(rig: Rig, clause: Clause) -> None:
    for iova in (0, 0x1000, 0xFEE00000, 1 << 40, (1 << 64) - 1):
        assert rig.is_blocked(A, iova)
    clause.rejected()
    for request in (attach(1, B), map_(1, 0x1000, 0x1FFF, 0x8000)):
        assert rig.send(request).status == Status.OK
    # A neighbour's domain opens nothing.
    assert rig.is_blocked(A, 0x1000)
    assert rig.reach(B, 0x1000) == [(0x8000, 1)]
    clause.accepted()


def test_OP4_a_blocked_access_is_reported_as_one_without_domain(rig: Rig, clause: Clause) -> None:
    assert rig.send(probe(A)).status == Status.OK
    report = rig.stray(A, 0x1234)
    assert report.reason == FaultReason.DOMAIN
    assert report.address == 0x1234
    clause.rejected()


def test_OP5_a_request_that_is_cut_short_is_given_back(
    make_rig: Callable[..., Rig], clause: Clause
) -> None:
    for valid in ALL_OK:
        rig = make_rig()
        rig.add(A)
        for request in ALL_OK[: ALL_OK.index(valid)]:
            assert rig.send(request).status == Status.OK
        for size in range(len(valid)):
            clause.rejects(rig.send(valid[:size], 516))
        clause.accepts(rig.send(valid))


@pytest.mark.parametrize("writable", [0, 1, 2, 3])
def test_OP5_a_request_without_room_for_its_status_is_given_back(
    rig: Rig, clause: Clause, writable: int
) -> None:
    for request in ALL_OK:
        clause.rejects(rig.send(request, writable))
        clause.accepts(rig.send(request))


def test_OP5_more_room_than_needed_is_no_error(rig: Rig, clause: Clause) -> None:
    for request in ALL_OK:
        clause.accepts(rig.send(request + bytes(64), 4096))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0xF000, 0xFFFF),
        (0xF000, 0x10FFF),
        (0x7F_FFFF_F000, 0x80_0000_0FFF),
        (0x80_0000_0000, 0x80_0000_0FFF),
        (0, (1 << 64) - 1),
        (0x10000, (1 << 64) - 1),
        ((1 << 64) - 0x1000, (1 << 64) - 1),
    ],
)
def test_OP6_the_input_range_is_kept(
    make_rig: Callable[..., Rig], clause: Clause, first: int, last: int
) -> None:
    rig = make_rig(input_range=(0x10000, 1 << 39))
    config = spec.Config.from_buffer_copy(rig.iommu.config_bytes())
    assert (config.input_range.start, config.input_range.end) == (0x10000, (1 << 39) - 1)
    rig.add(A)
    assert rig.send(attach(1, A)).status == Status.OK
    clause.rejects(rig.send(map_(1, first, last, 0)), Status.RANGE)
    clause.rejects(rig.send(unmap(1, first, last)), Status.RANGE)
    clause.accepts(rig.send(map_(1, 0x10000, 0x10FFF, 0)))
    clause.accepts(rig.send(map_(1, 0x7F_FFFF_F000, 0x7F_FFFF_FFFF, 0)))
    clause.accepts(rig.send(unmap(1, 0x10000, 0x7F_FFFF_FFFF)))


def test_XC1_every_rejected_request_has_a_status_and_a_length(rig: Rig, clause: Clause) -> None:
    for request in (
        attach(2, A, flags=ATTACH_F_BYPASS),
        attach(1, A),
        map_(1, 0x1000, 0x2FFF, 0x8000),
        attach(2, B, flags=ATTACH_F_BYPASS),
    ):
        assert rig.send(request).status == Status.OK
    rejected = {
        attach(1, A, reserved=b"\1"): Status.INVAL,
        attach(1, A, flags=2): Status.INVAL,
        attach(1, 0): Status.NOENT,
        attach(2, A): Status.INVAL,
        detach(1, 0): Status.NOENT,
        detach(1, B): Status.INVAL,
        map_(1, 0x1000, 0x1FFF, 0): Status.INVAL,
        map_(1, 0x3001, 0x3FFF, 0): Status.RANGE,
        map_(2, 0x3000, 0x3FFF, 0): Status.INVAL,
        map_(3, 0x3000, 0x3FFF, 0): Status.NOENT,
        map_(1, 0x3000, 0x3FFF, 0, flags=8): Status.INVAL,
        unmap(1, 0x1000, 0x1FFF): Status.RANGE,
        unmap(2, 0x1000, 0x1FFF): Status.INVAL,
        unmap(3, 0x1000, 0x1FFF): Status.NOENT,
        probe(0): Status.NOENT,
    }
    for request, status in rejected.items():
        reply = rig.send(request)
        room = 516 if request[0] == RequestType.PROBE else 4
        assert (reply.status, len(reply.data)) == (status, room)
    clause.observed()
