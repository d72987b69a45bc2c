from __future__ import annotations

import struct
from typing import Final

import pytest

from viommu.errors import GuestMemoryError
from viommu.spec import virtio_ring as spec
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout, Used

SIZE: Final = 4


class Raw:
    """A driver's queue, and its bytes as a device would find them."""

    def __init__(self, *, event_idx: bool = False) -> None:
        self.memory = PieceMemory(0x2000)
        self.layout = RingLayout.at(0x100, SIZE)
        self.driver = DriverQueue(self.memory, SIZE, self.layout, event_idx=event_idx)

    def desc(self, index: int) -> tuple[int, ...]:
        return spec.DESC.unpack(self.memory.read(self.layout.desc + 16 * index, 16))

    def avail(self) -> tuple[int, ...]:
        return struct.unpack("<7H", self.memory.read(self.layout.avail, 14))

    def use(self, idx: int, *entries: tuple[int, int], flags: int = 0, event: int = 0) -> None:
        ring = b"".join(spec.USED_ELEM.pack(*entry) for entry in entries).ljust(8 * SIZE, b"\0")
        data = struct.pack("<HH", flags, idx) + ring + struct.pack("<H", event)
        self.memory.write(self.layout.used, data)


@pytest.mark.parametrize(("address", "size"), [(0x100, 4), (0x101, 1), (0xFFF, 256)])
def test_areas_are_aligned_and_do_not_overlap(address: int, size: int) -> None:
    desc, avail, used, end = RingLayout.at(address, size)
    assert address <= desc < address + 16
    assert desc % 16 == avail % 2 == used % 4 == 0
    assert desc + 16 * size <= avail
    assert avail + 6 + 2 * size <= used
    assert used + 6 + 8 * size == end


def test_a_direct_chain_on_the_wire() -> None:
    raw = Raw()
    head = raw.driver.add([(0x1000, 8), (0x1010, 9)], [(0x1020, 4)])
    assert raw.driver.room == SIZE - 3
    first = raw.desc(head)
    second = raw.desc(first[3])
    third = raw.desc(second[3])
    assert first[:3] == (0x1000, 8, spec.DESC_F_NEXT)
    assert second[:3] == (0x1010, 9, spec.DESC_F_NEXT)
    assert third == (0x1020, 4, spec.DESC_F_WRITE, 0)
    assert raw.avail()[1] == 0  # not yet
    raw.driver.publish()
    assert raw.avail()[:3] == (0, 1, head)


def test_an_indirect_chain_on_the_wire() -> None:
    raw = Raw()
    head = raw.driver.add([(0x1000, 8)], [(0x1020, 4)], table=0x1800)
    assert raw.driver.room == SIZE - 1
    assert raw.desc(head) == (0x1800, 32, spec.DESC_F_INDIRECT, 0)
    table = raw.memory.read(0x1800, 32)
    assert spec.DESC.unpack(table[:16]) == (0x1000, 8, spec.DESC_F_NEXT, 1)
    assert spec.DESC.unpack(table[16:]) == (0x1020, 4, spec.DESC_F_WRITE, 0)


def test_used_chains_are_collected_and_their_descriptors_free_again() -> None:
    raw = Raw()
    heads = [raw.driver.add([(0x1000, 1)], [(0x1000, 1)]) for _ in range(2)]
    assert (raw.driver.room, raw.driver.outstanding) == (0, 2)
    raw.use(2, (heads[1], 7), (heads[0], 0))
    assert raw.driver.has_used()
    assert raw.driver.collect() == [Used(heads[1], 7), Used(heads[0], 0)]
    assert (raw.driver.room, raw.driver.outstanding) == (SIZE, 0)
    assert not raw.driver.has_used()
    assert raw.driver.collect() == []


def test_a_chain_that_the_device_does_not_have_is_noticed() -> None:
    raw = Raw()
    raw.use(1, (3, 0))
    with pytest.raises(AssertionError, match="head=3"):
        raw.driver.collect()


def test_the_device_may_say_that_it_wants_no_kick() -> None:
    raw = Raw()
    raw.use(0, flags=spec.USED_F_NO_NOTIFY)
    raw.driver.add([(0, 1)])
    assert not raw.driver.publish()
    raw.use(0)
    raw.driver.add([(0, 1)])
    assert raw.driver.publish()


@pytest.mark.parametrize(("event", "kick"), [(0, True), (1, True), (2, False), (0xFFFF, False)])
def test_the_device_may_say_when_it_wants_a_kick(event: int, kick: bool) -> None:
    raw = Raw(event_idx=True)
    raw.use(0, event=event)
    raw.driver.add([(0, 1)])
    raw.driver.add([(0, 1)])
    assert raw.driver.publish() == kick


def test_interrupts_are_asked_for_with_flags() -> None:
    raw = Raw()
    raw.driver.disable_interrupts()
    assert raw.avail()[0] == spec.AVAIL_F_NO_INTERRUPT
    assert not raw.driver.enable_interrupts()
    assert raw.avail()[0] == 0
    raw.use(1, (0, 0))
    assert raw.driver.enable_interrupts()  # too late, something is there


def test_interrupts_are_asked_for_with_an_index() -> None:
    raw = Raw(event_idx=True)
    raw.driver.disable_interrupts()
    assert raw.avail()[0] == 0
    assert not raw.driver.enable_interrupts(after=2)
    assert raw.avail()[-1] == 2
    raw.use(2)
    assert not raw.driver.enable_interrupts(after=2)
    raw.use(3)
    assert raw.driver.enable_interrupts(after=2)


def test_anything_can_be_written() -> None:
    raw = Raw()
    raw.driver.write_desc(2, 1, 2, 3, 4)
    assert raw.desc(2) == (1, 2, 3, 4)
    raw.driver.write_avail(9, 8, flags=7)
    assert raw.avail()[:4] == (7, 2, 9, 8)
    raw.driver.write_avail(idx=0x1234)
    assert raw.avail()[1] == 0x1234


class TestPieceMemory:
    def test_pieces_are_views_of_one_memory(self) -> None:
        memory = PieceMemory(32, cuts=[8, 0, 20, 32, 99])
        assert [len(view) for view in memory.views(4, 20, write=True)] == [4, 12, 4]
        memory.write(6, b"abcd")
        assert memory.read(5, 6) == b"\0abcd\0"
        assert memory.views(8, 0, write=False) == []

    @pytest.mark.parametrize(("address", "size"), [(-1, 2), (30, 3), (32, 1), (1 << 64, 1)])
    def test_what_is_outside_is_no_memory(self, address: int, size: int) -> None:
        with pytest.raises(GuestMemoryError):
            PieceMemory(32).read(address, size)

    def test_part_of_it_may_be_read_only(self) -> None:
        memory = PieceMemory(32, read_only=(8, 16))
        memory.write(0, bytes(8))
        memory.write(16, bytes(8))
        assert memory.read(8, 8) == bytes(8)
        for address, size in ((7, 2), (15, 2), (0, 32)):
            with pytest.raises(GuestMemoryError, match="read-only"):
                memory.write(address, bytes(size))
