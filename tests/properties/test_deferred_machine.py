"""The same sequences with mappers whose hosts answer later, in any order, and refuse at random.

What :class:`~tests.properties.test_device_machine.DeviceMachine` checks of a request is
checked when its reply is there, however often it was parked until then.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import hypothesis.strategies as st
from hypothesis import note, settings
from hypothesis.stateful import invariant, precondition, rule

from tests.conformance.mappers import FaultyMapper, LaterMapper
from tests.properties.test_device_machine import (
    GROUPS,
    MATE,
    MAX_MAPPINGS,
    PAGE,
    DeviceMachine,
    known,
    page_counts,
    pages,
)
from viommu.device import Parked
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import Status

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSALS: Final = {errno.ENOSPC: Status.NOMEM, errno.EIO: Status.DEVERR}


class Pending:
    """A request that was sent, and what to compare its reply with."""

    def __init__(self, request: bytes, room: int, before: object, revoked: set[int]) -> None:
        self.request = request
        self.room = room
        self.before = before
        self.revoked = revoked
        self.expect: Callable[[], set[Status]] = set
        self.answer: bytes | Parked = b""
        self.refused: set[Status] = set()  # what hosts that refused make of it
        self.undoing = False


class DeferredMachine(DeviceMachine):
    """All mappers answer later, but that of two mates."""

    def __init__(self) -> None:
        self.hosts: list[LaterMapper] = []
        super().__init__()
        self.pending: Pending | None = None

    def make_mapper(self, group: list[int]) -> FaultyMapper:
        if MATE in group:
            return super().make_mapper(group)
        self.hosts.append(LaterMapper(page_sizes=PAGE))
        return self.hosts[-1]

    def teardown(self) -> None:
        while not self.idle:
            for host in self.hosts:
                for _ in list(host.questions):
                    host.answer()
            self.release_everything()
        super().teardown()

    @property
    def idle(self) -> bool:
        return not self.waits and self.pending is None

    # Requests

    def send(self, request: bytes, expect: Callable[[], set[Status]]) -> None:
        if not self.idle:
            return  # the request that makes a domain for this one was parked
        refused = [mapper.refusals for mapper in self.mappers]
        room = spec.TAIL_SIZE
        if request[0] == spec.RequestType.PROBE:
            room += self.rig.config.probe_size
        pending = Pending(request, room, self.rig.snapshot(), self.revoked())
        pending.answer = self.rig.iommu.handle(request, room)
        if refused == [mapper.refusals for mapper in self.mappers]:
            pending.expect = expect
        else:
            pending.refused = {Status.DEVERR}
            pending.undoing = True
            # What was taken back may wait for its client without anybody being told.
            pending.revoked = self.revoked()
        self.pending = pending
        self.go_on()

    def settle(self) -> None:
        if all(wait.is_set() for wait in self.waits):
            for wait in self.waits:
                wait.close()
            self.waits = self.rig.iommu.settle()
        self.go_on()

    def go_on(self) -> None:
        """Conclude the request that is parked, as far as its events have fired."""
        pending = self.pending
        if pending is None:
            return
        while isinstance(pending.answer, Parked):
            assert pending.answer.events
            if not all(event.is_set() for event in pending.answer.events):
                return
            for event in pending.answer.events:
                event.close()
            pending.answer = pending.answer.conclude()
            pending.undoing = bool(pending.refused)
        self.pending = None
        reply = self.rig.judge(pending.request, pending.room, pending.answer, pending.before)
        expected = pending.refused or pending.expect() or {Status.OK}
        note(f"{pending.request.hex()}: {reply.status}, expected: {expected}")
        assert reply.status in expected
        assert self.revoked() <= pending.revoked

    # Hosts

    @precondition(lambda self: any(host.questions for host in self.hosts))
    @rule(data=st.data(), refuse=st.sampled_from([0, 0, 0, *REFUSALS]))
    def answer(self, data: st.DataObject, refuse: int) -> None:
        """Let a host answer something; it can refuse what a request has asked for."""
        host = data.draw(st.sampled_from([host for host in self.hosts if host.questions]))
        index = data.draw(st.integers(0, len(host.questions) - 1), label="which")
        question = host.questions[index]
        # What hosts make of putting things back, and of bypass, is tested by hand.
        pending = self.pending
        if pending is None or pending.undoing or not question.is_map or question.withdrawn:
            refuse = 0
        if refuse and pending is not None:
            pending.refused.add(REFUSALS[refuse])
        host.answer(index, refuse)
        self.settle()

    @rule()
    def answer_everything(self) -> None:
        for host in self.hosts:
            while host.questions:
                host.answer(len(host.questions) - 1)
        self.settle()

    @rule(index=st.integers(0, len(GROUPS) - 2), really=st.integers(0, 15))
    def die(self, index: int, really: int) -> None:
        if not really:
            self.hosts[index].die()
            self.settle()

    @rule(index=st.integers(0, len(GROUPS) - 1), nth=st.integers(1, 3), adding=st.booleans())
    def the_host_will_refuse(self, index: int, nth: int, *, adding: bool) -> None:
        self.the_host_recovers()
        if adding:
            self.mappers[index].fail_add(nth)
        elif self.mappers[index] not in self.hosts:
            self.mappers[index].fail_remove(nth)

    # Resets come at any time

    def forget_pending(self) -> None:
        """Forget the request that is parked, but not what it waits for."""
        pending, self.pending = self.pending, None
        if pending is not None and isinstance(pending.answer, Parked):
            self.waits += pending.answer.events

    @rule(really=st.integers(0, 3))
    def reset(self, really: int) -> None:
        if not really:
            self.forget_pending()
            super().reset(really)
            self.settle()

    @rule(really=st.integers(0, 3))
    def system_reset(self, really: int) -> None:
        if not really:
            self.forget_pending()
            super().system_reset(really)
            self.settle()

    @precondition(lambda self: self.idle)
    @rule(value=st.sampled_from([0, 0, 0, 1, 2, 255]))
    def write_bypass(self, value: int) -> None:
        self.the_host_recovers()
        self.waits += self.rig.iommu.write_config(36, bytes([value]))
        if value < 2:
            self.model.bypass = bool(value)
        self.settle()

    # While a request is parked the model does not know how it ends.

    @precondition(lambda self: self.pending is None)
    @rule(endpoint=known, which=st.integers(0, MAX_MAPPINGS - 1))
    def hold_what_is_mapped(self, endpoint: int, which: int) -> None:
        super().hold_what_is_mapped(endpoint, which)

    @precondition(lambda self: self.pending is None)
    @rule(endpoint=known, page=pages, count=page_counts)
    def hold(self, endpoint: int, page: int, count: int) -> None:
        super().hold(endpoint, page, count)

    @precondition(lambda self: self.pending or self.waits)
    @rule()
    def release_everything(self) -> None:
        for mapper, iova, size in self.held:
            mapper.release(iova, size)
        self.held.clear()
        self.settle()

    @invariant()
    def mappers_hold_what_the_model_says(self) -> None:
        if self.pending is None:
            super().mappers_hold_what_the_model_says()

    @invariant()
    def accesses_go_where_the_model_says(self) -> None:
        if self.pending is None:
            super().accesses_go_where_the_model_says()

    @invariant()
    def nothing_waits_for_memory_that_nobody_holds(self) -> None:
        if not self.held and not any(host.questions for host in self.hosts):
            assert self.idle

    @invariant()
    def a_host_that_has_answered_has_what_its_mapper_says(self) -> None:
        for host in self.hosts:
            if not host.questions and not host.dead and self.idle:
                assert sorted(host.host.values()) == host.mappings()


TestDeferredMachine = DeferredMachine.TestCase
TestDeferredMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
