"""The two queues of the virtio-iommu: requests, parking, faults, resets."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.conformance.mappers import LaterMapper
from viommu.basic import BasicMemoryMapper
from viommu.device import VirtioIommu
from viommu.errors import Access, TranslationFault
from viommu.loop import Loop
from viommu.pci import ResetKind
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, RequestType, Status
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout
from viommu.virtio.iommu import VirtioIommuDevice
from viommu.virtio.ring import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.events import Event

ENDPOINT = 0x30
PAGE = 0x1000
SIZE = 16


class Bus:
    """A transport that remembers what it was told."""

    def __init__(self) -> None:
        self.active = True
        self.interrupts: list[int] = []
        self.broken: list[str] = []
        self.resets_done = 0

    def interrupt(self, queue: int) -> None:
        self.interrupts.append(queue)

    def config_changed(self) -> None:
        raise AssertionError("the configuration never changes by itself")

    def needs_reset(self, reason: str) -> None:
        self.broken.append(reason)

    def reset_done(self) -> None:
        self.resets_done += 1


class World:
    """A started device, its memory, and the driver's ends of its queues."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.mapper = BasicMemoryMapper()
        self.iommu = VirtioIommu()
        self.iommu.add_endpoint(ENDPOINT, self.mapper)
        self.idle_kicks: list[int] = []
        self.device = VirtioIommuDevice(self.iommu, self.loop, self.idle_kicks.append)
        self.session: Event | None = None
        self.start()

    def start(self) -> None:
        self.bus = Bus()
        self.memory = PieceMemory(0x40000)
        layouts = RingLayout.at(0, SIZE), RingLayout.at(0x10000, SIZE)
        self.requests, self.events = (DriverQueue(self.memory, SIZE, each) for each in layouts)
        queues = [
            SplitQueue(
                self.memory, i, SIZE, at.desc, at.avail, at.used, event_idx=False, indirect=True
            )
            for i, at in enumerate(layouts)
        ]
        self.free = 0x20000
        self.replies: dict[int, int] = {}
        self.reports: dict[int, int] = {}
        self.device.start(self.bus, self.iommu.features, queues)

    def submit(self, request: bytes, writable: int = 4) -> int:
        at, self.free = self.free, self.free + 0x400
        self.memory.write(at, request + b"\xee" * writable)
        head = self.requests.add([(at, len(request))], [(at + len(request), writable)])
        self.replies[head] = at + len(request)
        self.requests.publish()
        return head

    def ask(self, request: bytes) -> int:
        """Return the status of a request that is answered at once."""
        self.submit(request)
        self.device.notify(spec.REQUEST_QUEUE)
        (status,) = self.statuses()
        return status

    def statuses(self) -> list[int]:
        found = []
        for used in self.requests.collect():
            assert used.length == 4
            found.append(self.memory.read(self.replies[used.head], 4)[0])
        return found

    def map_page(self) -> None:
        assert self.ask(spec.ATTACH.pack(RequestType.ATTACH, 1, ENDPOINT, 0, 0)) == Status.OK
        assert self.ask(spec.MAP.pack(RequestType.MAP, 1, 0, PAGE - 1, 0x8000, 3)) == Status.OK

    def hold(self) -> None:
        self.session = self.mapper.start_export_session()
        self.mapper.export(0, 8)

    def faults(self) -> list[bytes]:
        return [self.memory.read(self.reports[u.head], u.length) for u in self.events.collect()]

    def offer_event_buffers(self, count: int, size: int = spec.FAULT.size) -> None:
        """As Linux does: without a kick."""
        for _ in range(count):
            at, self.free = self.free, self.free + 0x400
            self.reports[self.events.add([], [(at, size)])] = at
        self.events.publish()

    def stray(self, iova: int = 0x5000) -> None:
        self.iommu.report_fault(ENDPOINT, TranslationFault(iova, Access.READ))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.device.reset(ResetKind.DISCONNECT)
    if world.session:
        world.session.close()
    world.loop.close()


class LaterWorld(World):
    """The same with a second endpoint in the domain, whose mapper answers later."""

    def __init__(self) -> None:
        self.host = LaterMapper()
        super().__init__()

    def start(self) -> None:
        if LATER not in self.iommu.endpoints:
            self.iommu.add_endpoint(LATER, self.host)
        super().start()

    def answer(self, refuse: int = 0) -> None:
        """Have the host answer all that it was asked, and the loop hear it."""
        while self.host.questions:
            self.host.answer(0, refuse)
        self.loop.turn(0)

    def kick(self, request: bytes) -> None:
        self.submit(request)
        self.device.notify(spec.REQUEST_QUEUE)

    def map_page(self) -> None:
        assert self.ask(spec.ATTACH.pack(RequestType.ATTACH, 1, LATER, 0, 0)) == Status.OK
        self.kick(MAP)
        self.answer()
        assert self.statuses() == [Status.OK]


@pytest.fixture
def later() -> Iterator[LaterWorld]:
    world = LaterWorld()
    yield world
    world.device.reset(ResetKind.DISCONNECT)
    world.device.close()
    world.loop.close()


LATER = ENDPOINT + 8
MAP = spec.MAP.pack(RequestType.MAP, 1, 0, PAGE - 1, 0x8000, 3)
UNMAP = spec.UNMAP.pack(RequestType.UNMAP, 1, 0, PAGE - 1)
UNKNOWN_DOMAIN = spec.UNMAP.pack(RequestType.UNMAP, 99, 0, PAGE - 1)
REPORT = spec.FAULT.pack(
    FaultReason.DOMAIN, spec.FAULT_F_READ | spec.FAULT_F_ADDRESS, ENDPOINT, 0x5000
)


def test_a_batch_is_answered_with_one_interrupt(world: World) -> None:
    for _ in range(3):
        world.submit(UNKNOWN_DOMAIN)
    world.device.notify(spec.REQUEST_QUEUE)

    assert world.statuses() == [Status.NOENT] * 3
    assert world.bus.interrupts == [spec.REQUEST_QUEUE]


def test_linux_gets_no_interrupt_it_did_not_ask_for(world: World) -> None:
    world.requests.disable_interrupts()

    assert world.ask(UNKNOWN_DOMAIN) == Status.NOENT
    assert world.bus.interrupts == []


def test_a_request_in_pieces_is_understood(world: World) -> None:
    request = spec.ATTACH.pack(RequestType.ATTACH, 1, ENDPOINT, 0, 0)
    world.memory.write(0x30000, request)
    pieces = [(0x30000 + i, 1) for i in range(len(request))][: SIZE - 5]
    pieces.append((pieces[-1][0] + 1, len(request) - len(pieces)))
    head = world.requests.add(pieces, [(0x31000 + 8 * i, 1) for i in range(4)])
    world.requests.publish()
    world.device.notify(spec.REQUEST_QUEUE)

    assert world.requests.collect() == [(head, 4)]
    assert world.iommu.endpoints[ENDPOINT].attached


@pytest.mark.parametrize("address", [0x7FFFF000, (1 << 64) - 0x1000])
def test_a_buffer_outside_memory_comes_back_empty(world: World, address: int) -> None:
    head = world.requests.add([(address, 28)], [(0x30000, 4)])
    world.requests.publish()
    world.device.notify(spec.REQUEST_QUEUE)

    assert world.requests.collect() == [(head, 0)]
    assert world.bus.broken == []


def test_an_unmap_of_held_memory_waits_and_those_behind_it_wait_too(world: World) -> None:
    world.map_page()
    world.hold()
    world.submit(UNMAP)
    world.submit(UNKNOWN_DOMAIN)
    world.device.notify(spec.REQUEST_QUEUE)
    world.submit(UNKNOWN_DOMAIN)
    world.device.notify(spec.REQUEST_QUEUE)
    world.loop.turn(0)

    assert world.statuses() == []
    assert world.device.waiting == 1
    world.mapper.release(0, 8)
    world.loop.turn(0)
    assert world.statuses() == [Status.OK, Status.NOENT, Status.NOENT]
    assert world.device.waiting == 0
    assert world.device.parked_total == 1


def test_a_parked_request_whose_bus_is_off_is_answered_when_it_is_on_again(world: World) -> None:
    world.map_page()
    world.hold()
    world.submit(UNMAP)
    world.device.notify(spec.REQUEST_QUEUE)
    world.bus.active = False
    world.mapper.release(0, 8)
    world.loop.turn(0)
    assert world.statuses() == []

    world.bus.active = True
    world.device.notify(spec.REQUEST_QUEUE)
    assert world.statuses() == [Status.OK]


@pytest.mark.parametrize("kind", ResetKind)
def test_a_reset_waits_for_what_is_held(world: World, kind: ResetKind) -> None:
    world.map_page()
    world.hold()

    assert not world.device.reset(kind)
    assert world.session is not None
    assert world.session.is_set()
    world.loop.turn(0)
    assert world.bus.resets_done == 0
    world.mapper.release(0, 8)
    world.loop.turn(0)
    assert world.bus.resets_done == 1


def test_a_reset_waits_for_what_a_parked_unmap_waited_for(world: World) -> None:
    world.map_page()
    world.hold()
    world.submit(UNMAP)
    world.device.notify(spec.REQUEST_QUEUE)

    assert not world.device.reset(ResetKind.DRIVER)
    assert not world.device.reset(ResetKind.SYSTEM)
    world.mapper.release(0, 8)
    world.loop.turn(0)
    assert world.bus.resets_done == 1
    world.start()
    assert world.ask(UNKNOWN_DOMAIN) == Status.NOENT


def test_a_reset_of_a_device_that_was_never_started_waits_too(world: World) -> None:
    world.device.reset(ResetKind.DRIVER)
    idle = VirtioIommuDevice(world.iommu, world.loop)
    idle.plug(world.bus)
    idle.write_config(36, b"\1")
    world.hold()

    assert not idle.reset(ResetKind.SYSTEM)
    world.mapper.release(0, 8)
    world.loop.turn(0)
    assert world.bus.resets_done == 1


def test_a_request_after_a_change_of_bypass_waits_for_what_it_revoked(world: World) -> None:
    """Else the reply to an ATTACH would say that memory is free which is still in use."""
    world.device.write_config(36, b"\1")
    world.hold()
    world.device.write_config(36, b"\0")
    world.submit(spec.ATTACH.pack(RequestType.ATTACH, 1, ENDPOINT, 0, 0))
    world.device.notify(spec.REQUEST_QUEUE)
    assert world.device.waiting == 1
    assert world.statuses() == []

    world.mapper.release(0, 8)
    world.loop.turn(0)
    assert world.device.waiting == 0
    assert world.statuses() == [Status.OK]


def test_a_change_of_bypass_does_not_answer_what_is_parked(world: World) -> None:
    world.map_page()
    world.hold()
    world.submit(UNMAP)
    world.device.notify(spec.REQUEST_QUEUE)
    other = BasicMemoryMapper()
    world.iommu.add_endpoint(ENDPOINT + 1, other)
    world.device.write_config(36, b"\1")
    with other.start_export_session():
        other.export(0, 8)
        world.device.write_config(36, b"\0")
        assert world.device.waiting == 2
        world.mapper.release(0, 8)
        world.loop.turn(0)
        assert world.statuses() == []
        other.release(0, 8)
    world.loop.turn(0)

    assert world.statuses() == [Status.OK]


def test_nothing_is_written_for_a_parked_request_while_the_bus_is_off(world: World) -> None:
    world.map_page()
    world.hold()
    head = world.submit(UNMAP)
    world.device.notify(spec.REQUEST_QUEUE)
    world.bus.active = False
    world.mapper.release(0, 8)
    world.loop.turn(0)

    assert world.memory.read(world.replies[head], 4) == b"\xee" * 4


def test_a_reset_of_an_idle_device_is_done_at_once(world: World) -> None:
    world.map_page()

    assert world.device.reset(ResetKind.DRIVER)
    assert world.iommu.domains == {}
    assert world.device.reset(ResetKind.DRIVER)


def test_faults_are_reported_into_buffers_that_came_without_a_kick(world: World) -> None:
    world.offer_event_buffers(2)
    world.stray()
    assert world.faults() == []

    world.ask(UNKNOWN_DOMAIN)
    assert world.faults() == [REPORT]
    world.stray()
    assert world.faults() == [REPORT]
    assert world.bus.interrupts.count(spec.EVENT_QUEUE) == 2


def test_faults_wait_for_buffers(world: World) -> None:
    world.ask(UNKNOWN_DOMAIN)
    world.stray()
    world.offer_event_buffers(1)
    world.device.notify(spec.EVENT_QUEUE)

    assert world.faults() == [REPORT]


def test_a_buffer_too_small_for_a_report_comes_back_empty(world: World) -> None:
    world.ask(UNKNOWN_DOMAIN)
    world.offer_event_buffers(1, spec.FAULT.size - 1)
    world.offer_event_buffers(1)
    world.stray()

    assert [used.length for used in world.events.collect()] == [0, spec.FAULT.size]


def test_an_event_buffer_outside_memory_comes_back_empty(world: World) -> None:
    world.ask(UNKNOWN_DOMAIN)
    head = world.events.add([], [(0x7FFFF000, 24)])
    world.events.publish()
    world.stray()

    assert world.events.collect() == [(head, 0)]
    assert world.bus.broken == []


def test_a_broken_event_queue_breaks_the_device(world: World) -> None:
    world.ask(UNKNOWN_DOMAIN)
    world.events.write_avail(SIZE + 1)
    world.stray()

    assert len(world.bus.broken) == 1
    assert str(SIZE + 1) in world.bus.broken[0]


def test_a_broken_request_queue_breaks_the_device(world: World) -> None:
    world.requests.write_avail(SIZE + 1)
    world.device.notify(spec.REQUEST_QUEUE)

    assert len(world.bus.broken) == 1


def test_a_device_without_queues_does_nothing(world: World) -> None:
    world.device.reset(ResetKind.DRIVER)
    world.device.start(world.bus, 0, [None, None])

    world.device.notify(spec.REQUEST_QUEUE)
    world.device.notify(spec.EVENT_QUEUE)
    world.stray()
    assert world.bus.broken == []


def test_a_kick_for_nothing_is_noticed(world: World) -> None:
    world.ask(UNKNOWN_DOMAIN)
    assert world.idle_kicks == []
    world.device.notify(spec.REQUEST_QUEUE)
    assert world.idle_kicks == [world.requests.layout.avail]


def test_the_configuration_is_the_devices(world: World) -> None:
    assert world.device.read_config(32, 8) == world.iommu.config_bytes()[32:]
    world.device.write_config(36, b"\1")
    assert world.device.read_config(36, 1) == b"\1"


# -- mappers that answer later --


def test_a_map_is_answered_when_the_host_has_and_what_is_behind_it_waits(
    later: LaterWorld,
) -> None:
    later.ask(spec.ATTACH.pack(RequestType.ATTACH, 1, LATER, 0, 0))
    later.submit(MAP)
    later.kick(UNKNOWN_DOMAIN)
    later.loop.turn(0)
    assert later.statuses() == []
    assert later.device.waiting == 1

    later.answer()
    assert later.statuses() == [Status.OK, Status.NOENT]
    assert later.device.waiting == 0


def test_a_map_that_is_refused_is_undone_before_it_is_answered(later: LaterWorld) -> None:
    later.map_page()
    other = LaterMapper()
    later.iommu.add_endpoint(LATER + 1, other)
    later.kick(spec.ATTACH.pack(RequestType.ATTACH, 1, LATER + 1, 0, 0))
    other.answer()
    later.loop.turn(0)
    assert later.statuses() == [Status.OK]
    later.kick(spec.MAP.pack(RequestType.MAP, 1, PAGE, 2 * PAGE - 1, 0x9000, 3))
    later.answer(errno.ENOSPC)
    assert later.statuses() == []  # what the other has accepted goes there first

    other.answer()
    later.loop.turn(0)
    assert later.statuses() == []
    assert later.iommu.mappings == 1
    other.answer()
    later.loop.turn(0)
    assert later.statuses() == [Status.NOMEM]
    assert later.device.parked_total == 3


def test_a_refusal_while_the_bus_is_off_is_undone_at_once_and_answered_later(
    later: LaterWorld,
) -> None:
    later.ask(spec.ATTACH.pack(RequestType.ATTACH, 1, LATER, 0, 0))
    later.kick(MAP)
    later.bus.active = False
    later.answer(errno.EIO)
    assert later.iommu.mappings == 0
    assert later.statuses() == []

    later.bus.active = True
    later.device.notify(spec.REQUEST_QUEUE)
    assert later.statuses() == [Status.DEVERR]
    assert later.iommu.refused == 1


@pytest.mark.parametrize("kind", ResetKind)
def test_a_reset_waits_for_a_host_and_for_what_it_makes_of_bypass(
    later: LaterWorld, kind: ResetKind
) -> None:
    later.map_page()
    later.device.write_config(36, b"\1")
    later.kick(UNMAP)

    assert not later.device.reset(kind)
    later.host.answer()
    later.loop.turn(0)
    assert later.bus.resets_done == 0
    if later.iommu.bypass:  # it survives the smaller resets
        later.host.answer(0, errno.EIO)
        later.answer()
        assert later.bus.resets_done == 0  # the rest of bypass is taken back
    later.answer()
    assert later.bus.resets_done == 1
    assert later.host.host == {}
    later.start()
    later.map_page()


def test_what_a_driver_finds_in_bypass_is_heard_before_its_first_request() -> None:
    world = LaterWorld()
    world.device.reset(ResetKind.DRIVER)
    world.device.write_config(36, b"\1")
    world.iommu.add_endpoint(LATER + 1, late := LaterMapper())
    world.answer()
    world.start()
    world.kick(UNKNOWN_DOMAIN)
    assert world.statuses() == []
    late.answer()
    late.answer()
    world.loop.turn(0)

    assert world.statuses() == [Status.NOENT]
    world.loop.close()


def test_a_device_that_is_closed_waits_for_nothing(later: LaterWorld) -> None:
    later.ask(spec.ATTACH.pack(RequestType.ATTACH, 1, LATER, 0, 0))
    later.kick(MAP)

    later.device.close()
    assert later.device.waiting == 0
