"""What depends on how buffers are laid out, tried on real rings (virtio 1.2, 2.7.4.1)."""
# ruff: noqa: N802 - a test is named after its row: MF1, not mf1

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.conftest import A, B
from tests.conformance.rig import READABLE, Reply, attach, detach, map_, probe, unmap
from tests.virtio.harness import RecordingTransport
from viommu.errors import Access, TranslationFault
from viommu.loop import Loop
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import RequestType, Status
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout
from viommu.virtio.iommu import VirtioIommuDevice
from viommu.virtio.ring import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.record import Clause
    from tests.conformance.rig import Rig

SIZE = 64
BUFFERS = 0x8000
TABLE = 0x20000
UNTOUCHED = 0xEE


class Rings:
    """The two queues of a device, driven through their rings."""

    def __init__(self, rig: Rig, loop: Loop) -> None:
        self.transport = RecordingTransport()
        self.memory = PieceMemory(0x40000)
        self.device = VirtioIommuDevice(rig.iommu, loop)
        layouts = RingLayout.at(0, SIZE), RingLayout.at(0x4000, SIZE)
        self.requests, self.events = (DriverQueue(self.memory, SIZE, each) for each in layouts)
        self.device.start(
            self.transport,
            rig.iommu.features,
            [
                SplitQueue(
                    self.memory,
                    index,
                    SIZE,
                    layout.desc,
                    layout.avail,
                    layout.used,
                    event_idx=False,
                    indirect=True,
                )
                for index, layout in enumerate(layouts)
            ],
        )

    def request(
        self, request: bytes, writable: int, piece: int, *, table: int | None = None
    ) -> Reply:
        """Send a request cut into descriptors of ``piece`` bytes, spread over memory backwards."""
        self.memory.write(BUFFERS, bytes([UNTOUCHED]) * 0x4000)
        pieces, at = [], BUFFERS + 0x4000
        for length, write in ((len(request), False), (writable, True)):
            for start in range(0, length, piece):
                size = min(piece, length - start)
                at -= size + 1
                pieces.append((at, size, write))
                if not write:
                    self.memory.write(at, request[start : start + size])
        self.requests.add(
            [(address, size) for address, size, write in pieces if not write],
            [(address, size) for address, size, write in pieces if write],
            table=table,
        )
        self.requests.publish()
        self.device.notify(spec.REQUEST_QUEUE)
        (used,) = self.requests.collect()
        room = b"".join(self.memory.read(a, size) for a, size, write in pieces if write)
        data, rest = room[: used.length], room[used.length :]
        assert set(rest) <= {UNTOUCHED}
        assert not self.transport.reasons
        return Reply(data, data[-4] if data else None)


@pytest.fixture
def rings(rig: Rig) -> Iterator[Rings]:
    loop = Loop()
    yield Rings(rig, loop)
    loop.close()


REQUESTS = (
    (probe(A), 516),
    (attach(1, A), 4),
    (map_(1, 0x1000, 0x1FFF, 0x8000), 4),
    (map_(1, 0x1000, 0x1FFF, 0x8000), 4),
    (unmap(1, 0x1000, 0x1FFF), 4),
    (detach(2, A), 4),
    (detach(1, A), 4),
    (probe(1), 516),
    (b"\x09" + bytes(35), 4),
)
STATUSES = [
    Status.OK,
    Status.OK,
    Status.OK,
    Status.INVAL,
    Status.OK,
    Status.INVAL,
    Status.OK,
    Status.NOENT,
    None,
]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 16, 4096])
@pytest.mark.parametrize("indirect", [False, True])
def test_MF1_the_cut_makes_no_difference(
    rings: Rings, clause: Clause, piece: int, indirect: bool
) -> None:
    whole = replies_to_all(rings, 4096, indirect=False)
    assert [reply.status for reply in whole] == STATUSES
    assert replies_to_all(rings, piece, indirect=indirect) == whole
    clause.observed()


def replies_to_all(rings: Rings, piece: int, *, indirect: bool) -> list[Reply]:
    """Send all requests; one that needs more descriptors than the ring has goes by a table."""
    replies = []
    for request, writable in REQUESTS:
        table = TABLE if indirect or (len(request) + writable) // piece >= SIZE - 2 else None
        replies.append(rings.request(request, writable, piece, table=table))
    return replies


def test_MF1_empty_descriptors_count_for_nothing(rings: Rings, clause: Clause) -> None:
    request = attach(1, A)
    rings.memory.write(BUFFERS, request)
    empty = (BUFFERS, 0)
    rings.requests.add(
        [empty, (BUFFERS, 3), empty, (BUFFERS + 3, 17), empty],
        [empty, (BUFFERS + 0x100, 1), empty, (BUFFERS + 0x200, 3)],
    )
    rings.requests.publish()
    rings.device.notify(spec.REQUEST_QUEUE)
    assert [used.length for used in rings.requests.collect()] == [4]
    assert rings.memory.read(BUFFERS + 0x100, 1) == bytes([Status.OK])
    clause.observed()


@pytest.mark.parametrize("piece", [2, 4096])
def test_OP5_the_buffers_of_what_is_not_understood_come_back(
    rings: Rings, clause: Clause, piece: int
) -> None:
    for kind, size in READABLE.items():
        for length in {1, 4, size - 1}:
            clause.rejects(rings.request(bytes([kind]).ljust(length, b"\0"), 4, piece))
        for room in range(4):
            request = bytes([kind]).ljust(size, b"\0")
            clause.rejects(rings.request(request, room, piece))
    clause.accepts(rings.request(attach(1, A), 4, piece))


def test_OP5_a_chain_that_is_only_writable_comes_back(rings: Rings, clause: Clause) -> None:
    clause.rejects(rings.request(b"", 4, 4096))
    clause.accepts(rings.request(attach(1, A), 4, 4096))


def test_XC1_the_used_length_covers_the_status(rings: Rings, clause: Clause) -> None:
    # Linux copies a reply back only when the length is exactly what it asked for.
    for request, writable in REQUESTS:
        if request[0] in set(RequestType):
            assert len(rings.request(request, writable, 4096).data) == writable
    clause.observed()


def offer(rings: Rings, *sizes: int) -> None:
    """Give the device event buffers, each cut in two, without a kick (as Linux does)."""
    for number, size in enumerate(sizes):
        at = BUFFERS + 0x100 * number
        rings.memory.write(at, bytes([UNTOUCHED]) * 0x100)
        half = size // 2
        rings.events.add([], [(at, half), (at + 0x80, size - half)])
    rings.events.publish()


def report(rings: Rings, number: int, size: int = 24) -> spec.Fault:
    """Return what is in an event buffer, and assert that what follows is untouched."""
    at = BUFFERS + 0x100 * number
    data = rings.memory.read(at, size // 2) + rings.memory.read(at + 0x80, size - size // 2)
    assert set(data[24:]) <= {UNTOUCHED}
    return spec.Fault.from_buffer_copy(data)


@pytest.mark.parametrize("small", [1, 8, 23])
def test_FR5_a_report_is_not_spread_over_buffers(
    rings: Rings, rig: Rig, clause: Clause, small: int
) -> None:
    assert rings.request(attach(1, A), 4, 4096).status == Status.OK
    offer(rings, small, 2, 24)
    rig.iommu.report_fault(A, TranslationFault(0x1234, Access.WRITE))
    assert [used.length for used in rings.events.collect()] == [0, 0, 24]
    for number, size in ((0, small), (1, 2)):
        half = size // 2
        at = BUFFERS + 0x100 * number
        assert set(rings.memory.read(at, half or 1)) == {UNTOUCHED}
        assert set(rings.memory.read(at + 0x80, size - half)) == {UNTOUCHED}
    clause.rejected()
    fault = report(rings, 2)
    assert (fault.endpoint, fault.address) == (A, 0x1234)
    assert not rings.transport.reasons
    clause.accepted()


def test_FR5_a_larger_buffer_is_filled_no_further(rings: Rings, rig: Rig, clause: Clause) -> None:
    assert rings.request(attach(1, A), 4, 4096).status == Status.OK
    offer(rings, 100, 24, 24)
    for address in (0x1000, 0x2000):
        rig.iommu.report_fault(B, TranslationFault(address, Access.READ))
    assert [used.length for used in rings.events.collect()] == [24, 24]
    assert report(rings, 0, 100).address == 0x1000
    assert report(rings, 1).address == 0x2000
    clause.accepted()


def test_FR4_reports_wait_for_buffers(rings: Rings, rig: Rig, clause: Clause) -> None:
    assert rings.request(attach(1, A), 4, 4096).status == Status.OK
    rig.iommu.report_fault(A, TranslationFault(0x1000, Access.READ))
    assert rings.events.collect() == []
    offer(rings, 24)
    rings.device.notify(spec.EVENT_QUEUE)
    assert [used.length for used in rings.events.collect()] == [24]
    clause.observed()
