"""What one client may ask for, what it gets, and what it can't do to others."""

from __future__ import annotations

import errno
import os
import resource
from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import PAGE, RW, make_memory
from viommu.basic import BasicMemoryMapper
from viommu.errors import Access, PeerError, TranslationFault
from viommu.ipc import protocol
from viommu.ipc.conversation import (
    Conversation,
    ConversationCounters,
    ConversationSetup,
    ExportLimits,
)
from viommu.ipc.packets import discard
from viommu.ipc.protocol import Kind
from viommu.mapper import MappingInfo, MemRegion
from viommu.memory import MappedFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.events import Event

LIMITS = ExportLimits(exports=4, bytes=8 * PAGE, mappings=3, reports=2)


class Talk:
    """A conversation that has begun, with 4 pages mapped from 0x10000 on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.mapper = BasicMemoryMapper()
        self.mapper.add_map(MappingInfo(0x10000, 0x4000, 4 * PAGE, RW))
        self.memory = make_memory(MappedFiles(), 0)
        self.faults: list[TranslationFault] = []
        self.sessions: list[Event | None] = []
        self.counters = ConversationCounters()
        setup = ConversationSetup(
            self.mapper, self.memory, self.faults.append, LIMITS, self.counters
        )
        self.conversation = Conversation(setup, lambda: self.now, self.sessions.append)

    def say(self, kind: Kind, body: bytes = b"", ident: int = 1) -> list[protocol.Reply]:
        packets = self.conversation.handle(protocol.encode_request(kind, ident, body))
        discard(packets)
        return [protocol.decode_reply(packet.data) for packet in packets]

    def ask(self, kind: Kind, body: bytes = b"") -> protocol.Reply:
        (reply,) = self.say(kind, body)
        return reply

    def export(self, iova: int, size: int) -> protocol.Reply:
        return self.ask(Kind.EXPORT, protocol.RANGE.pack(iova, size))

    def release(self, iova: int, size: int) -> protocol.Reply:
        return self.ask(Kind.RELEASE, protocol.RANGE.pack(iova, size))

    def report(self, iova: int, access: Access) -> None:
        assert self.say(Kind.REPORT, protocol.REPORT.pack(iova, access.value, 0), 0) == []

    @property
    def held(self) -> list[tuple[int, ...]]:
        return [tuple(held) for held in self.mapper.exports.held()]


@pytest.fixture
def talk() -> Iterator[Talk]:
    talk = Talk()
    hello = talk.ask(Kind.HELLO, protocol.HELLO.pack(protocol.TAG, 1, 9))
    assert protocol.decode_welcome(hello.body) == (1, 0, 4, 8 * PAGE, talk.memory.generation)
    yield talk
    talk.conversation.close()
    talk.memory.close()
    assert talk.held == []


@pytest.fixture
def session(talk: Talk) -> Talk:
    assert not talk.ask(Kind.START).error
    return talk


def test_nothing_goes_before_hello_and_hello_comes_once() -> None:
    talk = Talk()
    hello = protocol.HELLO.pack(protocol.TAG, 1, 0)
    with pytest.raises(PeerError, match="START at the wrong time"):
        talk.say(Kind.START)
    talk.say(Kind.HELLO, hello)
    with pytest.raises(PeerError, match="HELLO at the wrong time"):
        talk.say(Kind.HELLO, hello)
    talk.memory.close()


def test_another_version_is_refused() -> None:
    talk = Talk()
    with pytest.raises(PeerError) as caught:
        talk.say(Kind.HELLO, protocol.HELLO.pack(protocol.TAG, 2, 0))
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert not talk.conversation.greeted
    talk.memory.close()


def test_an_export_leads_to_guest_memory(session: Talk) -> None:
    reply = session.export(0x10100, 0x200)

    regions, generation, left = protocol.decode_regions(reply.body)
    assert regions == [MemRegion(0x4100, 0x200, RW)]
    assert (generation, left) == (session.memory.generation, 0)
    assert session.held == [(0x10100, 0x200, 1)]
    assert (session.conversation.holds, session.conversation.held_bytes) == (1, 0x200)


def test_an_export_needs_a_session(talk: Talk) -> None:
    assert talk.export(0x10000, 8).error == errno.EBUSY
    assert talk.held == []


def test_a_hole_is_a_fault_and_holds_nothing(session: Talk) -> None:
    reply = session.export(0x13000, 2 * PAGE)

    error = protocol.error_of(reply)
    assert isinstance(error, TranslationFault)
    assert error.iova == 0x14000
    assert session.held == []
    assert session.faults == []


@pytest.mark.parametrize(
    ("iova", "size", "number"),
    [
        (0x10000, 0, errno.EINVAL),
        ((1 << 64) - 1, 1, errno.EFAULT),
        ((1 << 64) - 1, 2, errno.EFAULT),
        (0, (1 << 64) - 1, errno.EBUSY),
    ],
)
def test_an_export_that_can_not_be(session: Talk, iova: int, size: int, number: int) -> None:
    assert session.export(iova, size).error == number
    assert session.held == []


def test_what_is_held_is_limited(session: Talk) -> None:
    for _ in range(4):
        assert not session.export(0x10000, PAGE).error
    refused = session.export(0x10000, 1)
    assert "limit of 4 exports" in str(protocol.error_of(refused))

    session.release(0x10000, PAGE)
    assert not session.export(0x10000, 4 * PAGE).error
    session.release(0x10000, PAGE)
    refused = session.export(0x10000, 3 * PAGE)
    assert "bytes" in str(protocol.error_of(refused))
    assert session.conversation.held_bytes == 6 * PAGE


def test_an_export_of_too_many_mappings_is_not_even_looked_up(session: Talk) -> None:
    for number in range(3):
        session.mapper.add_map(MappingInfo(0x14000 + number * PAGE, 0, PAGE, RW))
    assert not session.export(0x13000, 3 * PAGE).error

    refused = session.export(0x13000, 4 * PAGE)
    assert refused.error == errno.EINVAL
    assert "4 mappings" in str(protocol.error_of(refused))


def test_many_regions_come_in_several_packets(talk: Talk) -> None:
    count = protocol.REGIONS_A_PACKET + 5
    for number in range(count):
        talk.mapper.add_map(MappingInfo(0x100000 + number * PAGE, 2 * number * PAGE, PAGE, RW))
    setup = ConversationSetup(
        talk.mapper, talk.memory, talk.faults.append, ExportLimits(), talk.counters
    )
    talk.conversation = Conversation(setup, lambda: talk.now, talk.sessions.append)
    talk.say(Kind.HELLO, protocol.HELLO.pack(protocol.TAG, 1, 0))
    talk.say(Kind.START)

    replies = talk.say(Kind.EXPORT, protocol.RANGE.pack(0x100000, count * PAGE))

    parts = [protocol.decode_regions(reply.body) for reply in replies]
    assert [len(regions) for regions, _, _ in parts] == [protocol.REGIONS_A_PACKET, 5]
    assert [left for _, _, left in parts] == [5, 0]


def test_a_release_is_counted_and_exact(session: Talk) -> None:
    for _ in range(2):
        session.export(0x10000, 0x10)
    assert session.release(0x10000, 0x11).error == errno.EBUSY
    assert session.release(0x10001, 0x10).error == errno.EBUSY
    assert session.held == [(0x10000, 0x10, 2)]
    for _ in range(2):
        assert not session.release(0x10000, 0x10).error
    assert session.release(0x10000, 0x10).error == errno.EBUSY
    assert session.conversation.holds == session.conversation.held_bytes == 0


def test_a_release_that_wants_no_answer_gets_none(session: Talk) -> None:
    session.export(0x10000, 0x10)

    assert session.say(Kind.RELEASE, protocol.RANGE.pack(0x10000, 0x10), 0) == []
    with pytest.raises(PeerError, match=r"RELEASE.*not exported"):
        session.say(Kind.RELEASE, protocol.RANGE.pack(0x10000, 0x10), 0)


def test_since_when_is_remembered_for_what_is_held_still(session: Talk) -> None:
    session.export(0x10000, 0x10)
    session.now = 3.0
    session.export(0x10000, 0x10)
    session.export(0x11000, 0x10)
    session.release(0x10000, 0x10)

    assert session.conversation.oldest(9) == [
        ((0x10000, 0x10), (1, 0)),
        ((0x11000, 0x10), (1, 3.0)),
    ]
    assert len(session.conversation.oldest(1)) == 1


def test_a_session_ends_by_a_fault_and_another_begins_when_all_is_released(session: Talk) -> None:
    session.export(0x10000, 0x10)
    resolution = session.mapper.remove_map(0x10000, 4 * PAGE).resolution
    assert resolution is not None
    assert session.sessions[-1] is not None
    assert session.sessions[-1].is_set()
    session.conversation.end_session()
    assert session.sessions[1:] == [None]
    states = [session.conversation.state]

    assert session.export(0x10000, 0x10).error == errno.ESTALE
    assert session.ask(Kind.START).error == errno.ESTALE
    assert not resolution.is_set()
    session.release(0x10000, 0x10)
    assert resolution.is_set()
    states.append(session.conversation.state)
    assert not session.ask(Kind.START).error
    states.append(session.conversation.state)
    assert states == ["faulted", "none", "active"]
    resolution.close()


def test_a_session_whose_event_can_not_be_sent_is_none(talk: Talk) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))  # enough for the mapper
    try:
        refused = talk.ask(Kind.START)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert refused.error == errno.EBUSY
    assert "no event" in str(protocol.error_of(refused))
    assert talk.conversation.state == "none"
    assert not talk.ask(Kind.START).error


def test_a_session_that_holds_something_is_not_replaced(session: Talk) -> None:
    session.export(0x10000, 0x10)
    before = session.sessions[-1]

    assert session.ask(Kind.START).error == errno.EBUSY
    assert session.sessions[-1] is before
    session.release(0x10000, 0x10)
    assert not session.ask(Kind.START).error
    assert before is not None
    assert before.fileno() == -1


def test_a_client_that_goes_has_released_everything(session: Talk) -> None:
    for _ in range(2):
        session.export(0x10000, 0x10)
    session.export(0x11000, 0x10)
    resolution = session.mapper.reset_domain()
    assert resolution is not None
    session.conversation.close()

    assert resolution.is_set()
    assert session.held == []
    resolution.close()


def test_memory_is_listed(talk: Talk) -> None:
    packets = talk.conversation.handle(
        protocol.encode_request(Kind.MEMORY, 1, protocol.FIRST.pack(0))
    )
    (packet,) = packets
    spans, _, left = protocol.decode_spans(protocol.decode_reply(packet.data).body, 1)

    assert [(span.gpa, span.file) for span in spans] == [(0, 0)]
    assert left == 0
    assert os.fstat(packet.fds[0]).st_size == spans[0].size
    discard(packets)


@pytest.mark.parametrize(
    ("iova", "access", "told"),
    [
        (0x20000, Access.READ, True),
        (0x20000, Access.NONE, False),  # nothing was attempted
        (0x10000, RW, False),  # it may do that
        (0x30000, Access.READ, False),
        (0x30000, Access.WRITE, True),
        (0x30000, RW, True),
    ],
)
def test_only_a_fault_that_is_one_is_reported(
    talk: Talk, iova: int, access: Access, told: bool
) -> None:
    talk.mapper.add_map(MappingInfo(0x30000, 0, PAGE, Access.READ))
    talk.report(iova, access)

    assert [(fault.iova, fault.access) for fault in talk.faults] == [(iova, access)] * told
    assert (talk.counters.reports, talk.counters.reports_dropped) == (told, not told)


def test_reports_are_rare(talk: Talk) -> None:
    for _ in range(5):
        talk.report(0x20000, Access.READ)
    assert len(talk.faults) == 2

    talk.now += 1
    talk.report(0x20000, Access.READ)
    assert len(talk.faults) == 3
    assert talk.counters.reports_dropped == 3


def test_a_farewell_is_kept(talk: Talk) -> None:
    assert talk.say(Kind.LEAVE, b"the disk is\nin use", 0) == []

    assert talk.conversation.farewell == r"the disk is\nin use"
