"""Devices that do what they must not, seen by the guest: an IOMMU in front of real sockets.

With ``memory=message`` a device gets what is mapped, with the protection it is mapped
with, and nothing else, and the guest is told of every attempt.
"""

from __future__ import annotations

import errno
import os
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.backends.vfio_user.rig import PAGE, Rig, Scripted
from tests.conformance.rig import attach, detach, map_, unmap
from tests.vfio_user.raw_device import reply_to
from viommu.device import Parked, VirtioIommu
from viommu.domain import DomainKind
from viommu.endpoints.dma import EndpointDma
from viommu.errors import Access
from viommu.spec import vfio_user as spec
from viommu.spec import virtio_iommu
from viommu.spec.vfio_user import Command
from viommu.spec.virtio_iommu import FaultReason, Status
from viommu.vfio_user import LoopClient
from viommu.vfio_user.protocol import Capabilities, encode_version
from viommu_backends.vfio_user.mapper import VfioUserMapper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.errors import PeerError
    from viommu.mapper import MappingInfo

ENDPOINT = 0x38
R, W = virtio_iommu.MAP_F_READ, virtio_iommu.MAP_F_WRITE
PAGES = 24  # IOVAs that are looked at
SIZE = 64 * PAGE


class Hostile(Scripted):
    """Asks for memory, too."""

    id = 0

    def dma(self, command: Command, address: int, size: int, data: bytes = b"") -> bytes | int:
        """Ask; return what comes back, or an errno."""
        self.id = (self.id + 1) % 0x10000
        payload = spec.DMA_ACCESS.pack(address, size) + data
        total = spec.HEADER_SIZE + len(payload)
        self._send(spec.HEADER.pack(self.id, command, total, 0, 0) + payload)
        reply = self.take()
        assert (reply.id, reply.command, reply.kind) == (self.id, command, spec.F_TYPE_REPLY)
        assert not reply.fds
        return reply.error or reply.payload[spec.DMA_ACCESS.size :]

    def read(self, address: int, size: int) -> bytes | int:
        return self.dma(Command.DMA_READ, address, size)

    def write(self, address: int, data: bytes) -> bytes | int:
        return self.dma(Command.DMA_WRITE, address, len(data), data)


class World:
    """An IOMMU, its guest's memory (see Rig), and a device behind it that answers as told."""

    def __init__(self) -> None:
        self.rig = Rig("message")
        self.iommu = VirtioIommu()
        self.mapper = self.rig.mapper
        self.iommu.add_endpoint(ENDPOINT, self.mapper, reserved=())
        report = partial(self.iommu.report_fault, ENDPOINT)
        self.dma = EndpointDma(self.mapper, self.rig.memory, report, self.rig.loop)
        self.dma.enabled = True
        self.ram = bytes(os.urandom(SIZE))
        os.pwrite(self.rig.ram, self.ram, 0)
        self.device = self.connect(self.mapper, self.dma)

    def connect(self, mapper: VfioUserMapper, dma: EndpointDma | None = None) -> Hostile:
        ours, sock = socket.socketpair()
        device = Hostile(self.rig.loop, sock)
        self.rig.closers.append(device.close)

        def closed(why: PeerError) -> None:
            mapper.lost(why)

        client = LoopClient(self.rig.loop, ours, memory=dma, on_closed=closed)
        self.rig.closers.append(client.close)
        device.answer(device.take(), encode_version(1, Capabilities(8)))
        mapper.connected(client)
        return device

    def ask(self, request: bytes) -> int:
        """Have a request answered, and the device agree to everything."""
        answer = self.iommu.handle(request, virtio_iommu.TAIL_SIZE)
        while isinstance(answer, Parked):
            self.device.answer_all()
            answer = conclude(answer)
        self.iommu._check()
        return answer[0]

    def parked(self, request: bytes) -> Parked:
        answer = self.iommu.handle(request, virtio_iommu.TAIL_SIZE)
        assert isinstance(answer, Parked)
        return answer

    def map(self, page: int, gpa_page: int, count: int = 1, flags: int = R | W) -> None:
        request = map_(1, page * PAGE, (page + count) * PAGE - 1, gpa_page * PAGE, flags=flags)
        assert self.ask(request) == Status.OK

    def faults(self) -> list[tuple[int, int, int]]:
        """The reports of the event queue: reason, flags, address."""
        found = []
        while (report := self.iommu.take_fault()) is not None:
            reason, flags, endpoint, address = virtio_iommu.FAULT.unpack(report)
            assert endpoint == ENDPOINT
            found.append((reason, flags & ~virtio_iommu.FAULT_F_ADDRESS, address))
        return found

    def contents(self) -> bytes:
        return os.pread(self.rig.ram, SIZE, 0)

    def close(self) -> None:
        self.dma.close()
        self.rig.close()


def conclude(parked: Parked) -> bytes | Parked:
    for event in parked.events:
        assert event.is_set()
        event.close()
    return parked.conclude()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def mapped(world: World) -> World:
    """Pages 2 to 8 and 12 are mapped, with every protection; 7 leads to ROM, 8 to nothing."""
    assert world.ask(attach(1, ENDPOINT)) == Status.OK
    world.map(2, 0, 2)
    world.map(4, 5, flags=R)
    world.map(5, 6, flags=W)
    world.map(6, 7, flags=0)
    world.map(7, 8)
    world.map(8, 20)
    world.map(12, 40)
    return world


# What may be done with each page, and which page of guest memory it is.
READABLE = {2: 0, 3: 1, 4: 5, 7: 8, 12: 40}
WRITABLE = {2: 0, 3: 1, 5: 6, 12: 40}
# Mapped, but no memory is there, or none that can be written: no fault of translation.
NO_MEMORY = {(8, W), (7, W), (8, R)}


@pytest.mark.parametrize(("offset", "size"), [(0, PAGE), (0, 1), (PAGE - 1, 1), (8, 100)])
def test_every_read_gets_what_is_mapped_readable_and_nothing_else(
    mapped: World, offset: int, size: int
) -> None:
    for page in range(PAGES):
        found = mapped.device.read(page * PAGE + offset, size)
        if page in READABLE:
            at = READABLE[page] * PAGE + offset
            assert found == mapped.ram[at : at + size]
            assert mapped.faults() == []
        else:
            assert found == errno.ENODEV
            told = (FaultReason.MAPPING, virtio_iommu.FAULT_F_READ, page * PAGE + offset)
            assert mapped.faults() == ([] if (page, R) in NO_MEMORY else [told])
    assert mapped.contents() == mapped.ram


@pytest.mark.parametrize(("offset", "size"), [(0, PAGE), (0, 1), (PAGE - 1, 1), (8, 100)])
def test_every_write_lands_where_it_is_mapped_writable_and_nowhere_else(
    mapped: World, offset: int, size: int
) -> None:
    expected = bytearray(mapped.ram)
    for page in range(PAGES):
        data = bytes([page]) * size
        found = mapped.device.write(page * PAGE + offset, data)
        if page in WRITABLE:
            at = WRITABLE[page] * PAGE + offset
            expected[at : at + size] = data
            assert found == b""
            assert mapped.faults() == []
        else:
            assert found == errno.ENODEV
            told = (FaultReason.MAPPING, virtio_iommu.FAULT_F_WRITE, page * PAGE + offset)
            assert mapped.faults() == ([] if (page, W) in NO_MEMORY else [told])
    assert mapped.contents() == expected


@pytest.mark.parametrize(
    ("first", "size", "fault"),
    [
        (2, 2 * PAGE, None),
        (2, 3 * PAGE, None),
        (2, 4 * PAGE, 5),  # page 5 can't be read
        (0, 3 * PAGE, 0),
        (4, 2 * PAGE, 5),
        (12, 2 * PAGE, 13),
    ],
)
def test_a_read_over_several_pages_is_all_or_nothing(
    mapped: World, first: int, size: int, fault: int | None
) -> None:
    found = mapped.device.read(first * PAGE, size)
    if fault is None:
        pages = range(first, first + size // PAGE)
        expected = [mapped.ram[READABLE[page] * PAGE :][:PAGE] for page in pages]
        assert found == b"".join(expected)
        assert mapped.faults() == []
    else:
        assert found == errno.ENODEV
        assert [address for _, _, address in mapped.faults()] == [fault * PAGE]


@pytest.mark.parametrize(
    ("address", "size", "answer"),
    [
        ((1 << 64) - 1, 1, errno.ENODEV),
        ((1 << 64) - 1, 2, errno.ENODEV),
        ((1 << 64) - PAGE, 1 << 20, errno.ENODEV),
        (2 * PAGE, 1 << 21, errno.E2BIG),
        (2 * PAGE, (1 << 64) - 1, errno.E2BIG),
        (2 * PAGE, 0, b""),
        (1 * PAGE, 0, b""),
    ],
)
def test_strange_reads_are_answered(
    mapped: World, address: int, size: int, answer: bytes | int
) -> None:
    assert mapped.device.read(address, size) == answer
    mapped.faults()
    assert mapped.device.read(2 * PAGE, 8) == mapped.ram[:8]


def test_what_is_unmapped_is_out_of_reach_at_once(mapped: World) -> None:
    """However long the device takes to say that it has let go."""
    parked = mapped.parked(unmap(1, 2 * PAGE, 4 * PAGE - 1))
    assert mapped.device.read(2 * PAGE, 8) == errno.ENODEV
    assert len(mapped.faults()) == 1
    mapped.device.answer_all()
    assert conclude(parked) == bytes(4)


def test_an_endpoint_that_is_not_attached_reaches_nothing(world: World) -> None:
    assert world.ask(detach(1, ENDPOINT)) == Status.INVAL
    assert world.device.read(0, 8) == errno.ENODEV
    assert world.faults() == [(FaultReason.DOMAIN, virtio_iommu.FAULT_F_READ, 0)]


def test_a_device_whose_guest_has_not_allowed_dma_reaches_nothing(mapped: World) -> None:
    mapped.dma.enabled = False
    assert mapped.device.read(2 * PAGE, 8) == errno.ENODEV
    assert mapped.faults() == []  # such an access never leaves a device


def test_bypass_is_memory_and_nothing_else(world: World) -> None:
    world.iommu.write_config(36, b"\1")
    world.device.answer_all()
    assert world.device.read(33 * PAGE, 8) == world.ram[33 * PAGE :][:8]
    assert world.device.read(20 * PAGE, 8) == errno.ENODEV
    assert world.device.write(9 * PAGE, b"ROM") == errno.ENODEV
    assert world.contents() == world.ram


def test_the_device_is_told_of_what_it_can_have(mapped: World) -> None:
    """And of nothing else: that is what a device that needs to know is told."""
    mapper = mapped.mapper
    assert {(e.iova // PAGE, e.size // PAGE, e.prot) for e in mapper.entries()} == {
        (2, 2, Access.READ | Access.WRITE),
        (4, 1, Access.READ),
        (5, 1, Access.WRITE),
        (7, 1, Access.READ),
        (12, 1, Access.READ | Access.WRITE),
    }


# -- what the guest sees of devices that do not do what they are asked --


class Three(World):
    """Three devices in domain 1."""

    def __init__(self) -> None:
        super().__init__()
        self.devices = [self.device]
        self.mappers = [self.mapper]
        for number in (1, 2):
            mapper = VfioUserMapper(self.rig.loop, memory="message")
            registration = self.rig.manager.register(mapper, f"{number}", mapper.needs)
            self.rig.closers += [mapper.close, registration.release]
            self.iommu.add_endpoint(ENDPOINT + number, mapper, reserved=())
            self.mappers.append(mapper)
            self.devices.append(self.connect(mapper))
        for number in range(3):
            assert self.ask(attach(1, ENDPOINT + number)) == Status.OK
        self.map(2, 0)

    def ask(self, request: bytes) -> int:
        answer = self.iommu.handle(request, virtio_iommu.TAIL_SIZE)
        while isinstance(answer, Parked):
            for device in getattr(self, "devices", [self.device]):
                device.answer_all()
            answer = conclude(answer)
        return answer[0]

    def held(self) -> list[list[MappingInfo]]:
        self.iommu._check()
        for mapper in self.mappers:
            mapper._check()
        return [mapper.entries() for mapper in self.mappers]


@pytest.fixture
def three() -> Iterator[Three]:
    three = Three()
    yield three
    three.close()


MAP = map_(1, 4 * PAGE, 5 * PAGE - 1, PAGE)


def test_a_map_that_the_third_device_refuses_is_in_none_of_them(three: Three) -> None:
    before = three.held()
    parked = three.parked(MAP)
    three.devices[0].answer_all()
    three.devices[1].answer_all()
    three.devices[2].refuse(three.devices[2].asked()[0], errno.ENOMEM)
    undoing = conclude(parked)

    assert isinstance(undoing, Parked)
    assert len(undoing.events) == 2
    assert three.held() == before
    assert three.devices[0].answer_all() == three.devices[1].answer_all() == [("unmap", 4, 1)]
    assert three.devices[2].answer_all() == []
    answer = conclude(undoing)
    assert isinstance(answer, bytes)
    assert answer[0] == Status.NOMEM
    assert three.ask(MAP) == Status.OK


def test_a_device_that_dies_in_the_middle_takes_nobody_with_it(three: Three) -> None:
    parked = three.parked(MAP)
    three.devices[1].close()
    three.devices[0].answer_all()
    three.devices[2].answer_all()
    three.rig.turn()

    assert conclude(parked) == bytes(4)
    assert three.ask(unmap(1, 0, (1 << 48) - 1)) == Status.OK
    assert three.held() == [[], [], []]


def test_a_device_that_dies_while_a_refusal_is_undone_takes_nobody_with_it(three: Three) -> None:
    before = three.held()
    parked = three.parked(MAP)
    three.devices[0].answer_all()
    three.devices[1].answer_all()
    three.devices[2].refuse(three.devices[2].asked()[0])
    undoing = conclude(parked)
    assert isinstance(undoing, Parked)
    three.devices[0].close()
    three.devices[1].answer_all()
    three.rig.turn()

    answer = conclude(undoing)
    assert isinstance(answer, bytes)
    assert answer[0] == Status.DEVERR
    assert three.held() == before


def test_a_device_that_does_not_let_go_is_out_and_the_unmap_succeeds(three: Three) -> None:
    parked = three.parked(unmap(1, 2 * PAGE, 3 * PAGE - 1))
    three.devices[0].refuse(three.devices[0].asked()[0])
    for device in three.devices[1:]:
        device.answer_all()

    assert conclude(parked) == bytes(4)
    assert three.devices[0].gone()
    assert three.held() == [[], [], []]


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        (b"", None),  # as some do
        (b"x" * 200, None),
        (b"", 8),
        (b"", 1 << 30),
    ],
)
def test_a_device_that_lies_about_sizes_harms_itself_only(
    three: Three, payload: bytes, size: int | None
) -> None:
    parked = three.parked(unmap(1, 2 * PAGE, 3 * PAGE - 1))
    liar = three.devices[0]
    (asked,) = liar.asked()
    liar._send(reply_to(asked.message, payload, size=size))
    for device in three.devices[1:]:
        device.answer_all()

    assert conclude(parked) == bytes(4)
    assert liar.gone() is (bool(payload) or size is not None)
    assert three.held() == [[], [], []]


def test_an_attach_that_a_device_refuses_half_way_leaves_it_blocked(world: World) -> None:
    other = VfioUserMapper(world.rig.loop, memory="message")
    world.iommu.add_endpoint(ENDPOINT + 1, other, reserved=())
    assert world.ask(attach(1, ENDPOINT + 1)) == Status.OK
    for page in range(5):
        world.map(2 * page, page)
    parked = world.parked(attach(1, ENDPOINT))
    asked = world.device.asked()
    assert len(asked) == 5
    for number, each in enumerate(asked):
        if number == 3:
            world.device.refuse(each, errno.ENOSPC)
        else:
            world.device.answer(each)
    undoing = conclude(parked)
    assert isinstance(undoing, Parked)
    assert len(world.device.answer_all()) == 4
    answer = conclude(undoing)

    assert isinstance(answer, bytes)
    assert answer[0] == Status.NOMEM
    assert world.iommu.endpoints[ENDPOINT].kind is DomainKind.BLOCKED
    assert world.mapper.mappings() == world.mapper.entries() == []
    assert world.ask(attach(1, ENDPOINT)) == Status.OK
    assert len(world.mapper.entries()) == 5
    other.close()
