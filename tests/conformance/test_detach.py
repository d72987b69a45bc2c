"""DETACH, virtio 1.2, 5.13.6.4."""
# ruff: noqa: N802 - a test is named after its row: DE1, not de1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.mappers import FaultyMapper
from tests.conformance.rig import attach, detach, map_
from viommu.spec.virtio_iommu import ATTACH_F_BYPASS, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig


@pytest.fixture
def mapped(rig: Rig) -> Rig:
    """Return a device with A in domain 1, which has one mapping, and B in domain 2."""
    for request in (attach(1, A), attach(2, B), map_(1, 0x1000, 0x1FFF, 0x8000)):
        assert rig.send(request).status == Status.OK
    return rig


def test_DE1_reserved_bytes_are_ignored(rig: Rig, clause: Clause) -> None:
    for at in range(8):
        assert rig.send(attach(1, A)).status == Status.OK
        clause.accepts(rig.send(detach(1, A, reserved=bytes(at) + b"\xff")))
    clause.observed()


def test_DE2_the_endpoint_exists(mapped: Rig, clause: Clause) -> None:
    for stranger in (0, A + 1, 0xFFFF_FFFF):
        clause.rejects(mapped.send(detach(1, stranger)), Status.NOENT)
    clause.accepts(mapped.send(detach(1, A)))
    # Known and unattached is not unknown.
    clause.rejects(mapped.send(detach(1, A)), Status.INVAL)


def test_DE3_the_domain_is_the_one_it_is_in(mapped: Rig, clause: Clause) -> None:
    for wrong in (0, 2, 3, 0xFFFF_FFFF):
        clause.rejects(mapped.send(detach(wrong, A)), Status.INVAL)
        assert mapped.reach(A, 0x1000) == [(0x8000, 1)]
    clause.accepts(mapped.send(detach(1, A)))


def test_DE4_no_mapping_can_be_used_afterwards(mapped: Rig, clause: Clause) -> None:
    assert mapped.reach(A, 0x1000) == [(0x8000, 1)]
    clause.accepted()
    assert mapped.send(detach(1, A)).status == Status.OK
    assert mapped.is_blocked(A, 0x1000)
    clause.rejected()
    # The domain went with its last endpoint, and the same number starts afresh.
    assert mapped.send(map_(1, 0x2000, 0x2FFF, 0)).status == Status.NOENT
    assert mapped.send(attach(1, A)).status == Status.OK
    assert mapped.is_blocked(A, 0x1000)


def test_DE4_the_others_of_the_domain_keep_theirs(mapped: Rig, clause: Clause) -> None:
    assert mapped.send(attach(1, B)).status == Status.OK
    assert mapped.send(detach(1, A)).status == Status.OK
    assert mapped.is_blocked(A, 0x1000)
    clause.rejected()
    assert mapped.reach(B, 0x1000) == [(0x8000, 1)]
    clause.accepted()


@pytest.mark.parametrize("flags", [0, ATTACH_F_BYPASS])
def test_DE4_bypass_takes_over_where_it_is_on(mapped: Rig, clause: Clause, flags: int) -> None:
    mapped.iommu.write_config(36, b"\1")
    assert mapped.send(attach(3, A, flags=flags)).status == Status.OK
    clause.accepts(mapped.send(detach(3, A)))
    assert mapped.reach(A, 0x1000) == [(0x1000, 1)]


def test_DE4_the_reply_waits_for_memory_in_use(mapped: Rig, clause: Clause) -> None:
    mapper = mapped.mappers[A]
    with mapper.start_export_session() as fault:
        mapper.export(0x1000, 0x1000)
        parked = mapped.send_parked(detach(1, A))
        assert mapper.mappings() == []
        assert fault.is_set()
        assert not any(event.is_set() for event in parked.events)
        mapper.release(0x1000, 0x1000)
    clause.rejected()
    assert all(event.is_set() for event in parked.events)
    assert parked.reply == bytes(4)
    clause.accepted()


def test_DE4_a_mapper_that_cannot_leave_stays(make_rig: Callable[..., Rig], clause: Clause) -> None:
    rig = make_rig()
    rig.add(A, mapper=FaultyMapper(detachable=False))
    assert rig.send(attach(1, A)).status == Status.OK
    assert rig.send(map_(1, 0x1000, 0x1FFF, 0x8000)).status == Status.OK
    clause.rejects(rig.send(detach(1, A)), Status.UNSUPP)
    assert rig.reach(A, 0x1000) == [(0x8000, 1)]


def test_DE4_a_host_that_refuses_bypass_stops_the_detach(mapped: Rig, clause: Clause) -> None:
    mapped.iommu.write_config(36, b"\1")
    mapped.mappers[A].fail_add()
    clause.rejects(mapped.send(detach(1, A)), Status.DEVERR)
    assert mapped.reach(A, 0x1000) == [(0x8000, 1)]
