"""A driver whose disk has died: what it reads, and what becomes of its requests."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.endpoints.rig import PAGE, Rig, make_rig
from tests.virtio.harness import EchoDevice
from viommu.endpoints.blk import BlkDevice
from viommu.memory import GuestMemory
from viommu.spec import pci, vfio, virtio_config
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.testing.ring import DriverQueue, RingLayout
from viommu.vfio_user import IrqLines
from viommu.virtio.orphaned_queue import OrphanedQueue
from viommu.virtio.pci import VirtioPciFunction
from viommu.virtio.undertaker import Undertaker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
MSIX, INTX = vfio.PCI_MSIX_IRQ_INDEX, vfio.PCI_INTX_IRQ_INDEX
LAYOUT: Any = spec.CommonCfg
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
RUNNING: Final = 15
NEEDS_RESET: Final = virtio_config.STATUS_DEVICE_NEEDS_RESET
FEATURES: Final = (
    1 << Feature.VERSION_1
    | 1 << Feature.ACCESS_PLATFORM
    | 1 << Feature.RING_EVENT_IDX
    | 1 << Feature.RING_INDIRECT_DESC
)
SIZE: Final = 16
RINGS, HEADER, BUFFER, STATUS = 0x10000, 0x20000, 0x21000, 0x22000
IOVA: Final = 0x7000_0000
IOERR: Final = 1


class Guest:
    """A driver, its disk, and an undertaker between them that sees every access."""

    def __init__(self, rig: Rig, function: VirtioPciFunction) -> None:
        self.rig = rig
        self.function: VirtioPciFunction | None = function
        self.stuck = False  # the device takes no kick any more
        self.eventfds: dict[tuple[int, int], int] = {}
        self.lines = IrqLines([function.irq_info(index).count or 1 for index in range(3)])
        self.undertaker = Undertaker("disk", rig.dma, rig.loop)
        self.undertaker.follow(function.region_read(CONFIG, 0, 256))
        function.connect(self.lines)
        rig.map(IOVA, 0, 0x80000)
        self.set_master(enabled=True)
        self.driver: DriverQueue | None = None
        self.tickets = 0

    # The bus.

    def write(self, offset: int, data: bytes, bar: int = 0) -> bool:
        reset = self.undertaker.wrote(bar, offset, data)
        if self.function is not None and not (self.stuck and offset >= NOTIFY):
            self.function.region_write(bar, offset, data)
        return reset

    def read(self, offset: int, size: int, bar: int = 0) -> bytes:
        if self.function is None:
            return self.undertaker.read(bar, offset, size) or b"\xff" * size
        data = self.function.region_read(bar, offset, size)
        self.undertaker.answered(bar, offset, data)
        return data

    def set_master(self, *, enabled: bool) -> None:
        command = pci.COMMAND_MEMORY | (pci.COMMAND_MASTER if enabled else 0)
        if self.function is not None:
            self.function.region_write(CONFIG, pci.COMMAND, command.to_bytes(2, "little"))
        self.rig.dma.enabled = enabled
        self.undertaker.bus_master(enabled=enabled)

    # The driver.

    def set(self, name: str, value: int) -> bool:
        field = getattr(LAYOUT, name)
        return self.write(COMMON + field.offset, value.to_bytes(field.size, "little"))

    def get(self, name: str) -> int:
        field = getattr(LAYOUT, name)
        return int.from_bytes(self.read(COMMON + field.offset, field.size), "little")

    def irq(self, index: int, vector: int) -> None:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.eventfds[index, vector] = os.dup(fd)
        flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
        self.lines.set_irqs(vfio.IRQ_SET.pack(20, flags, index, vector, 1), [fd])

    def raised(self, index: int, vector: int) -> bool:
        try:
            os.eventfd_read(self.eventfds[index, vector])
        except BlockingIOError:
            return False
        return True

    def start(self, *, features: int = FEATURES, msix: bool = True) -> None:
        if msix:
            self.irq(MSIX, 0)
            self.irq(MSIX, 1)
        self.set("device_status", 1)
        self.set("device_status", 3)
        for word in range(2):
            self.set("driver_feature_select", word)
            self.set("driver_feature", features >> 32 * word & 0xFFFFFFFF)
        self.set("device_status", 11)
        self.set("config_msix_vector", 0)
        layout = RingLayout.at(RINGS, SIZE)
        event_idx = bool(features >> Feature.RING_EVENT_IDX & 1)
        self.driver = DriverQueue(self.rig.memory, SIZE, layout, event_idx=event_idx)
        self.set("queue_select", 0)
        self.set("queue_size", SIZE)
        self.set("queue_msix_vector", 1)
        for area in ("desc", "driver", "device"):
            address = IOVA + layout[("desc", "driver", "device").index(area)]
            self.set(f"queue_{area}_lo", address & 0xFFFFFFFF)
            self.set(f"queue_{area}_hi", address >> 32)
        self.set("queue_enable", 1)
        self.set("device_status", RUNNING)

    def request(self, *, kick: bool = True) -> int:
        """Ask for a sector; return the number of the request."""
        assert self.driver is not None
        ticket, self.tickets = self.tickets, self.tickets + 1
        self.rig.memory.write(STATUS + ticket, b"\xee")
        self.rig.memory.write(HEADER, bytes(16))
        self.driver.enable_interrupts()
        self.driver.add([(IOVA + HEADER, 16)], [(IOVA + BUFFER, 512), (IOVA + STATUS + ticket, 1)])
        if self.driver.publish() and kick:
            self.write(NOTIFY, bytes(2))
        return ticket

    def status(self, ticket: int) -> int:
        return self.rig.memory.read(STATUS + ticket, 1)[0]

    def die(self, *, lines: bool = True) -> None:
        assert self.function is not None
        self.function.close()
        self.function = None
        self.rig.dma.drop_views()
        self.undertaker.died(self.lines if lines else None)

    def turn(self, seconds: float = 0) -> None:
        self.rig.advance(seconds)

    def close(self) -> None:
        self.undertaker.close()
        self.lines.close()
        if self.driver is not None:
            self.driver.close()
        if self.function is not None:
            self.function.close()
        for fd in self.eventfds.values():
            os.close(fd)


@contextmanager
def make_guest(image: Path) -> Iterator[Guest]:
    image.write_bytes(bytes(64 << 10))
    with make_rig() as rig:
        disk = BlkDevice(image, rig.dma, rig.loop)
        guest = Guest(rig, VirtioPciFunction("disk", GuestMemory(), disk, rig.dma))
        yield guest
        guest.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with make_guest(tmp_path / "image") as guest:
        yield guest


def test_requests_end_with_an_error_and_interrupts(guest: Guest) -> None:
    guest.start()
    served = guest.request()
    assert guest.status(served) == 0
    guest.stuck = True
    stuck = [guest.request() for _ in range(3)]

    guest.die()

    assert guest.raised(MSIX, 0)
    guest.turn()
    assert guest.raised(MSIX, 1)
    assert [guest.status(ticket) for ticket in stuck] == [IOERR] * 3
    assert guest.undertaker.ended == 3
    assert guest.driver is not None
    assert len(guest.driver.collect()) == 4
    later = guest.request()
    guest.turn()
    assert guest.status(later) == IOERR
    assert guest.raised(MSIX, 1)


def test_a_kick_that_nobody_sees_is_not_lost(guest: Guest) -> None:
    guest.start()
    guest.die()
    guest.turn()

    ticket = guest.request(kick=False)
    guest.turn()
    assert guest.status(ticket) == 0xEE
    guest.turn(0.5)
    guest.turn()

    assert guest.status(ticket) == IOERR


def test_a_driver_without_msix_gets_the_pin(guest: Guest) -> None:
    guest.irq(INTX, 0)
    guest.start(msix=False)
    guest.stuck = True
    guest.request()

    guest.die()

    assert guest.raised(INTX, 0)
    assert guest.read(ISR, 1) == bytes([spec.ISR_CONFIG])
    assert guest.read(ISR, 1) == b"\0"
    guest.turn()
    assert guest.raised(INTX, 0)
    assert guest.read(ISR, 1) == bytes([spec.ISR_QUEUE])


def test_the_status_until_the_driver_resets_the_device(guest: Guest) -> None:
    guest.start()

    guest.die()

    assert guest.get("device_status") == RUNNING | NEEDS_RESET
    assert guest.set("device_status", 0)
    assert guest.get("device_status") not in {0, 0xFF}
    guest.undertaker.stayed_dead()
    assert guest.get("device_status") == 0
    guest.set("device_status", 11)
    assert guest.get("device_status") == 0
    assert guest.set("device_status", 0)  # it may be worth another try
    assert guest.get("device_status") == NEEDS_RESET


def test_a_device_that_dies_while_it_is_set_up(guest: Guest) -> None:
    guest.irq(MSIX, 0)
    guest.set("device_status", 1)
    guest.set("config_msix_vector", 0)

    guest.die()

    assert guest.get("device_status") == 1 | NEEDS_RESET
    assert not guest.raised(MSIX, 0)


def test_a_device_without_a_driver_dies_unseen(guest: Guest) -> None:
    guest.irq(MSIX, 0)
    guest.die()

    assert guest.get("device_status") == 0
    assert not guest.raised(MSIX, 0)


def test_registers_that_linux_waits_for(guest: Guest) -> None:
    guest.start()
    guest.die()

    assert guest.get("queue_reset") == 0
    assert guest.get("queue_enable") == 0
    assert guest.get("config_generation") == 0xFF
    assert guest.get("num_queues") == 0xFFFF
    assert guest.get("queue_msix_vector") == spec.MSI_NO_VECTOR


def test_the_disk_keeps_the_size_that_its_driver_knows(guest: Guest) -> None:
    capacity = guest.read(DEVICE, 8)
    guest.start()

    guest.die()

    assert capacity == (128).to_bytes(8, "little")
    assert guest.read(DEVICE, 8) == capacity
    assert guest.read(DEVICE + 6, 4) == capacity[6:] + b"\xff\xff"
    assert guest.read(DEVICE + 0x100, 4) == b"\xff" * 4


def test_what_is_not_virtio_s_is_left_alone(guest: Guest) -> None:
    guest.die()

    assert guest.undertaker.read(1, 0, 4) is None
    assert guest.undertaker.read(0, 0x5000, 4) is None
    assert guest.undertaker.read(0, NOTIFY, 2) is None


def test_nothing_is_ended_after_a_reset(guest: Guest) -> None:
    guest.start()
    guest.stuck = True
    guest.request()
    guest.die()
    guest.set("device_status", 0)
    guest.undertaker.stayed_dead()

    guest.turn()
    ticket = guest.request()
    guest.turn(5)

    assert guest.status(ticket) == 0xEE
    assert guest.undertaker.ended == 0


def test_a_function_level_reset_ends_it_as_well(guest: Guest) -> None:
    guest.start()
    guest.die()

    guest.undertaker.reset()

    assert guest.get("device_status") == 0
    ticket = guest.request()
    guest.turn(5)
    assert guest.status(ticket) == 0xEE


def test_a_device_that_is_back_answers_itself(guest: Guest) -> None:
    guest.start()
    guest.die()
    guest.set("device_status", 0)
    guest.undertaker.revived()

    guest.undertaker.wrote(0, NOTIFY, bytes(2))
    guest.turn(5)

    assert guest.rig.exports == 0


def test_nothing_is_touched_while_the_bus_is_not_mastered(guest: Guest) -> None:
    guest.start()
    guest.stuck = True
    ticket = guest.request()
    guest.set_master(enabled=False)

    guest.die()
    guest.turn(1)
    assert guest.status(ticket) == 0xEE
    guest.set_master(enabled=True)
    guest.turn()

    assert guest.status(ticket) == IOERR
    assert guest.rig.faults == []


def test_rings_that_are_unmapped_meanwhile(guest: Guest) -> None:
    guest.start()
    guest.stuck = True
    guest.request()
    guest.die()
    guest.turn()
    ticket = guest.request()

    resolution = guest.rig.unmap(IOVA, 0x80000)
    guest.turn(1)
    guest.turn(1)

    assert resolution is not None
    assert resolution.is_set()
    assert guest.rig.exports == 0
    assert guest.status(ticket) == 0xEE
    reported = len(guest.rig.faults)
    guest.turn(1)
    assert len(guest.rig.faults) == reported


def test_packed_rings_are_left_alone(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    guest.start(features=FEATURES | 1 << Feature.RING_PACKED)
    ticket = guest.request()

    guest.die()
    guest.turn(1)

    assert guest.status(ticket) == 0xEE
    assert "packed" in caplog.text
    assert guest.raised(MSIX, 0)


def test_a_queue_that_can_not_be_is_left_alone(guest: Guest) -> None:
    guest.start()
    guest.undertaker.wrote(0, LAYOUT.queue_size.offset, (5).to_bytes(2, "little"))
    guest.die()
    guest.turn(1)

    assert guest.undertaker.ended == 0


def test_many_queues_leave_others_their_turn(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.start()
    for queue in range(1, 5):  # a guest may make any number of them, of 32768 entries each
        guest.set("queue_select", queue)
        guest.set("queue_size", SIZE)
        for name in ("desc", "driver", "device"):
            guest.set(f"queue_{name}_lo", IOVA + 0x30000 + 0x1000 * queue)
        guest.set("queue_enable", 1)
    looked_at: list[OrphanedQueue] = []
    serve = OrphanedQueue.serve

    def note(queue: OrphanedQueue, budget: int) -> tuple[bool, bool]:
        looked_at.append(queue)
        return serve(queue, budget)

    monkeypatch.setattr(OrphanedQueue, "serve", note)
    guest.die()

    for done in range(1, 5):
        guest.turn()
        assert len(looked_at) == done
    guest.set("queue_reset", 1)
    guest.turn()
    guest.turn()
    assert len(looked_at) == 4
    ticket = guest.request()
    for _ in range(5):
        guest.turn()
    assert guest.status(ticket) == IOERR


def test_nobody_has_to_be_there_to_be_told(guest: Guest) -> None:
    guest.start()
    guest.stuck = True
    ticket = guest.request()

    guest.die(lines=False)
    guest.turn()

    assert guest.status(ticket) == IOERR


def test_other_devices_get_no_requests_back() -> None:
    with make_rig() as rig:
        guest = Guest(rig, VirtioPciFunction("echo", GuestMemory(), EchoDevice(), rig.dma))
        guest.start(features=FEATURES & ~(1 << Feature.ACCESS_PLATFORM))
        guest.stuck = True
        ticket = guest.request()

        guest.die()
        guest.turn(5)

        assert guest.raised(MSIX, 0)
        assert guest.get("device_status") == RUNNING | NEEDS_RESET
        assert guest.status(ticket) == 0xEE
        guest.close()


def test_a_device_that_is_not_virtio_has_nothing_left() -> None:
    with make_rig() as rig:
        undertaker = Undertaker("other", rig.dma, rig.loop)
        undertaker.follow(bytes(256))

        assert not undertaker.wrote(0, LAYOUT.device_status.offset, b"\0")
        undertaker.answered(0, 0, b"\0")
        undertaker.died(None)
        assert undertaker.read(0, LAYOUT.device_status.offset, 1) is None
        undertaker.reset()
        undertaker.close()


def test_a_transitional_disk_is_a_disk(guest: Guest) -> None:
    assert guest.function is not None
    config = bytearray(guest.function.region_read(CONFIG, 0, 256))
    config[pci.DEVICE_ID : pci.DEVICE_ID + 2] = (0x1001).to_bytes(2, "little")
    guest.undertaker.follow(bytes(config))
    guest.start()
    guest.stuck = True
    ticket = guest.request()

    guest.die()
    guest.turn()

    assert guest.status(ticket) == IOERR


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 0x3100), st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("read"), st.integers(0, 0x3100), st.integers(1, 16)),
            st.tuples(st.just("ring"), st.integers(0, PAGE), st.binary(max_size=64)),
            st.tuples(st.just("unmap"), st.just(0), st.just(0)),
            st.tuples(st.just("map"), st.just(0), st.just(0)),
            st.tuples(st.just("master"), st.booleans(), st.just(0)),
            st.tuples(st.just("turn"), st.just(0), st.just(0)),
        ),
        max_size=30,
    )
)
def test_whatever_a_guest_does_with_a_dead_disk(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any, Any]]
) -> None:
    with make_guest(tmp_path_factory.mktemp("disk") / "image") as guest:
        guest.start()
        guest.stuck = True
        guest.request()
        guest.die()
        for step, first, second in steps:
            match step:
                case "write":
                    guest.write(first, second)
                case "read":
                    assert len(guest.read(first, second)) == second
                case "ring":
                    guest.rig.memory.write(RINGS + first, second)
                case "unmap":
                    guest.rig.unmap(IOVA, 0x80000)
                case "map":
                    guest.rig.map(IOVA, 0, 0x80000)  # if it isn't there
                case "master":
                    guest.set_master(enabled=first)
                case _:
                    guest.turn(0.5)
        guest.rig.unmap(IOVA, 0x80000)
        guest.turn()
        guest.turn()
        assert guest.rig.exports == 0
