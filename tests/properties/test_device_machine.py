"""Any sequence of requests, faults of the host, exports and resets agrees with a naive model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
from hypothesis import note, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.conformance.mappers import FaultyMapper
from tests.conformance.rig import Rig, attach, detach, map_, probe, unmap
from tests.properties.spec_model import SpecModel
from viommu.device import IommuConfig, Limits, Parked
from viommu.domain import ReservedRegion
from viommu.errors import Access, TranslationFault
from viommu.export import SessionState
from viommu.mapper import MappingInfo
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.events import Event

PAGE = 0x1000
PAGES = 12
# Page 0 and the last page are outside; the four last endpoints differ from the rest:
# two share a mapper, one has a reserved page.
INPUT_RANGE = (PAGE, (PAGES - 1) * PAGE - 1)
PLAIN, OTHER, MATE, MATES_MATE, PICKY = 1, 2, 3, 4, 5
STRANGER = 6
GROUPS = [[PLAIN], [OTHER], [MATE, MATES_MATE], [PICKY]]
RESERVED = {PICKY: ((5 * PAGE, 6 * PAGE - 1),)}
MAX_DOMAINS = 3
MAX_MAPPINGS = 8

known = st.sampled_from([PLAIN, OTHER, MATE, MATES_MATE, PICKY])
endpoints = st.one_of(known, known, known, st.just(STRANGER))
# Mostly one that is there: an index into the translating domains, see choose().
domains = st.sampled_from([0] * 5 + [1] * 3 + [2] * 2 + [3, 4])
pages = st.sampled_from([0, PAGES - 1, *range(PAGES), *range(1, PAGES - 1)])
page_counts = st.integers(1, 4)
# Mostly nothing: how far a range is off its page at either end, and what is in a reserved field.
slips = st.sampled_from([0] * 12 + [-1, 1, 0x800])
strange_bits = st.sampled_from([0] * 12 + [1 << 1, 1 << 31])


class DeviceMachine(RuleBasedStateMachine):
    """Drives a device and the model side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(
            IommuConfig(
                page_size_mask=PAGE,
                input_range=(INPUT_RANGE[0], INPUT_RANGE[1] + 1),
                limits=Limits(domains=MAX_DOMAINS, mappings=MAX_MAPPINGS),
            )
        )
        for group in GROUPS:
            mapper = self.make_mapper(group)
            for endpoint in group:
                reserved = [
                    ReservedRegion(low, high + 1) for low, high in RESERVED.get(endpoint, ())
                ]
                self.rig.add(endpoint, reserved, mapper=mapper)
        self.model = SpecModel(
            granule=PAGE,
            input_range=INPUT_RANGE,
            max_domains=MAX_DOMAINS,
            max_mappings=MAX_MAPPINGS,
            groups=GROUPS,
            reserved=RESERVED,
        )
        self.mappers = [self.rig.mappers[group[0]] for group in GROUPS]
        self.sessions: dict[int, Event] = {}
        self.held: list[tuple[FaultyMapper, int, int]] = []
        self.waits: list[Event] = []

    def make_mapper(self, group: list[int]) -> FaultyMapper:
        """Return the mapper of endpoints that can't be told apart."""
        del group
        return FaultyMapper(page_sizes=PAGE)

    def teardown(self) -> None:
        for mapper, iova, size in self.held:
            mapper.release(iova, size)
        assert all(wait.is_set() for wait in self.waits)
        for session in self.sessions.values():
            session.close()

    @initialize(numbers=st.lists(st.integers(0, 2), min_size=5, max_size=5))
    def boot(self, numbers: list[int]) -> None:
        """Attach endpoints as a driver does at first; 0 stands for: not yet."""
        for endpoint, number in zip(self.rig.mappers, numbers, strict=True):
            if number:
                self._attach(number, endpoint, 0, 0)

    def choose(self, index: int) -> int:
        """Return the number of a translating domain, or (above 2) one that may not be there."""
        if index > 2:
            return index
        there = [n for n, domain in self.model.domains.items() if not domain.bypass]
        if not there:
            self._attach(index, PLAIN, 0, 0)
            return index
        return there[index % len(there)]

    @property
    def idle(self) -> bool:
        """Whether nothing is parked: only then is a request taken off the ring."""
        return not self.waits

    # Requests

    def send(self, request: bytes, expect: Callable[[], set[Status]]) -> None:
        """Send a request, and compare with what the model says that it does."""
        refused = [mapper.refusals for mapper in self.mappers]
        before = self.rig.snapshot()
        revoked = self.revoked()
        room = spec.TAIL_SIZE
        if request[0] == spec.RequestType.PROBE:
            room += self.rig.config.probe_size
        answer = self.rig.iommu.handle(request, room)
        parked = isinstance(answer, Parked)
        if isinstance(answer, Parked):
            assert not any(event.is_set() for event in answer.events)
            self.waits += answer.events
            answer = answer.reply
        reply = self.rig.judge(request, room, answer, before)
        if refused != [mapper.refusals for mapper in self.mappers]:
            assert reply.status == Status.DEVERR
            assert not parked
            return
        refusals = expect()
        note(f"{request.hex()}: {reply.status}, model: {refusals or 'OK'}")
        assert reply.status in (refusals or {Status.OK})
        # Success is not told before memory that was taken away has been let go.
        assert parked or self.revoked() == revoked

    def revoked(self) -> set[int]:
        """Return the mappers whose clients were told to let go and have not yet."""
        return {m.id() for m in self.mappers if m.exports.state is SessionState.FAULTED}

    @precondition(lambda self: self.idle)
    @rule(domain=domains, endpoint=endpoints, flags=strange_bits, reserved=strange_bits)
    def attach(self, domain: int, endpoint: int, flags: int, reserved: int) -> None:
        self._attach(domain, endpoint, flags, reserved)

    @precondition(lambda self: self.idle)
    @rule(domain=domains, endpoint=endpoints, flags=strange_bits)
    def attach_in_bypass(self, domain: int, endpoint: int, flags: int) -> None:
        self._attach(domain, endpoint, flags | spec.ATTACH_F_BYPASS, 0)

    def _attach(self, domain: int, endpoint: int, flags: int, reserved: int) -> None:
        self.send(
            attach(domain, endpoint, flags=flags, reserved=reserved.to_bytes(4, "little")),
            lambda: self.model.attach(domain, endpoint, flags, reserved),
        )

    @precondition(lambda self: self.idle)
    @rule(domain=domains, endpoint=endpoints)
    def attach_plainly(self, domain: int, endpoint: int) -> None:
        self._attach(self.choose(domain), endpoint, 0, 0)

    @precondition(lambda self: self.idle)
    @rule(domain=domains, endpoint=endpoints)
    def detach(self, domain: int, endpoint: int) -> None:
        self.send(detach(domain, endpoint), lambda: self.model.detach(domain, endpoint))

    @precondition(lambda self: self.idle)
    @rule(endpoint=known)
    def detach_from_its_domain(self, endpoint: int) -> None:
        domain = self.model.domain_of.get(endpoint, 0)
        self.send(detach(domain, endpoint), lambda: self.model.detach(domain, endpoint))

    @precondition(lambda self: self.idle)
    @rule(domain=domains, page=pages, count=page_counts, phys=pages, flags=st.integers(0, 7))
    def map(self, domain: int, page: int, count: int, phys: int, flags: int) -> None:
        self._map(domain, page * PAGE, (page + count) * PAGE - 1, phys * PAGE, flags)

    @precondition(lambda self: self.idle)
    @rule(
        domain=domains,
        page=pages,
        count=page_counts,
        phys=st.one_of(pages, pages, st.just((1 << 52) - 2)),
        off=st.tuples(slips, slips, slips),
        flags=st.sampled_from([1, 2, 3, 3, 3, 7, 8, 1 << 31]),
    )
    def map_wildly(
        self,
        *,
        domain: int,
        page: int,
        count: int,
        phys: int,
        off: tuple[int, int, int],
        flags: int,
    ) -> None:
        first = max(page * PAGE + off[0], 0)
        last = (page + count) * PAGE - 1 + off[1]
        self._map(domain, first, last, max(phys * PAGE + off[2], 0), flags)

    def _map(self, domain: int, first: int, last: int, gpa: int, flags: int) -> None:
        number = self.choose(domain)
        self.send(
            map_(number, first, last, gpa, flags=flags),
            lambda: self.model.map(number, first, last, gpa, flags),
        )

    @precondition(lambda self: self.idle)
    @rule(domain=domains, page=pages, count=st.integers(0, PAGES), low=slips, high=slips)
    def unmap(self, domain: int, page: int, count: int, low: int, high: int) -> None:
        domain = self.choose(domain)
        first = max(page * PAGE + low, 0)
        last = max((page + count) * PAGE - 1 + high, 0)
        self.send(unmap(domain, first, last), lambda: self.model.unmap(domain, first, last))

    @precondition(lambda self: self.idle)
    @rule(domain=domains, which=st.integers(0, MAX_MAPPINGS - 1), low=slips, high=slips)
    def unmap_one(self, domain: int, which: int, low: int, high: int) -> None:
        domain = self.choose(domain)
        there = self.model.domains.get(domain)
        if there is None or not there.mapped:
            return
        mapped = there.mapped[which % len(there.mapped)]
        first, last = mapped.first + low, mapped.last + high
        self.send(unmap(domain, first, last), lambda: self.model.unmap(domain, first, last))

    @precondition(lambda self: self.idle)
    @rule(domain=domains)
    def unmap_everything(self, domain: int) -> None:
        domain = self.choose(domain)
        first, last = INPUT_RANGE
        self.send(unmap(domain, first, last), lambda: self.model.unmap(domain, first, last))

    @precondition(lambda self: self.idle)
    @rule(endpoint=endpoints)
    def probe(self, endpoint: int) -> None:
        self.send(probe(endpoint), lambda: self.model.probe(endpoint))

    # The host

    @rule(index=st.integers(0, len(GROUPS) - 1), nth=st.integers(1, 3), adding=st.booleans())
    def the_host_will_refuse(self, index: int, nth: int, *, adding: bool) -> None:
        # One at a time: what a second failure during the undoing of the first does
        # to the endpoint is tested by hand.
        for mapper in self.mappers:
            mapper.fail_nothing()
        if adding:
            self.mappers[index].fail_add(nth)
        else:
            self.mappers[index].fail_remove(nth)

    # Resets and the configuration

    @rule(really=st.integers(0, 3))
    def reset(self, really: int) -> None:
        if really:  # mostly not: what takes many steps to build is worth more
            return
        self.the_host_recovers()
        self.waits += self.rig.iommu.reset()
        self.model.reset()

    @rule(really=st.integers(0, 3))
    def system_reset(self, really: int) -> None:
        if really:
            return
        self.the_host_recovers()
        self.waits += self.rig.iommu.system_reset()
        self.model.reset()
        self.model.bypass = False

    @precondition(lambda self: self.idle)
    @rule(value=st.sampled_from([0, 0, 0, 1, 2, 255]))
    def write_bypass(self, value: int) -> None:
        self.the_host_recovers()
        self.rig.iommu.write_config(36, bytes([value]))
        if value < 2:
            self.model.bypass = bool(value)

    def the_host_recovers(self) -> None:
        for mapper in self.mappers:
            mapper.fail_nothing()

    # Endpoints

    def session(self, mapper: FaultyMapper) -> bool:
        """Have an export session that works; return whether there is one."""
        if mapper.exports.state is not SessionState.ACTIVE:
            if mapper.exports.total:
                return False
            old = self.sessions.pop(mapper.id(), None)
            if old is not None:
                old.close()
            self.sessions[mapper.id()] = mapper.start_export_session()
        return True

    @rule(endpoint=known, which=st.integers(0, MAX_MAPPINGS - 1))
    def hold_what_is_mapped(self, endpoint: int, which: int) -> None:
        mapped = self.model.seen_by(endpoint)
        if mapped:
            first, last = mapped[which % len(mapped)][:2]
            self._hold(endpoint, first, last + 1 - first)

    @rule(endpoint=known, page=pages, count=page_counts)
    def hold(self, endpoint: int, page: int, count: int) -> None:
        self._hold(endpoint, page * PAGE, count * PAGE)

    def _hold(self, endpoint: int, iova: int, size: int) -> None:
        mapper = self.rig.mappers[endpoint]
        if not self.session(mapper):
            return
        addresses = range(iova, iova + size, PAGE)
        expected = [self.model.translate(endpoint, address) for address in addresses]
        try:
            mapper.export(iova, size)
        except TranslationFault as fault:
            assert (fault.iova - iova) // PAGE == expected.index(None)  # noqa: PT017 - or no fault
        else:
            assert None not in expected
            self.held.append((mapper, iova, size))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1), label="which")
        mapper, iova, size = self.held.pop(index)
        mapper.release(iova, size)
        self.settle()

    @precondition(lambda self: self.waits)
    @rule()
    def release_everything(self) -> None:
        for mapper, iova, size in self.held:
            mapper.release(iova, size)
        self.held.clear()
        self.settle()
        assert self.idle

    def settle(self) -> None:
        """Answer what was parked if all that it waited for has happened."""
        if all(wait.is_set() for wait in self.waits):
            self.waits.clear()

    # What must always hold

    @invariant()
    def the_device_is_in_order(self) -> None:
        self.rig.check()

    @invariant()
    def mappers_hold_what_the_model_says(self) -> None:
        for endpoint, mapper in self.rig.mappers.items():
            mapped = self.model.seen_by(endpoint)
            if mapped is not None:  # else Rig.check() has seen that it is the identity
                assert mapper.mappings() == [
                    MappingInfo(first, phys, last + 1 - first, Access(flags & 3))
                    for first, last, phys, flags in mapped
                ]

    @invariant()
    def accesses_go_where_the_model_says(self) -> None:
        for endpoint, mapper in self.rig.mappers.items():
            if not self.session(mapper):
                continue
            for address in (p * PAGE + offset for p in range(PAGES) for offset in (0, PAGE - 1)):
                expected = self.model.translate(endpoint, address)
                try:
                    (region,) = mapper.export(address, 1)
                except TranslationFault as fault:
                    assert (expected, fault.iova) == (None, address)  # noqa: PT017 - or no fault
                else:
                    mapper.release(address, 1)
                    assert expected == (region.gpa, region.prot.value)

    @invariant()
    def nothing_waits_for_memory_that_nobody_holds(self) -> None:
        if not self.held:
            assert all(wait.is_set() for wait in self.waits)

    @invariant()
    def what_was_not_revoked_is_still_mapped(self) -> None:
        for mapper, iova, size in self.held:
            if mapper.exports.state is SessionState.ACTIVE:
                mapper.export(iova, size)
                mapper.release(iova, size)


TestDeviceMachine = DeviceMachine.TestCase
TestDeviceMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
