from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import Access, TranslationFault
from viommu.spec import virtio_ring as spec
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout, Used
from viommu.virtio.orphaned_queue import OrphanedQueue
from viommu.virtio.ring import SplitQueue

SIZE: Final = 16
RAM: Final = 1 << 16
RINGS: Final = 0x1000
DATA: Final = 0x8000
STATUS: Final = 0xE000
IOERR: Final = 1
UNWRITTEN: Final = 0xEE


class Disk:
    """A queue whose device is there until :meth:`die`."""

    def __init__(self, *, event_idx: bool = True, memory: PieceMemory | None = None) -> None:
        self.memory = memory or PieceMemory(RAM)
        self.event_idx = event_idx
        self.layout = RingLayout.at(RINGS, SIZE)
        self.driver = DriverQueue(self.memory, SIZE, self.layout, event_idx=event_idx)
        self.device = self.queue()
        self.requests = 0

    def queue(self) -> SplitQueue:
        return SplitQueue(
            self.memory,
            0,
            SIZE,
            self.layout.desc,
            self.layout.avail,
            self.layout.used,
            event_idx=self.event_idx,
            indirect=True,
        )

    def request(self, *, size: int = 512) -> tuple[int, int]:
        """Offer a read; return its head and where its status will be."""
        status = STATUS + self.requests
        self.requests += 1
        self.memory.write(status, bytes([UNWRITTEN]))
        buffers = [(DATA + 0x100, size)] if size else []
        head = self.driver.add([(DATA, 16)], [*buffers, (status, 1)])
        self.driver.publish()
        return head, status

    def die(self) -> OrphanedQueue:
        self.device.close()
        return OrphanedQueue(self.queue(), self.memory)

    def status(self, at: int) -> int:
        return self.memory.read(at, 1)[0]


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_is_in_flight_ends_with_an_error(event_idx: bool) -> None:
    disk = Disk(event_idx=event_idx)
    offered = [disk.request(size=512 * number) for number in range(4)]
    first, second = disk.device.pop(), disk.device.pop()
    assert first
    assert second
    disk.memory.write(offered[1][1], b"\0")
    disk.device.push(second, 513)
    disk.device.publish()
    disk.driver.collect()
    disk.driver.enable_interrupts()

    orphan = disk.die()

    assert orphan.serve(64) == (False, True)
    used = disk.driver.collect()
    assert sorted(used) == [
        Used(offered[0][0], 1),
        Used(offered[2][0], 0),
        Used(offered[3][0], 0),
    ]
    assert [disk.status(at) for _, at in offered] == [IOERR, 0, IOERR, IOERR]
    assert orphan.ended == 3


def test_what_comes_later_does_too() -> None:
    disk = Disk()
    orphan = disk.die()
    orphan.serve(64)

    for _ in range(3 * SIZE):
        disk.driver.enable_interrupts()
        _, status = disk.request()
        assert orphan.serve(64) == (False, True)
        assert disk.status(status) == IOERR
        assert len(disk.driver.collect()) == 1


def test_an_interrupt_that_the_device_owed_is_raised() -> None:
    disk = Disk()
    disk.request()
    chain = disk.device.pop()
    assert chain
    disk.device.push(chain, 513)
    assert disk.device.publish()

    orphan = disk.die()

    assert orphan.serve(64) == (False, True)
    assert orphan.serve(64) == (False, False)


@pytest.mark.parametrize("event_idx", [False, True])
def test_the_driver_is_asked_for_kicks(event_idx: bool) -> None:
    disk = Disk(event_idx=event_idx)
    disk.device.disable_notifications()

    orphan = disk.die()
    orphan.serve(64)

    disk.driver.add([(DATA, 16)], [(STATUS, 1)])
    assert disk.driver.publish()


def test_no_more_than_the_budget_in_one_go() -> None:
    disk = Disk()
    for _ in range(5):
        disk.request()
    orphan = disk.die()

    assert orphan.serve(2) == (True, True)
    assert len(disk.driver.collect()) == 2
    assert orphan.serve(2)[0]
    assert not orphan.serve(2)[0]
    assert len(disk.driver.collect()) == 3


def test_without_a_status_nothing_ends() -> None:
    memory = PieceMemory(RAM, read_only=(STATUS, STATUS + 1))
    disk = Disk(memory=memory)
    disk.memory.read_only = (0, 0)
    disk.request()
    head, status = disk.request()
    disk.driver.write_desc(9, DATA, 16)
    disk.driver.write_avail(9)
    disk.memory.read_only = (STATUS, STATUS + 1)

    orphan = disk.die()

    assert orphan.serve(64) == (False, True)
    idx = int.from_bytes(disk.memory.read(disk.layout.used + 2, 2), "little")
    assert idx == 1
    element = disk.memory.read(disk.layout.used + spec.RING_OFFSET, 8)
    assert spec.USED_ELEM.unpack(element)[0] == head
    assert disk.status(status) == IOERR
    assert not orphan.broken


def test_a_chain_that_was_written_over_keeps_nothing_up() -> None:
    disk = Disk()
    head, _ = disk.request()
    _, status = disk.request()
    disk.driver.write_desc(head, DATA, 16, spec.DESC_F_NEXT, head)

    orphan = disk.die()
    orphan.serve(64)

    assert disk.status(status) == IOERR
    assert orphan.ended == 1


def test_rings_that_the_driver_breaks_are_given_up() -> None:
    disk = Disk()
    orphan = disk.die()
    disk.driver.write_avail(idx=SIZE + 1)

    assert orphan.serve(64) == (False, False)
    assert orphan.broken
    assert orphan.serve(64) == (False, False)


def test_rings_that_are_broken_later_are_given_up() -> None:
    disk = Disk()
    disk.request()
    orphan = disk.die()
    orphan.serve(64)

    disk.driver.write_avail(SIZE)

    assert orphan.serve(64) == (False, False)
    assert orphan.broken


class Vanishing(PieceMemory):
    """Memory that is unmapped after a number of accesses."""

    left = 1 << 30

    def views(self, address: int, size: int, *, write: bool) -> list[memoryview]:
        self.left -= 1
        if self.left < 0:
            raise TranslationFault(address, Access.WRITE if write else Access.READ)
        return super().views(address, size, write=write)


@given(st.integers(0, 12))
def test_memory_that_vanishes_meanwhile(left: int) -> None:
    memory = Vanishing(RAM)
    disk = Disk(memory=memory)
    for _ in range(3):
        disk.request()
    orphan = disk.die()

    memory.left = left
    more, _ = orphan.serve(64)
    memory.left = 1 << 30

    assert not more
    assert len(disk.driver.collect()) == orphan.ended


@given(st.binary(min_size=0x400, max_size=0x400), st.binary(min_size=0x100, max_size=0x100))
def test_whatever_a_guest_leaves_there(rings: bytes, later: bytes) -> None:
    disk = Disk()
    disk.memory.write(RINGS, rings)
    orphan = disk.die()

    for _ in range(4):
        orphan.serve(64)
    disk.memory.write(RINGS + 0x100, later)
    for _ in range(4):
        orphan.serve(64)
