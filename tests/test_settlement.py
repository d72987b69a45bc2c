"""Requests to mappers whose hosts answer later: parked, undone, reset."""

from __future__ import annotations

import errno

import pytest

from tests.conformance.mappers import FaultyMapper, LaterMapper
from tests.conformance.rig import attach, detach, map_, unmap
from viommu.basic import BasicMemoryMapper
from viommu.device import IommuConfig, VirtioIommu
from viommu.domain import DomainKind
from viommu.events import Event
from viommu.settlement import REPLIES, Parked, settle
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import Status

PAGE = 0x1000
BYPASS = spec.ATTACH_F_BYPASS


def map_pages(domain: int, page: int, count: int = 1) -> bytes:
    return map_(domain, page * PAGE, (page + count) * PAGE - 1, 0x100000)


def unmap_pages(domain: int, page: int, count: int = 1) -> bytes:
    return unmap(domain, page * PAGE, (page + count) * PAGE - 1)


class World:
    """A device with endpoints 1, 2 and 3 in domain 7, each with a mapper that answers later."""

    def __init__(self) -> None:
        self.device = VirtioIommu()
        self.mappers: list[LaterMapper] = []
        for number in (1, 2, 3):
            self.add(number)
            self.ask(attach(7, number))

    def add(self, number: int) -> LaterMapper:
        self.mappers.append(LaterMapper())
        self.device.add_endpoint(number, self.mappers[-1])
        return self.mappers[-1]

    def ask(self, request: bytes, refuse: int = 0) -> int:
        """Have the last host refuse what a request first asks of it; return the status."""
        reply = self.device.handle(request, spec.TAIL_SIZE)
        while isinstance(reply, Parked):
            assert reply.events
            self.answer(refuse)
            reply = self.conclude(reply)
            refuse = 0
        self.device._check()
        return reply[0]

    def answer(self, refuse: int = 0) -> None:
        """Have all hosts answer everything, and the last one refuse it."""
        self.device._check()
        for mapper in self.mappers:
            while mapper.questions:
                mapper.answer(0, refuse if mapper is self.mappers[-1] else 0)

    def parked(self, request: bytes) -> Parked:
        """Send a request that has to wait."""
        parked = self.device.handle(request, spec.TAIL_SIZE)
        assert isinstance(parked, Parked)
        self.device._check()
        return parked

    def conclude(self, parked: Parked) -> bytes | Parked:
        """Go on with a request whose events have fired."""
        for event in parked.events:
            assert event.is_set()
            event.close()
        return parked.conclude()

    def settle(self, waits: list[Event], refuse: int = 0) -> int:
        """Answer, with a refusal at first, until there is nothing to wait for; return how often."""
        rounds = 0
        while waits:
            self.answer(refuse)
            for event in waits:
                assert event.is_set()
                event.close()
            waits, refuse, rounds = self.device.settle(), 0, rounds + 1
        self.device._check()
        return rounds

    def hosts(self) -> list[int]:
        """Return how many mappings each host has, having checked that its mapper agrees."""
        for mapper in self.mappers:
            assert mapper.dead or mapper.mappings() == sorted(mapper.host.values())
        return [len(mapper.host) for mapper in self.mappers]

    def kinds(self) -> list[DomainKind]:
        return [endpoint.kind for endpoint in self.device.endpoints.values()]


@pytest.fixture
def world() -> World:
    return World()


# -- requests --


def test_without_mappers_that_answer_later_nothing_is_parked() -> None:
    assert settle([], [], REPLIES[Status.OK], None) == bytes(4)
    with Event() as event:
        parked = settle([], [event], REPLIES[Status.OK], None)
        assert isinstance(parked, Parked)
        assert parked.conclude() == parked.reply == bytes(4)


def test_a_map_is_answered_when_the_last_host_has(world: World) -> None:
    parked = world.parked(map_pages(7, 0))
    assert len(parked.events) == 3
    for mapper in world.mappers[::-1]:
        assert not all(event.is_set() for event in parked.events)
        mapper.answer()

    assert world.conclude(parked) == bytes(4)
    assert world.hosts() == [1, 1, 1]


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, Status.NOMEM), (errno.EIO, Status.DEVERR)]
)
def test_a_map_that_the_third_host_refuses_is_undone_in_the_others(
    world: World, number: int, status: Status
) -> None:
    assert world.ask(map_pages(7, 0)) == Status.OK
    before = world.device.refused

    assert world.ask(map_pages(7, 1), refuse=number) == status

    assert world.hosts() == [1, 1, 1]
    assert world.device.mappings == len(world.device.domains[7].map) == 1
    assert world.device.refused == before + 1
    assert world.ask(map_pages(7, 1)) == Status.OK


def test_a_map_that_is_undone_waits_for_whoever_used_it_already(world: World) -> None:
    software = BasicMemoryMapper()
    world.device.add_endpoint(4, software)
    world.ask(attach(7, 4))
    parked = world.parked(map_pages(7, 0))
    with software.start_export_session() as fault:
        software.export(0, 8)
        for mapper in world.mappers:
            mapper.answer(0, errno.EIO)
        undoing = world.conclude(parked)

        assert isinstance(undoing, Parked)
        assert fault.is_set()
        assert len(undoing.events) == 1  # hosts that refused have nothing to undo
        software.release(0, 8)
    assert world.conclude(undoing) == REPLIES[Status.DEVERR]


def test_an_unmap_is_answered_when_the_hosts_have(world: World) -> None:
    world.ask(map_pages(7, 0, 2))
    parked = world.parked(unmap_pages(7, 0, 2))
    assert world.hosts() == [0, 0, 0]
    assert world.device.mappings == 0
    for mapper in world.mappers:
        mapper.answer()

    assert world.conclude(parked) == bytes(4)


def test_a_host_that_dies_refuses_nothing(world: World) -> None:
    parked = world.parked(map_pages(7, 0))
    for mapper in world.mappers:
        mapper.die()

    assert world.conclude(parked) == bytes(4)
    assert world.ask(unmap_pages(7, 0)) == Status.OK
    assert world.ask(attach(8, 1)) == Status.OK


def test_an_attach_that_is_refused_leaves_the_endpoint_where_it_was(world: World) -> None:
    world.ask(map_pages(7, 0))
    world.add(4)

    assert world.ask(attach(7, 4), refuse=errno.ENOMEM) == Status.NOMEM
    assert not world.device.endpoints[4].attached
    assert world.hosts() == [1, 1, 1, 0]
    assert world.ask(attach(7, 4)) == Status.OK


def test_a_domain_that_was_left_empty_comes_back_with_its_mappings(world: World) -> None:
    world.ask(map_pages(7, 0))
    world.add(4)
    world.ask(attach(9, 4))
    assert world.ask(map_pages(9, 5, 2)) == Status.OK

    assert world.ask(attach(7, 4), refuse=errno.EIO) == Status.DEVERR

    assert world.device.domains[9].endpoints.keys() == {4}
    assert world.device.mappings == 2
    assert world.hosts() == [1, 1, 1, 1]
    assert world.ask(unmap_pages(9, 5, 2)) == Status.OK
    assert world.hosts() == [1, 1, 1, 0]


def test_a_domain_that_was_made_for_an_attach_that_is_refused_is_gone(world: World) -> None:
    assert world.ask(attach(9, 3, flags=BYPASS), refuse=errno.EIO) == Status.DEVERR

    assert world.device.domains.keys() == {7}
    assert world.kinds() == [DomainKind.TRANSLATING] * 3
    assert world.hosts() == [0, 0, 0]


def test_a_detach_into_bypass_that_is_refused_leaves_the_endpoint_where_it_was(
    world: World,
) -> None:
    world.device.write_config(36, b"\1")
    world.ask(map_pages(7, 0))

    assert world.ask(detach(7, 3), refuse=errno.EIO) == Status.DEVERR
    assert world.device.endpoints[3].domain is world.device.domains[7]
    assert world.hosts() == [1, 1, 1]
    assert world.ask(detach(7, 3)) == Status.OK
    assert world.kinds()[2] is DomainKind.BYPASS
    assert world.hosts() == [1, 1, 2]


def test_putting_back_can_be_refused_too_and_then_nothing_is_mapped(world: World) -> None:
    world.ask(map_pages(7, 0))
    parked = world.parked(attach(9, 3, flags=BYPASS))
    world.answer(errno.ENOSPC)
    undoing = world.conclude(parked)
    assert isinstance(undoing, Parked)
    world.answer(errno.EIO)

    # The first refusal is what the guest is told.
    assert world.conclude(undoing) == REPLIES[Status.NOMEM]
    group = world.device.endpoints[3].group
    assert group.broken
    assert world.hosts() == [1, 1, 0]
    assert world.ask(map_pages(7, 1)) == Status.DEVERR
    assert world.ask(attach(7, 3)) == Status.OK
    assert world.device.endpoints[3].group.broken is None
    assert world.hosts() == [1, 1, 1]


def test_putting_back_can_fail_at_once(world: World) -> None:
    world.ask(map_pages(7, 0))
    parked = world.parked(attach(9, 3, flags=BYPASS))
    world.mappers[2].fail_add()
    world.answer(errno.ENOSPC)

    assert world.conclude(parked) == REPLIES[Status.NOMEM]
    assert world.device.endpoints[3].domain is world.device.domains[7]
    assert world.device.endpoints[3].group.broken
    assert world.hosts() == [1, 1, 0]


def test_repairing_an_endpoint_can_be_refused(world: World) -> None:
    world.ask(map_pages(7, 0))
    group = world.device.endpoints[3].group
    group.quarantine("for this test")
    world.answer()

    assert world.ask(attach(7, 3), refuse=errno.EIO) == Status.DEVERR
    assert group.broken
    assert world.hosts() == [1, 1, 0]
    assert world.ask(attach(7, 3)) == Status.OK
    assert world.hosts() == [1, 1, 1]


def test_what_fails_at_once_waits_for_what_is_undone(world: World) -> None:
    other = FaultyMapper()
    world.device.add_endpoint(4, other)
    world.ask(attach(7, 4))
    other.fail_add()

    parked = world.parked(map_pages(7, 0))
    assert parked.reply == REPLIES[Status.DEVERR]
    assert [len(mapper.questions) for mapper in world.mappers] == [2, 2, 2]
    world.answer(errno.ENOSPC)  # refuses what nobody wants any more
    assert world.conclude(parked) == REPLIES[Status.DEVERR]
    assert not any(endpoint.group.broken for endpoint in world.device.endpoints.values())


def test_what_can_not_be_put_back_after_a_failure_is_out_of_order(world: World) -> None:
    other = FaultyMapper()
    world.device.add_endpoint(4, other)
    world.ask(attach(7, 4))
    world.ask(map_pages(7, 0))
    other.fail_remove()

    assert world.ask(unmap_pages(7, 0), refuse=errno.EIO) == Status.DEVERR
    broken = [endpoint.group.broken is not None for endpoint in world.device.endpoints.values()]
    assert broken == [False, False, True, False]
    assert world.hosts() == [1, 1, 0]


def test_an_attach_that_fails_at_once_waits_for_what_it_undid(world: World) -> None:
    world.ask(map_pages(7, 0))
    world.mappers[2].fail_add(1, errno.ENOSPC)

    assert world.ask(attach(9, 3, flags=BYPASS)) == Status.NOMEM
    assert world.device.domains.keys() == {7}
    assert world.hosts() == [1, 1, 1]


# -- resets, and what is no request --


def test_a_reset_waits_for_hosts(world: World) -> None:
    world.ask(map_pages(7, 0))

    assert world.settle(world.device.reset()) == 1
    assert world.hosts() == [0, 0, 0]
    assert world.device.settle() == []
    assert world.ask(attach(7, 1)) == Status.OK
    assert world.ask(map_pages(7, 0)) == Status.OK
    assert world.hosts() == [1, 0, 0]


def test_a_reset_hears_of_the_request_that_was_parked(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.ask(map_pages(7, 0))
    world.device.write_config(36, b"\1")
    parked = world.parked(detach(7, 3))

    waits = [*parked.events, *world.device.reset()]
    assert world.settle(list({id(event): event for event in waits}.values()), errno.EIO) == 1
    assert world.kinds() == [DomainKind.BYPASS, DomainKind.BYPASS, DomainKind.BLOCKED]
    assert world.hosts() == [2, 2, 0]
    assert f"mapper {world.mappers[2].id()} refuses bypass" in caplog.text


def test_a_system_reset_waits_for_hosts(world: World) -> None:
    world.settle(world.device.write_config(36, b"\1"))
    world.ask(detach(7, 3))
    assert world.hosts() == [0, 0, 2]

    assert world.settle(world.device.system_reset()) == 1
    assert world.kinds() == [DomainKind.BLOCKED] * 3
    assert world.hosts() == [0, 0, 0]


def test_a_host_that_refuses_bypass_later_leaves_its_endpoint_blocked(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.ask(detach(7, 2))
    world.ask(detach(7, 3))

    assert world.settle(world.device.write_config(36, b"\1"), errno.EIO) == 1
    assert world.kinds() == [DomainKind.TRANSLATING, DomainKind.BYPASS, DomainKind.BLOCKED]
    assert caplog.text.count("refuses bypass") == 1


def test_an_endpoint_that_is_added_in_bypass_is_heard_before_the_first_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = VirtioIommu(IommuConfig(boot_bypass=True))
    mapper = LaterMapper()
    endpoint = device.add_endpoint(1, mapper)
    (event,) = device.settle()
    mapper.answer(0, errno.EIO)
    mapper.answer()
    event.close()
    (event,) = device.settle()
    assert endpoint.kind is DomainKind.BLOCKED
    mapper.answer()
    event.close()

    assert device.settle() == []
    assert mapper.host == {}
    assert "refuses bypass" in caplog.text


def test_what_bypass_was_refused_is_not_held_against_a_request_that_comes_first() -> None:
    device = VirtioIommu(IommuConfig(boot_bypass=True))
    mapper = LaterMapper()
    device.add_endpoint(1, mapper)
    parked = device.handle(attach(7, 1), spec.TAIL_SIZE)
    assert isinstance(parked, Parked)
    while mapper.questions:
        mapper.answer(0, errno.EIO)
    for event in parked.events:
        event.close()

    assert parked.conclude() == bytes(4)
    assert device.settle() == []


def test_bypass_written_while_an_attach_is_undone_is_where_the_endpoint_goes(
    world: World,
) -> None:
    world.add(4)
    parked = world.parked(attach(9, 4, flags=BYPASS))
    assert world.device.write_config(36, b"\1") == []
    world.answer(errno.EIO)
    undoing = world.conclude(parked)

    assert isinstance(undoing, Parked)
    assert world.kinds()[3] is DomainKind.BYPASS
    assert not world.device.endpoints[4].attached
    world.answer(errno.EIO)
    assert world.conclude(undoing) == REPLIES[Status.DEVERR]
    assert world.device.endpoints[4].group.broken
    assert world.hosts() == [0, 0, 0, 0]
    assert world.ask(attach(7, 4)) == Status.OK
