from __future__ import annotations

import struct
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import GuestMemoryError, RingError, UsageError
from viommu.spec import virtio_ring as spec
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout, Used
from viommu.virtio.ring import SplitQueue

NEXT, WRITE, INDIRECT = spec.DESC_F_NEXT, spec.DESC_F_WRITE, spec.DESC_F_INDIRECT

SIZE: Final = 8
RAM: Final = 1 << 16
DATA: Final = 0x8000
TABLE: Final = 0xC000


class Pair:
    """A queue of 8 from both sides, over one memory."""

    def __init__(
        self,
        *,
        event_idx: bool = False,
        size: int = SIZE,
        memory: PieceMemory | None = None,
        at: int = 0x1000,
        **limits: Any,
    ) -> None:
        self.memory = memory or PieceMemory(RAM)
        layout = RingLayout.at(at, size)
        self.driver = DriverQueue(self.memory, size, layout, event_idx=event_idx)
        self.device = SplitQueue(
            self.memory,
            3,
            size,
            layout.desc,
            layout.avail,
            layout.used,
            event_idx=event_idx,
            **{"indirect": True, **limits},
        )

    def start_at(self, index: int) -> None:
        """Make both sides believe that ``index`` chains have gone through."""
        driver, device = self.driver, self.device
        driver._next_avail = driver._published = driver._last_used = index
        device._next_avail = device._avail_idx = device._next_used = device._published = index
        driver._avail[1] = index
        self.memory.write(driver.layout.used + 2, struct.pack("<H", index))

    def offer(self, *heads: int) -> None:
        self.driver.write_avail(*heads)


def test_a_request_goes_there_and_its_reply_comes_back() -> None:
    pair = Pair()
    pair.memory.write(DATA, b"request")
    head = pair.driver.add([(DATA, 7)], [(DATA + 0x100, 4)])
    assert pair.device.pop() is None
    assert pair.driver.publish()

    chain = pair.device.pop()
    assert chain is not None
    assert (chain.head, chain.readable, chain.writable) == (
        head,
        [(DATA, 7)],
        [(DATA + 0x100, 4)],
    )
    assert (chain.readable_size, chain.writable_size) == (7, 4)
    assert pair.device.read(chain) == b"request"
    pair.device.write(chain, b"done")
    pair.device.push(chain, 4)
    assert not pair.driver.has_used()
    assert pair.device.publish()
    assert pair.driver.collect() == [Used(head, 4)]
    assert pair.memory.read(DATA + 0x100, 4) == b"done"
    assert pair.device.pop() is None


@pytest.mark.parametrize("indirect", [False, True])
def test_any_layout_of_descriptors_is_one_buffer(indirect: bool) -> None:
    pair = Pair()
    pair.memory.write(DATA, b"abcdefgh")
    readable = [(DATA, 1), (DATA + 1, 0), (DATA + 1, 4), (DATA + 5, 3)]
    writable = [(DATA + 0x20, 2), (DATA + 0x40, 0), (DATA + 0x50, 3)]
    pair.driver.add(readable, writable, table=TABLE if indirect else None)
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert pair.device.read(chain) == b"abcdefgh"
    assert pair.device.read(chain, 3) == b"abc"
    assert pair.device.read(chain, 100) == b"abcdefgh"
    assert pair.device.read(chain, 0) == b""
    pair.device.write(chain, b"12345")
    assert pair.memory.read(DATA + 0x20, 3) == b"12\0"
    assert pair.memory.read(DATA + 0x50, 4) == b"345\0"
    pair.device.write(chain, b"XY", offset=1)
    assert pair.memory.read(DATA + 0x20, 2) + pair.memory.read(DATA + 0x50, 3) == b"1XY45"
    with pytest.raises(UsageError, match="2 bytes at 4 do not fit 5"):
        pair.device.write(chain, b"zz", offset=4)


def test_read_of_a_chain_without_readable_bytes() -> None:
    pair = Pair()
    pair.driver.add([], [(DATA, 24)])
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert pair.device.read(chain) == b""


def test_direct_descriptors_may_end_in_an_indirect_table() -> None:
    # virtio 1.2, 2.7.5.3.2: "zero or more normal chained descriptors followed by a
    # single descriptor with INDIRECT", whose WRITE flag is to be ignored.
    pair = Pair()
    pair.memory.write(
        TABLE, spec.DESC.pack(DATA + 8, 8, NEXT, 1) + spec.DESC.pack(DATA + 16, 4, WRITE, 0)
    )
    pair.driver.write_desc(0, DATA, 8, NEXT, 5)
    pair.driver.write_desc(5, TABLE, 32, INDIRECT | WRITE)
    pair.offer(0)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.readable == [(DATA, 8), (DATA + 8, 8)]
    assert chain.writable == [(DATA + 16, 4)]


def test_an_indirect_table_may_be_longer_than_the_queue() -> None:
    pair = Pair()
    buffers = [(DATA + 16 * i, 16) for i in range(40)]
    pair.driver.add(buffers, table=TABLE)
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert chain.readable == buffers


def descs(*entries: tuple[int, int, int, int]) -> bytes:
    return b"".join(spec.DESC.pack(*entry) for entry in entries)


# name, descriptor table, indirect table, limits, what the message says
MALFORMED: list[tuple[str, bytes, bytes, dict[str, Any], str]] = [
    ("next out of the table", descs((DATA, 4, NEXT, 8)), b"", {}, "descriptor 8 of 8"),
    ("a loop of one", descs((DATA, 4, NEXT, 0)), b"", {}, "loop"),
    ("a loop of two", descs((DATA, 4, NEXT, 1), (DATA, 4, NEXT, 0)), b"", {}, "loop"),
    ("a loop of empty descriptors", descs((DATA, 0, NEXT, 0)), b"", {}, "loop"),
    (
        "too many descriptors",
        descs((DATA, 4, NEXT, 1), (DATA, 4, NEXT, 2), (DATA, 4, 0, 0)),
        b"",
        {"max_descriptors": 2},
        "too many descriptors",
    ),
    ("an empty table", descs((TABLE, 0, INDIRECT, 0)), b"", {}, "table of 0 bytes"),
    ("a ragged table", descs((TABLE, 40, INDIRECT, 0)), b"", {}, "table of 40 bytes"),
    (
        "a huge table",
        descs((TABLE, 0xFFFFFFF0, INDIRECT, 0)),
        b"",
        {},
        "268435455 descriptors, more than 1024",
    ),
    (
        "a table in a table",
        descs((TABLE, 16, INDIRECT, 0)),
        descs((TABLE, 16, INDIRECT, 0)),
        {},
        "inside an indirect table",
    ),
    (
        "a next out of an indirect table",
        descs((TABLE, 32, INDIRECT, 0)),
        descs((DATA, 4, NEXT, 2), (DATA, 4, 0, 0)),
        {},
        "descriptor 2 of 2",
    ),
    (
        "a loop in an indirect table",
        descs((TABLE, 32, INDIRECT, 0)),
        descs((DATA, 4, NEXT, 1), (DATA, 4, NEXT, 0)),
        {},
        "loop",
    ),
    (
        "not negotiated",
        descs((TABLE, 16, INDIRECT, 0)),
        descs((DATA, 4, 0, 0)),
        {"indirect": False},
        "not negotiated",
    ),
    (
        "more after a table",
        descs((TABLE, 16, INDIRECT | NEXT, 1), (DATA, 4, 0, 0)),
        descs((DATA, 4, 0, 0)),
        {},
        "continues after its indirect table",
    ),
    (
        "readable after writable",
        descs((DATA, 4, WRITE | NEXT, 1), (DATA, 4, 0, 0)),
        b"",
        {},
        "readable buffer after a writable one",
    ),
    ("a buffer that wraps", descs(((1 << 64) - 4, 8, 0, 0)), b"", {}, "8 bytes at 0xfff"),
    (
        "too many bytes",
        descs((DATA, 60, NEXT, 1), (DATA, 60, WRITE, 0)),
        b"",
        {"max_chain_bytes": 100},
        "120 bytes, more than 100",
    ),
]


@pytest.mark.parametrize(
    ("table", "indirect", "limits", "message"),
    [row[1:] for row in MALFORMED],
    ids=[row[0] for row in MALFORMED],
)
def test_a_malformed_chain_breaks_the_queue(
    table: bytes, indirect: bytes, limits: dict[str, Any], message: str
) -> None:
    pair = Pair(**limits)
    pair.memory.write(pair.driver.layout.desc, table)
    pair.memory.write(TABLE, indirect)
    pair.offer(0)
    with pytest.raises(RingError, match=message):
        pair.device.pop()
    assert pair.device.in_flight == 0


def test_the_buffer_that_ends_with_the_address_space_is_fine() -> None:
    pair = Pair()
    pair.memory.write(pair.driver.layout.desc, descs(((1 << 64) - 8, 8, 0, 0)))
    pair.offer(0)
    chain = pair.device.pop()
    assert chain is not None
    # It is not memory, which is no fault of the ring.
    with pytest.raises(GuestMemoryError):
        pair.device.read(chain)


def test_a_wild_head_breaks_the_queue() -> None:
    pair = Pair()
    pair.offer(8)
    with pytest.raises(RingError, match="head 8 refers to descriptor 8 of 8"):
        pair.device.pop()


@pytest.mark.parametrize("idx", [9, 0x8000, 0xFFFF])
def test_an_index_that_jumps_or_goes_back_breaks_the_queue(idx: int) -> None:
    pair = Pair()
    pair.driver.write_avail(idx=idx)
    with pytest.raises(RingError, match=f"available index {idx} is {idx} ahead of 0"):
        pair.device.pop()


def test_a_driver_cannot_have_more_in_flight_than_the_queue_holds() -> None:
    pair = Pair()
    pair.memory.write(pair.driver.layout.desc, descs((DATA, 4, 0, 0)))
    pair.offer(*[0] * SIZE)
    chains = [pair.device.pop() for _ in range(SIZE)]
    assert all(chains)
    pair.offer(0)
    with pytest.raises(RingError, match="8 of 8 in flight"):
        pair.device.pop()
    assert chains[0] is not None
    pair.device.push(chains[0], 0)
    with pytest.raises(RingError, match="8 of 8 in flight"):
        pair.device.pop()
    pair.device.publish()
    assert pair.device.pop() is not None


@pytest.mark.parametrize("size", [0, 3, 65536, -1])
def test_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(RingError, match="power of two"):
        SplitQueue(PieceMemory(RAM), 0, size, 0, 0, 0, event_idx=True, indirect=True)


@pytest.mark.parametrize(
    ("desc", "avail", "used", "what"),
    [
        (8, 0, 0, "descriptor table at 0x8"),
        (0, 1, 0, "available ring at 0x1"),
        (0, 0, 2, "used ring at 0x2"),
        ((1 << 64) - 16, 0, 0, "descriptor table"),
        (0, (1 << 64) - 2, 0, "available ring"),
        (0, 0, (1 << 64) - 4, "used ring"),
    ],
)
def test_areas_that_are_misaligned_or_wrap_are_refused(
    desc: int, avail: int, used: int, what: str
) -> None:
    with pytest.raises(RingError, match=what):
        SplitQueue(PieceMemory(RAM), 0, 8, desc, avail, used, event_idx=True, indirect=True)


@pytest.mark.parametrize("area", ["desc", "avail", "used"])
def test_rings_outside_memory_fault_and_nothing_else(area: str) -> None:
    layout = RingLayout.at(0x1000, SIZE)._replace(**{area: RAM - 16})
    device = SplitQueue(
        PieceMemory(RAM), 0, SIZE, *layout[:3], event_idx=False, indirect=False
    )  # constructing touches nothing
    for call in (
        device.pop,
        device.has_work,
        device.enable_notifications,
        device.disable_notifications,
    ):
        with pytest.raises(GuestMemoryError):
            call()


def test_an_indirect_table_outside_memory_faults() -> None:
    pair = Pair()
    pair.memory.write(pair.driver.layout.desc, descs((RAM - 16, 32, INDIRECT, 0)))
    pair.offer(0)
    with pytest.raises(GuestMemoryError):
        pair.device.pop()
    assert pair.device.in_flight == 0


def test_a_buffer_outside_memory_faults_when_it_is_used() -> None:
    pair = Pair()
    pair.driver.add([(RAM - 2, 4)], [(RAM - 2, 4)])
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    with pytest.raises(GuestMemoryError):
        pair.device.read(chain)
    with pytest.raises(GuestMemoryError):
        pair.device.write(chain, b"1234")


def test_memory_that_the_device_may_not_write_faults() -> None:
    pair = Pair(memory=PieceMemory(RAM, read_only=(DATA, DATA + 0x100)))
    pair.driver.add([(DATA, 4)], [(DATA, 4)])
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert pair.device.read(chain) == bytes(4)
    with pytest.raises(GuestMemoryError, match="read-only"):
        pair.device.write(chain, b"1234")


def test_a_used_ring_in_read_only_memory_faults() -> None:
    pair = Pair()
    used = pair.driver.layout.used
    pair.memory.read_only = (used, used + 4)
    with pytest.raises(GuestMemoryError, match="read-only"):
        pair.device.pop()


def test_more_chains_back_than_were_taken_is_our_own_mistake() -> None:
    pair = Pair()
    with pytest.raises(UsageError, match="no chain is in flight"):
        pair.device.push(0, 0)


def test_a_head_can_be_pushed_without_its_chain() -> None:
    pair = Pair()
    head = pair.driver.add([(DATA, 4)])
    pair.driver.publish()
    assert pair.device.pop() is not None
    pair.device.push(head, 0)
    pair.device.publish()
    assert pair.driver.collect() == [Used(head, 0)]


def test_a_batch_becomes_visible_with_one_store_of_the_index() -> None:
    pair = Pair()
    heads = [pair.driver.add([(DATA, 4)]) for _ in range(4)]
    pair.driver.publish()
    while chain := pair.device.pop():
        pair.device.push(chain, chain.head)
        assert not pair.driver.has_used()
    assert pair.device.in_flight == 4
    pair.device.publish()
    assert pair.device.in_flight == 0
    assert pair.driver.collect() == [Used(head, head) for head in heads]
    assert not pair.device.publish()


def test_indices_and_flags_are_stored_as_one_machine_word() -> None:
    # struct.pack_into clears bytes before it writes them; another CPU sees that.
    class Recording:
        def __init__(self, words: Any) -> None:
            self.words = words
            self.stores: list[tuple[int, int]] = []

        def __getitem__(self, index: int) -> int:
            value: int = self.words[index]
            return value

        def __setitem__(self, index: int, value: int) -> None:
            self.stores.append((index, value))
            self.words[index] = value

    pair = Pair()
    pair.device.disable_notifications()
    assert isinstance(pair.device._used, memoryview)
    assert pair.device._used.format == "H"
    recording = Recording(pair.device._used)
    pair.device._used = recording
    pair.driver.add([(DATA, 4)])
    pair.driver.add([(DATA, 4)])
    pair.driver.publish()
    while chain := pair.device.pop():
        pair.device.push(chain, 0)
    pair.device.publish()
    pair.device.enable_notifications()
    assert recording.stores == [(1, 2), (0, 0)]


def test_views_are_asked_for_again_when_memory_changed() -> None:
    pair = Pair()
    pair.device.has_work()
    moved = bytearray(pair.memory.bytes)
    pair.memory.bytes[:] = bytes(RAM)  # what the stale views see
    pair.memory.bytes = moved
    pair.memory.generation += 1
    pair.memory.write(pair.driver.layout.desc, descs((DATA, 4, 0, 0)))
    pair.memory.write(pair.driver.layout.avail + 2, struct.pack("<HH", 1, 0))
    assert pair.device.has_work()
    chain = pair.device.pop()
    assert chain is not None
    pair.device.push(chain, 1)
    pair.device.publish()
    assert pair.memory.read(pair.driver.layout.used + 2, 10) == struct.pack("<HII", 1, 0, 1)


def test_a_memory_that_changes_while_views_are_taken_is_asked_once_more() -> None:
    class Fickle(PieceMemory):
        faults = 1

        def views(self, address: int, size: int, *, write: bool) -> list[memoryview]:
            if write and self.faults:
                self.faults -= 1
                self.generation += 1
            return super().views(address, size, write=write)

    memory = Fickle(RAM)
    Fickle.faults = 0
    pair = Pair(memory=memory)
    Fickle.faults = 1
    pair.device.has_work()
    assert pair.device._generation == memory.generation == 1


def test_a_closed_queue_has_no_work_and_drops_what_comes_back() -> None:
    pair = Pair()
    head = pair.driver.add([(DATA, 4)])
    pair.driver.publish()
    chain = pair.device.pop()
    pair.driver.add([(DATA, 4)])
    pair.driver.publish()
    assert chain is not None
    pair.device.close()
    assert not pair.device.has_work()
    assert pair.device.pop() is None
    pair.device.push(chain, 4)
    assert not pair.device.publish()
    pair.device.disable_notifications()
    assert not pair.device.enable_notifications()
    assert not pair.driver.has_used()
    assert head == chain.head


@pytest.mark.parametrize("event_idx", [False, True])
def test_rings_scattered_over_many_pieces(event_idx: bool) -> None:
    # Cuts at every multiple of 4: every used element straddles two pieces, most
    # descriptors four.
    pair = Pair(memory=PieceMemory(RAM, cuts=range(0x1000, 0x1200, 4)), event_idx=event_idx)
    pair.memory.write(DATA, b"data")
    for round_number in range(20):
        heads = [pair.driver.add([(DATA, 4)], [(DATA + 8, 4)]) for _ in range(4)]
        pair.driver.publish()
        assert pair.device.has_work()
        while chain := pair.device.pop():
            assert pair.device.read(chain) == b"data"
            pair.device.push(chain, round_number)
        pair.device.publish()
        assert pair.driver.collect() == [Used(head, round_number) for head in heads]
        assert not pair.device.enable_notifications()


def test_memory_split_inside_a_word_is_refused() -> None:
    layout = RingLayout.at(0x1000, SIZE)
    pair = Pair(memory=PieceMemory(RAM))
    pair.memory._cuts = [layout.used + 3, RAM]
    with pytest.raises(GuestMemoryError, match="split inside a 2-byte word"):
        pair.device.pop()


class TestNotifications:
    """Against a model in numbers that do not wrap."""

    @pytest.mark.parametrize("start", [0, 0xFFFE, 0x7FFF])
    def test_flags_suppress_interrupts_and_kicks(self, start: int) -> None:
        pair = Pair()
        pair.start_at(start)
        pair.driver.disable_interrupts()
        pair.device.disable_notifications()
        pair.driver.add([(DATA, 4)])
        assert not pair.driver.publish()
        assert pair.device.enable_notifications()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain, 0)
        assert not pair.device.publish()
        assert pair.driver.enable_interrupts()
        assert not pair.device.enable_notifications()
        pair.driver.add([(DATA, 4)])
        assert pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain, 0)
        assert pair.device.publish()

    def test_with_event_idx_flags_mean_nothing(self) -> None:
        # 2.7.7.2, 2.7.10.1: flags are ignored by the device, and 0 from the device.
        pair = Pair(event_idx=True)
        pair.driver.write_avail(flags=spec.AVAIL_F_NO_INTERRUPT)
        pair.device.disable_notifications()
        assert pair.memory.read(pair.driver.layout.used, 2) == bytes(2)
        pair.driver.add([(DATA, 4)])
        pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain, 0)
        assert pair.device.publish()

    @given(
        start=st.sampled_from([0, 5, 0x7FFE, 0xFFF0, 0xFFFF]),
        steps=st.lists(
            st.tuples(
                st.integers(0, 3),  # chains the driver adds
                st.integers(0, 3),  # chains the device gives back at most
                st.one_of(st.none(), st.integers(0, 4)),  # driver: interrupt after so many more
                st.booleans(),  # device: ask for kicks
            ),
            max_size=40,
        ),
    )
    def test_event_idx_is_the_model(
        self, start: int, steps: list[tuple[int, int, int | None, bool]]
    ) -> None:
        pair = Pair(event_idx=True)
        pair.start_at(start)
        added = taken = given_back = collected = start  # these never wrap
        kick_at: int | None = None  # the entry whose making available needs a kick
        interrupt_at: int | None = None
        for adds, gives, after, arm in steps:
            before = added
            for _ in range(min(adds, pair.driver.room)):
                pair.driver.add([(DATA, 4)])
                added += 1
            kicked = pair.driver.publish()
            if kick_at is not None:
                assert kicked == (before <= kick_at < added)
            before = given_back
            for _ in range(gives):
                chain = pair.device.pop()
                if chain is None:
                    break
                taken += 1
                given_back += 1
                pair.device.push(chain, 0)
            wanted = pair.device.publish()
            if interrupt_at is not None:
                assert wanted == (before <= interrupt_at < given_back)
            if arm:
                kick_at = taken
                assert pair.device.enable_notifications() == (added > taken)
            pair.driver.collect()
            collected = given_back
            if after is not None:
                interrupt_at = collected + after
                pair.driver.enable_interrupts(after)
            assert pair.device.has_work() == (added > taken)


@given(
    event_idx=st.booleans(),
    start=st.sampled_from([0, 0xFFFA]),
    cuts=st.lists(st.integers(0x1000 // 4, 0x1200 // 4), max_size=6),
    rounds=st.lists(
        st.lists(
            st.tuples(
                st.lists(st.binary(max_size=9), max_size=3),
                st.lists(st.integers(0, 9), max_size=3),
                st.booleans(),
            ),
            max_size=4,
        ),
        max_size=6,
    ),
)
def test_every_request_arrives_whole_and_in_order(
    event_idx: bool,
    start: int,
    cuts: list[int],
    rounds: list[list[tuple[list[bytes], list[int], bool]]],
) -> None:
    pair = Pair(memory=PieceMemory(RAM, [4 * cut for cut in cuts]), event_idx=event_idx)
    pair.start_at(start)
    for requests in rounds:
        sent = []
        at, table = DATA, TABLE
        for readable, writable, indirect in requests:
            needed = len(readable) + len(writable)
            if not needed or pair.driver.room < (1 if indirect else needed):
                continue
            buffers = []
            for piece in readable:
                pair.memory.write(at, piece)
                buffers.append((at, len(piece)))
                at += 16
            room = [(at + 16 * number, length) for number, length in enumerate(writable)]
            at += 16 * len(room)
            head = pair.driver.add(buffers, room, table=table if indirect else None)
            table += 16 * needed
            sent.append((head, b"".join(readable), room))
        pair.driver.publish()
        for head, data, room in sent:
            chain = pair.device.pop()
            assert chain is not None
            assert chain.head == head
            assert pair.device.read(chain) == data
            reply = bytes(range(1, chain.writable_size + 1))
            assert chain.writable_size == sum(length for _, length in room)
            pair.device.write(chain, reply)
            pair.device.push(chain, len(reply))
            written = b"".join(pair.memory.read(*piece) for piece in room)
            assert written == reply
        assert pair.device.pop() is None
        pair.device.publish()
        assert [used.head for used in pair.driver.collect()] == [head for head, *_ in sent]
