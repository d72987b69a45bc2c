"""The blocking client: the face of a mapper's exports, from another thread or process."""

from __future__ import annotations

import errno
import select
import socket
import threading
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.ipc.rig import PAGE, RAM, RW, Rig
from viommu.endpoints.dma import EndpointDma
from viommu.errors import (
    Access,
    ExportError,
    GuestMemoryError,
    PeerError,
    SessionFaulted,
    TranslationFault,
    UsageError,
)
from viommu.export import ExportedRegion
from viommu.ipc import protocol
from viommu.ipc.client import ExportClient
from viommu.ipc.protocol import Kind
from viommu.loop import Loop
from viommu.mapper import MappingInfo, MemRegion
from viommu.testing.serving import LoopThread
from viommu.vfio_user.connection import receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from viommu.mapper import Exporter

T = TypeVar("T")


class House:
    """A server in a thread of its own, and a client here."""

    def __init__(self, path: Path) -> None:
        self.rig = Rig(path)
        self.thread = LoopThread(self.rig.loop)
        self.thread.__enter__()
        self.client = ExportClient(path)

    def call(self, function: Callable[[], T]) -> T:
        """Call in the server's thread, when all that was sent before has been handled."""
        if self.client.fileno() >= 0:
            self.client.refresh_memory()
        result = self.thread.call(function)
        for _ in range(2):  # turns, in which the server sees what that has caused
            self.thread.call(lambda: None)
        return result

    @property
    def exported(self) -> int:
        return self.call(lambda: self.rig.mapper.exports.total)

    def close(self) -> None:
        self.client.close()
        self.thread.call(self.rig.server.close)
        self.thread.__exit__(None, None, None)
        self.rig.__exit__()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "s")
    yield house
    house.close()


# -- what a mapper does


def test_it_has_the_face_of_a_mapper(house: House) -> None:
    exporter: Exporter = house.client
    event = exporter.start_export_session()

    assert exporter.export(0x10100, 0x200) == [MemRegion(0x4100, 0x200, RW)]
    assert not event.is_set()
    exporter.release(0x10100, 0x200)
    assert house.exported == 0
    event.close()


def test_memory_is_that_of_the_guest(house: House) -> None:
    event = house.client.start_export_session()
    with ExportedRegion(house.client, house.client.memory, 0x10FFE, 4, RW) as region:
        region.write(b"abcd")
        assert house.call(lambda: house.rig.memory.read(0x4FFE, 4)) == b"abcd"
        assert house.exported == 1
    assert house.exported == 0
    event.close()


def test_memory_that_changes_is_known_when_an_export_returns(house: House) -> None:
    client, rig = house.client, house.rig
    event = client.start_export_session()
    client.export(0x10000, 1)
    generation = client.memory.generation

    def change() -> None:
        region = rig.memory.regions()[0]
        assert region.file is not None
        rig.memory.map(RAM, RAM, readable=True, writable=True, file=region.file.retain(), offset=0)
        rig.mapper.add_map(MappingInfo(0x80000, RAM + PAGE, PAGE, RW))

    house.thread.call(change)
    client.export(0x80000, 1)
    assert client.memory.generation > generation
    client.memory.write(PAGE, b"alias")
    assert client.memory.read(RAM + PAGE, 5) == b"alias"
    event.close()


def test_a_fault_arrives_and_the_unmap_waits(house: House) -> None:
    client = house.client
    event = client.start_export_session()
    client.export(0x10000, PAGE)
    resolution = house.call(lambda: house.rig.unmap(0x10000, 4 * PAGE))
    assert resolution is not None

    assert event.is_set()
    with pytest.raises(SessionFaulted):
        client.export(0x10000, PAGE)
    with pytest.raises(SessionFaulted):
        client.start_export_session()
    client.release(0x10000, PAGE)
    assert house.call(resolution.is_set)
    client.start_export_session().close()
    event.close()


def test_a_translation_fault_is_one_here_too(house: House) -> None:
    event = house.client.start_export_session()
    with pytest.raises(TranslationFault) as caught:
        house.client.export(0x13000, 2 * PAGE)

    assert caught.value.iova == 0x14000
    assert house.exported == 0
    event.close()


@pytest.mark.parametrize(
    ("iova", "size", "error"),
    [
        (-1, 1, UsageError),
        (1 << 64, 1, UsageError),
        (0x10000, 0, UsageError),
        (0, 1 << 64, UsageError),
        (0x10000, 1, ExportError),
    ],
)
def test_what_can_not_be_exported(
    house: House, iova: int, size: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        house.client.export(iova, size)


def test_a_release_must_match(house: House) -> None:
    event = house.client.start_export_session()
    house.client.export(0x10000, 8)
    with pytest.raises(ExportError, match="is not exported"):
        house.client.release(0x10000, 9)
    house.client.release(0x10000, 8)
    with pytest.raises(ExportError, match="is not exported"):
        house.client.release(0x10000, 8)
    assert house.client.held == 0
    assert house.exported == 0
    event.close()


def test_an_export_of_many_regions(house: House) -> None:
    count = 2 * protocol.REGIONS_A_PACKET + 1

    def map_all() -> None:
        for number in range(count):
            house.rig.map(0x1000_0000 + number * PAGE, 2 * number * PAGE, PAGE)

    house.thread.call(map_all)
    event = house.client.start_export_session()
    regions = house.client.export(0x1000_0000, count * PAGE)

    assert regions == [MemRegion(2 * number * PAGE, PAGE, RW) for number in range(count)]
    event.close()


def test_reports_go_to_the_guest(house: House) -> None:
    house.client.report_fault(TranslationFault(0x90000, Access.WRITE))
    house.client.report_fault(TranslationFault(1 << 64, Access.WRITE))
    house.client.report_fault(TranslationFault(0x10000, Access.WRITE))

    faults = house.call(lambda: list(house.rig.faults))
    assert [(fault.iova, fault.access) for fault in faults] == [(0x90000, Access.WRITE)]


def test_the_server_says_what_it_allows(house: House) -> None:
    assert house.client.server.major == 1
    assert house.client.server.max_exports == 1 << 14


def test_memory_that_goes_is_let_go_of(house: House) -> None:
    client = house.client
    client.refresh_memory()
    assert len(client.memory.regions()) == 1
    client.attend()

    house.thread.call(house.rig.memory.unmap_all)
    assert select.select([client], [], [], 30)[0]
    client.attend()
    assert client.memory.regions() == []
    assert len(client._files) == 0


def test_a_note_that_comes_before_an_answer_is_taken(house: House) -> None:
    client = house.client
    event = client.start_export_session()
    client.export(0x10000, 1)
    house.thread.call(house.rig.memory.unmap_all)
    client.export(0x10000, 2)

    assert client.memory.regions() == []
    event.close()


# -- under an endpoint's port


@pytest.fixture
def dma(house: House) -> Iterator[EndpointDma]:
    loop = Loop()
    client = house.client
    dma = EndpointDma(client, client.memory, client.report_fault, loop)
    dma.enabled = True
    yield dma
    if client.fileno() >= 0:
        dma.close()
    loop.close()


def test_an_endpoint_reads_and_writes(house: House, dma: EndpointDma) -> None:
    dma.write(0x10000, b"by the device")
    assert house.call(lambda: house.rig.memory.read(0x4000, 13)) == b"by the device"
    assert dma.read(0x10003, 3) == b"the"
    assert house.exported == 0


def test_an_endpoint_that_strays_is_reported_by_the_server(house: House, dma: EndpointDma) -> None:
    house.thread.call(lambda: house.rig.map(0x60000, 0, PAGE, Access.READ))
    with pytest.raises(TranslationFault):
        dma.read(0x90000, 4)
    with pytest.raises(TranslationFault):
        dma.write(0x60010, b"x")

    faults = house.call(lambda: [(f.iova, f.access) for f in house.rig.faults])
    assert faults == [(0x90000, Access.READ), (0x60010, Access.WRITE)]
    assert dma.blocked == 2
    assert house.exported == 0


def test_what_is_mapped_to_no_memory_is_not_held(house: House, dma: EndpointDma) -> None:
    house.thread.call(lambda: house.rig.map(0x60000, 0xF000_0000, PAGE))

    with pytest.raises(GuestMemoryError):
        dma.read(0x60000, 4)
    with pytest.raises(GuestMemoryError):
        dma.views(0x60000, 4, write=True)
    assert house.exported == 0


def test_an_endpoint_lets_go_when_the_guest_unmaps(house: House, dma: EndpointDma) -> None:
    (view,) = dma.views(0x10000, PAGE, write=True)
    assert house.exported == 1
    resolution = house.call(lambda: house.rig.unmap(0x10000, 4 * PAGE))
    assert resolution is not None
    dma._loop.turn(0)

    assert house.call(resolution.is_set)
    view[0] = 1  # harmless: it is not the guest's any more, but it is there
    house.thread.call(lambda: house.rig.map(0x10000, 0, PAGE))
    assert dma.read(0x10000, 1) == b"\0"


def test_a_fault_that_the_loop_has_not_seen_yet(house: House, dma: EndpointDma) -> None:
    dma.views(0x10000, PAGE, write=False)
    house.call(lambda: house.rig.unmap(0x10000, 4 * PAGE))
    house.thread.call(lambda: house.rig.map(0x20000, 0, PAGE))

    assert dma.read(0x20000, 1) == b"\0"


# -- the end


def test_a_server_that_goes_is_a_fault_and_an_error(house: House) -> None:
    lost: list[str] = []
    house.client._on_lost = lost.append
    event = house.client.start_export_session()
    house.client.export(0x10000, 8)
    house.thread.call(house.rig.server.close)

    assert event.is_set()
    with pytest.raises(ExportError, match="is gone"):
        house.client.export(0x10000, 8)
    house.client.release(0x10000, 8)  # it is released already
    house.client.report_fault(TranslationFault(0x90000, Access.WRITE))
    with pytest.raises(ExportError, match="is closed"):
        house.client.start_export_session()
    assert len(lost) == 1
    assert house.client.fileno() == -1
    event.close()


def test_attending_finds_out_that_the_server_is_gone(house: House) -> None:
    house.thread.call(house.rig.server.close)
    with pytest.raises(ExportError, match="is gone"):
        house.client.attend()
    house.client.attend()


def test_to_tell_a_server_that_is_gone_is_no_error(house: House) -> None:
    house.client.start_export_session().close()
    house.client.export(0x10000, 8)
    house.thread.call(house.rig.server.close)
    house.client.release(0x10000, 8)

    assert house.client.fileno() == -1


def test_leaving_says_why(house: House) -> None:
    house.client.leave("no disk")
    house.client.leave("twice")

    assert house.call(lambda: list(house.rig.gone)) == ["closed by the client (no disk)"]


def test_the_end_of_the_block_releases_everything(house: House) -> None:
    with house.client as client:
        client.start_export_session().close()
        client.export(0x10000, 8)
    assert client.memory.regions() == []
    assert house.exported == 0


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(PeerError) as caught:
        ExportClient(tmp_path / "nobody")
    assert caught.value.errno == errno.ENOENT


# -- servers that are none


class Impostor:
    """Answers each request with the next list of packets, whatever was asked; or not at all."""

    def __init__(self, *answers: list[bytes], fds: Sequence[int] = ()) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.answers = list(answers)
        self.fds = fds
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self.ours:
            while data := receive(self.ours, 1 << 16).data:
                _, _, ident = protocol.HEADER.unpack_from(data)
                for packet in self.answers.pop(0) if self.answers else ():
                    kind, error, _ = protocol.HEADER.unpack_from(packet)
                    head = protocol.HEADER.pack(kind, error, ident)
                    fds = () if kind == 0x8000 | Kind.HELLO else self.fds
                    send(self.ours, head + packet[len(head) :], fds)

    def close(self) -> None:
        self.theirs.close()
        self.thread.join()


def answer(kind: Kind, body: bytes = b"", error: int = 0) -> bytes:
    return protocol.HEADER.pack(kind | 0x8000, error, 0) + body


WELCOME = answer(Kind.HELLO, protocol.WELCOME.pack(1, 0, 10, 1 << 20, 1))
NO_REGION = answer(Kind.EXPORT, protocol.encode_regions([], 1, 5))
ONE_REGION = answer(Kind.EXPORT, protocol.encode_regions([MemRegion(0, 1, RW)], 1, 5))
EXPORTED = answer(Kind.EXPORT, protocol.encode_regions([MemRegion(0, 1, RW)], 1, 0))
SPAN = protocol.Span(0, PAGE, 0, protocol.FILE_NONE, Access.READ)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (answer(Kind.HELLO, protocol.WELCOME.pack(2, 0, 10, 1 << 20, 1)), errno.EPROTONOSUPPORT),
        (answer(Kind.HELLO, b"?"), errno.EPROTO),
        (answer(Kind.HELLO, b"go away", errno.EBUSY), errno.ECONNREFUSED),
        (answer(Kind.START), errno.ECONNREFUSED),
    ],
)
def test_a_greeting_that_is_none(said: bytes, number: int) -> None:
    impostor = Impostor([said])
    with pytest.raises(PeerError) as caught:
        ExportClient(impostor.theirs)
    impostor.close()
    assert caught.value.errno == number


@pytest.mark.parametrize(
    "said",
    [
        [answer(Kind.START)],
        [answer(Kind.EXPORT, b"short")],
        [answer(Kind.EXPORT, b"", errno.EFAULT)],
        [bytes(8)],
        [NO_REGION, NO_REGION],
        [ONE_REGION, ONE_REGION],
        [ONE_REGION, answer(Kind.START)],
    ],
)
def test_answers_to_an_export_that_are_none(said: list[bytes]) -> None:
    impostor = Impostor([WELCOME], said)
    client = ExportClient(impostor.theirs)
    with pytest.raises(ExportError, match="is gone"):
        client.export(0x1000, 1)
    assert client.fileno() == -1
    impostor.close()


def test_a_session_without_an_event_is_none() -> None:
    impostor = Impostor([WELCOME], [answer(Kind.START)])
    client = ExportClient(impostor.theirs)
    with pytest.raises(ExportError, match="0 events"):
        client.start_export_session()
    impostor.close()


def test_file_descriptors_that_were_not_asked_for_end_the_connection() -> None:
    impostor = Impostor([WELCOME], [EXPORTED], fds=[0])
    client = ExportClient(impostor.theirs)
    with pytest.raises(ExportError, match="file descriptors"):
        client.export(0x1000, 1)
    impostor.close()


def test_memory_that_can_not_be_had_lets_go_of_the_export() -> None:
    listed = answer(Kind.MEMORY, protocol.encode_spans([SPAN, SPAN._replace(gpa=1)], 1, 0))
    impostor = Impostor([WELCOME], [EXPORTED], [listed])
    client = ExportClient(impostor.theirs)
    with pytest.raises(ExportError, match="can't be mapped"):
        client.export(0x1000, 1)
    assert client.held == 0
    client.close()
    impostor.close()


def test_what_was_not_asked_for_ends_the_connection() -> None:
    impostor = Impostor([WELCOME])
    client = ExportClient(impostor.theirs)
    send(impostor.ours, answer(Kind.START))
    with pytest.raises(ExportError, match="not asked for"):
        client.attend()
    impostor.close()


def test_a_list_of_memory_that_ends_nowhere() -> None:
    listed = answer(Kind.MEMORY, protocol.encode_spans([], 1, 3))
    impostor = Impostor([WELCOME], [listed])
    client = ExportClient(impostor.theirs)
    with pytest.raises(ExportError, match="a list without 3 pieces"):
        client.refresh_memory()
    impostor.close()


def test_a_list_that_changes_is_read_again() -> None:
    def page(generation: int, gpa: int, left: int) -> list[bytes]:
        spans = [SPAN._replace(gpa=gpa)]
        return [answer(Kind.MEMORY, protocol.encode_spans(spans, generation, left))]

    impostor = Impostor([WELCOME], page(1, 0, 1), page(2, PAGE, 0), page(3, 0, 1), page(3, PAGE, 0))
    client = ExportClient(impostor.theirs)
    client.refresh_memory()
    assert [region.gpa for region in client.memory.regions()] == [0, PAGE]

    impostor.answers = [page(n, 0, 1) for n in range(1000)]
    with pytest.raises(ExportError, match="has changed 100 times"):
        client.refresh_memory()
    client.close()
    impostor.close()


def test_a_server_that_does_not_answer() -> None:
    impostor = Impostor([WELCOME])
    client = ExportClient(impostor.theirs, timeout=5)
    client.timeout = 0.01
    with pytest.raises(ExportError, match=r"no answer for 0\.01 s"):
        client.export(0x1000, 1)
    impostor.close()


def test_a_server_that_does_not_read() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    send(ours, protocol.HEADER.pack(Kind.HELLO | 0x8000, 0, 1) + WELCOME[8:])
    client = ExportClient(theirs)
    client.timeout = 0.01
    client._held[0, 1] = 1_000_000
    while client.fileno() >= 0:
        client.release(0, 1)
    ours.close()
