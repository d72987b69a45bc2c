from __future__ import annotations

import errno
import logging
import os
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.endpoints.rig import MEMORY_KINDS, PAGE, RAM_SIZE, Rig, make_rig
from viommu.endpoints import disk_file
from viommu.endpoints.blk_requests import BlkLimits, BlkRequests, _cut
from viommu.endpoints.disk_file import DiskFile
from viommu.errors import Access, GuestMemoryError
from viommu.spec.virtio_blk import HEADER, SEGMENT, RequestType, Status
from viommu.virtio.ring import Chain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISK_SIZE = 1 << 20
SECTORS = DISK_SIZE // 512
IOVA = 0x4000_0000
LIMITS = BlkLimits(
    segment_size=0x4000,
    segments=4,
    discard_sectors=64,
    discard_segments=2,
    zero_sectors=32,
    zero_segments=2,
)
OPTIONAL = frozenset({RequestType.DISCARD, RequestType.WRITE_ZEROES})

# Where a request keeps its parts, as offsets from IOVA and from GPA 0 alike.
HEADER_AT = 0
STATUS_AT = 0x40
DATA_AT = PAGE
UNTOUCHED = 0xEE


class Bench(NamedTuple):
    rig: Rig
    path: Path
    disk: DiskFile
    requests: BlkRequests

    def chain(
        self,
        kind: int,
        sector: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
    ) -> Chain:
        """Lay a request out in guest memory."""
        memory = self.rig.memory
        memory.write(HEADER_AT, HEADER.pack(kind, sector))
        memory.write(STATUS_AT, bytes([UNTOUCHED]))
        memory.write(DATA_AT, out + bytes([UNTOUCHED]) * room)
        readable = [(IOVA + HEADER_AT, HEADER.size)]
        if out:
            readable.append((IOVA + DATA_AT, len(out)))
        writable = [(IOVA + DATA_AT, room)] if room else []
        writable.append((IOVA + STATUS_AT, 1))
        return Chain(0, readable, writable, HEADER.size + len(out), room + 1)

    def run(self, chain: Chain) -> tuple[int, int]:
        """Carry a request out; return its status and used length."""
        used = self.requests.handle(chain)
        assert self.rig.exports == 0
        return self.status, used

    @property
    def status(self) -> int:
        return self.rig.memory.read(STATUS_AT, 1)[0]

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture(params=MEMORY_KINDS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with make_rig(request.param) as rig:
        rig.map(IOVA, 0, RAM_SIZE // 2)
        yield rig


@pytest.fixture
def bench(rig: Rig, tmp_path: Path) -> Iterator[Bench]:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    disk = DiskFile(path)
    requests = BlkRequests(disk, rig.dma, b"serial-1", LIMITS)
    requests.configure(write_through=False, optional=OPTIONAL)
    yield Bench(rig, path, disk, requests)
    disk.close()


def test_reads_sectors(bench: Bench) -> None:
    chain = bench.chain(RequestType.IN, 3, room=1024)
    assert bench.run(chain) == (Status.OK, 1025)
    assert bench.rig.memory.read(DATA_AT, 1024) == bench.content[3 * 512 : 5 * 512]


def test_writes_sectors(bench: Bench) -> None:
    before, data = bench.content, os.urandom(1024)
    assert bench.run(bench.chain(RequestType.OUT, SECTORS - 2, out=data)) == (Status.OK, 1)
    assert bench.content == before[:-1024] + data


def test_a_request_may_lie_in_any_pieces(bench: Bench) -> None:
    chain = bench.chain(RequestType.IN, 7, room=1024)
    start = IOVA + HEADER_AT
    chain.readable = [(start, 1), (start + 1, 7), (start + 8, 8)]
    chain.writable = [
        (IOVA + DATA_AT, 100),
        (IOVA + DATA_AT + 2 * PAGE, 412),
        (IOVA + DATA_AT + 512, 512),
        (IOVA + STATUS_AT, 1),
    ]
    assert bench.run(chain) == (Status.OK, 1025)
    read = bench.rig.memory.read
    content = bench.content[7 * 512 : 9 * 512]
    assert read(DATA_AT, 100) == content[:100]
    assert read(DATA_AT + 2 * PAGE, 412) == content[100:512]
    assert read(DATA_AT + 512, 512) == content[512:]


def test_header_data_and_status_may_share_descriptors(bench: Bench) -> None:
    data = os.urandom(512)
    bench.rig.memory.write(DATA_AT, HEADER.pack(RequestType.OUT, 1) + data)
    chain = Chain(0, [(IOVA + DATA_AT, 528)], [(IOVA + STATUS_AT, 1)], 528, 1)
    assert bench.run(chain) == (Status.OK, 1)
    assert bench.content[512:1024] == data

    bench.rig.memory.write(HEADER_AT, HEADER.pack(RequestType.IN, 1))
    chain = Chain(0, [(IOVA + HEADER_AT, 16)], [(IOVA + 2 * PAGE, 513)], 16, 513)
    assert bench.requests.handle(chain) == 513
    assert bench.rig.memory.read(2 * PAGE, 513) == data + b"\0"


def test_flush_and_get_id(bench: Bench) -> None:
    assert bench.run(bench.chain(RequestType.FLUSH)) == (Status.OK, 1)
    assert bench.run(bench.chain(RequestType.GET_ID, room=20)) == (Status.OK, 21)
    assert bench.rig.memory.read(DATA_AT, 20) == b"serial-1".ljust(20, b"\0")


@pytest.mark.parametrize(("room", "used"), [(8, 9), (24, 20)])
def test_get_id_with_a_buffer_of_another_size(bench: Bench, room: int, used: int) -> None:
    assert bench.run(bench.chain(RequestType.GET_ID, room=room)) == (Status.OK, used)
    expected = b"serial-1".ljust(20, b"\0")[:room] + bytes([UNTOUCHED]) * (room - 20)
    assert bench.rig.memory.read(DATA_AT, room) == expected


@pytest.mark.parametrize(
    ("kind", "unmap"),
    [(RequestType.DISCARD, 0), (RequestType.WRITE_ZEROES, 0), (RequestType.WRITE_ZEROES, 1)],
)
def test_segments_read_as_zeroes_afterwards(bench: Bench, kind: int, unmap: int) -> None:
    before = bench.content
    segments = SEGMENT.pack(8, 8, unmap) + SEGMENT.pack(SECTORS - 1, 1, unmap)
    assert bench.run(bench.chain(kind, out=segments)) == (Status.OK, 1)
    assert bench.content == before[:4096] + bytes(4096) + before[8192:-512] + bytes(512)


@pytest.mark.parametrize(
    ("kind", "sector", "room"),
    [
        (RequestType.IN, SECTORS, 512),
        (RequestType.IN, SECTORS - 1, 1024),
        (RequestType.IN, 2**64 - 1, 512),
        (RequestType.IN, 2**55, 512),
        (RequestType.IN, 0, 511),
        (RequestType.IN, 0, 513),
        (RequestType.IN, 0, 0x10200),
    ],
)
def test_a_bad_read_is_an_io_error_and_writes_no_data(
    bench: Bench, kind: int, sector: int, room: int
) -> None:
    assert bench.run(bench.chain(kind, sector, room=room)) == (Status.IOERR, 0)
    assert bench.rig.memory.read(DATA_AT, room) == bytes([UNTOUCHED]) * room


@pytest.mark.parametrize(
    ("sector", "size"),
    [(SECTORS, 512), (SECTORS - 1, 1024), (2**64 - 1, 512), (0, 511), (0, 0x10200)],
)
def test_a_bad_write_is_an_io_error_and_changes_nothing(
    bench: Bench, sector: int, size: int
) -> None:
    before = bench.content
    chain = bench.chain(RequestType.OUT, sector, out=bytes(size))
    assert bench.run(chain) == (Status.IOERR, 1)
    assert bench.content == before


@pytest.mark.parametrize(
    ("kind", "segments", "status"),
    [
        (RequestType.DISCARD, b"", Status.IOERR),
        (RequestType.DISCARD, bytes(15), Status.IOERR),
        (RequestType.DISCARD, bytes(3 * 16), Status.IOERR),
        (RequestType.DISCARD, SEGMENT.pack(0, 65, 0), Status.IOERR),
        (RequestType.DISCARD, SEGMENT.pack(SECTORS - 1, 2, 0), Status.IOERR),
        (RequestType.DISCARD, SEGMENT.pack(2**64 - 1, 1, 0), Status.IOERR),
        (RequestType.DISCARD, SEGMENT.pack(0, 1, 1), Status.UNSUPP),
        (RequestType.DISCARD, SEGMENT.pack(0, 1, 2), Status.UNSUPP),
        (RequestType.WRITE_ZEROES, SEGMENT.pack(0, 33, 0), Status.IOERR),
        (RequestType.WRITE_ZEROES, SEGMENT.pack(0, 1, 1 << 31), Status.UNSUPP),
        (
            RequestType.WRITE_ZEROES,
            SEGMENT.pack(0, 1, 0) + SEGMENT.pack(SECTORS, 1, 0),
            Status.IOERR,
        ),
    ],
)
def test_bad_segments_change_nothing(
    bench: Bench, kind: int, segments: bytes, status: Status
) -> None:
    before = bench.content
    assert bench.run(bench.chain(kind, out=segments)) == (status, 1)
    assert bench.content == before


@pytest.mark.parametrize("kind", [2, 3, 10, 14, 99, 0x8000_0000])
def test_an_unknown_request_is_unsupported(bench: Bench, kind: int) -> None:
    assert bench.run(bench.chain(kind)) == (Status.UNSUPP, 1)
    assert bench.run(bench.chain(kind, room=512)) == (Status.UNSUPP, 0)


@pytest.mark.parametrize("kind", [RequestType.DISCARD, RequestType.WRITE_ZEROES])
def test_what_was_not_negotiated_is_unsupported(bench: Bench, kind: int) -> None:
    bench.requests.configure(write_through=False, optional=frozenset())
    before = bench.content
    assert bench.run(bench.chain(kind, out=SEGMENT.pack(0, 1, 0))) == (Status.UNSUPP, 1)
    assert bench.content == before


def test_a_short_header_is_an_io_error(bench: Bench) -> None:
    chain = bench.chain(RequestType.FLUSH)
    chain.readable, chain.readable_size = [(IOVA, 15)], 15
    assert bench.run(chain) == (Status.IOERR, 1)
    chain = bench.chain(RequestType.FLUSH)
    chain.readable, chain.readable_size = [], 0
    assert bench.run(chain) == (Status.IOERR, 1)


def test_without_room_for_a_status_nothing_is_done(bench: Bench) -> None:
    before = bench.content
    chain = bench.chain(RequestType.OUT, out=bytes(512))
    chain.writable, chain.writable_size = [], 0
    assert bench.run(chain) == (UNTOUCHED, 0)
    assert bench.content == before


class Stray(NamedTuple):
    """A request of which a part is not where the device may reach it."""

    kind: RequestType
    mapped: Access | None  # of the page with the data; None: not mapped at all
    expected: Access  # in the report


@pytest.mark.parametrize(
    "stray",
    [
        Stray(RequestType.IN, None, Access.WRITE),
        Stray(RequestType.IN, Access.READ, Access.WRITE),
        Stray(RequestType.OUT, None, Access.READ),
        Stray(RequestType.OUT, Access.WRITE, Access.READ),
        Stray(RequestType.GET_ID, Access.READ, Access.WRITE),
        Stray(RequestType.DISCARD, None, Access.READ),
    ],
)
def test_a_stray_buffer_is_an_io_error_and_a_report(bench: Bench, stray: Stray) -> None:
    rig, before = bench.rig, bench.content
    rig.unmap(IOVA, RAM_SIZE // 2)
    rig.map(IOVA, 0, PAGE)
    if stray.mapped is not None:
        rig.map(IOVA + PAGE, PAGE, PAGE, stray.mapped)
    reads = stray.kind in (RequestType.IN, RequestType.GET_ID)
    chain = bench.chain(stray.kind, room=512 if reads else 0, out=b"" if reads else bytes(512))
    if stray.kind is RequestType.DISCARD:
        chain.readable[-1] = (IOVA + DATA_AT, 16)
        chain.readable_size = 32
    assert bench.run(chain) == (Status.IOERR, 0 if reads else 1)
    assert [(f.iova, f.access) for f in rig.faults] == [(IOVA + DATA_AT, stray.expected)]
    assert bench.content == before
    if reads:
        assert rig.memory.read(DATA_AT, 512) == bytes([UNTOUCHED]) * 512


def test_no_byte_moves_when_only_the_last_piece_strays(bench: Bench) -> None:
    before = bench.content
    chain = bench.chain(RequestType.OUT, out=bytes(1024))
    chain.readable[-1:] = [(IOVA + DATA_AT, 512), (IOVA + RAM_SIZE, 512)]
    assert bench.run(chain) == (Status.IOERR, 1)
    assert bench.content == before
    assert [f.iova for f in bench.rig.faults] == [IOVA + RAM_SIZE]


def test_a_buffer_that_is_not_memory_is_an_io_error_without_a_report(bench: Bench) -> None:
    bench.rig.map(IOVA + RAM_SIZE, RAM_SIZE + PAGE, PAGE)
    chain = bench.chain(RequestType.IN, room=512)
    chain.writable[0] = (IOVA + RAM_SIZE, 512)
    assert bench.run(chain) == (Status.IOERR, 0)
    assert not bench.rig.faults


@pytest.mark.parametrize("part", ["header", "status"])
def test_a_stray_header_or_status_gives_the_chain_back_unused(bench: Bench, part: str) -> None:
    before = bench.content
    chain = bench.chain(RequestType.OUT, out=bytes(512))
    if part == "header":
        chain.readable[0] = (0x1000, HEADER.size)
    else:
        chain.writable[-1] = (0x1000, 1)
    assert bench.run(chain) == (UNTOUCHED, 0)
    assert [f.iova for f in bench.rig.faults] == [0x1000]
    assert bench.content == before


def test_a_read_only_disk_refuses_writes(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    disk = DiskFile(path, read_only=True)
    try:
        bench = Bench(rig, path, disk, BlkRequests(disk, rig.dma, b"", LIMITS))
        before = bench.content
        chain = bench.chain(RequestType.OUT, out=bytes(512))
        assert bench.run(chain) == (Status.IOERR, 1)
        assert bench.content == before
        assert bench.run(bench.chain(RequestType.IN, room=512)) == (Status.OK, 513)
        assert bench.run(bench.chain(RequestType.FLUSH)) == (Status.OK, 1)
    finally:
        disk.close()


def test_host_errors_are_io_errors_and_logged_once_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, mode: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_file, "_fallocate", full)
    segment = SEGMENT.pack(0, 1, 0)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            chain = bench.chain(RequestType.WRITE_ZEROES, out=segment)
            assert bench.run(chain) == (Status.IOERR, 1)
        os.truncate(bench.path, 512)
        assert bench.run(bench.chain(RequestType.IN, 1, room=512)) == (Status.IOERR, 0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{bench.path}: I/O error: No space left on device",
        f"{bench.path}: I/O error: the file ends at 0x200, before its size",
    ]


@pytest.mark.parametrize("write_through", [False, True])
def test_without_flush_every_write_is_made_stable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, write_through: bool
) -> None:
    synced: list[int] = []
    fdatasync = os.fdatasync

    def counted(fd: int) -> None:
        synced.append(fd)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    bench.requests.configure(write_through=write_through, optional=OPTIONAL)
    bench.run(bench.chain(RequestType.OUT, out=bytes(512)))
    bench.run(bench.chain(RequestType.WRITE_ZEROES, out=SEGMENT.pack(0, 1, 0)))
    bench.run(bench.chain(RequestType.IN, room=512))
    assert len(synced) == (2 if write_through else 0)
    bench.run(bench.chain(RequestType.FLUSH))
    assert len(synced) == (3 if write_through else 1)


@given(
    pieces=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8),
    offset=st.integers(0, 40),
    size=st.integers(0, 40),
)
def test_cut_names_the_same_bytes(pieces: list[tuple[int, int]], offset: int, size: int) -> None:
    every = [a for address, length in pieces for a in range(address, address + length)]
    cut = _cut(pieces, offset, size)
    assert [a for address, length in cut for a in range(address, address + length)] == every[
        offset : offset + size
    ]
    ends = [address + length for address, length in cut]
    assert all(end != start for end, (start, _) in zip(ends, cut[1:], strict=False))


@pytest.mark.parametrize("rig", ["by message"], indirect=True)
def test_data_that_the_vmm_does_not_take_is_an_io_error(bench: Bench) -> None:
    """It is written when the exports are released, so that must come before the status."""
    chain = bench.chain(RequestType.IN, room=512)
    bench.rig.port.refused = range(DATA_AT, DATA_AT + 1)
    assert bench.run(chain) == (Status.IOERR, 0)


@pytest.mark.parametrize("rig", ["by message"], indirect=True)
def test_data_that_the_vmm_does_not_give_is_an_io_error(bench: Bench) -> None:
    before = bench.content
    chain = bench.chain(RequestType.OUT, out=bytes(512))
    bench.rig.port.refused = range(DATA_AT + 511, DATA_AT + 512)
    assert bench.run(chain) == (Status.IOERR, 1)
    assert bench.content == before


@pytest.mark.parametrize("rig", ["by message"], indirect=True)
def test_a_status_that_the_vmm_does_not_take_is_unreachable_memory(bench: Bench) -> None:
    chain = bench.chain(RequestType.FLUSH)
    bench.rig.port.refused = range(STATUS_AT, STATUS_AT + 1)
    with pytest.raises(GuestMemoryError):  # which the runner gives back as nothing written
        bench.run(chain)
    assert bench.rig.exports == 0
    assert bench.status == UNTOUCHED


@given(data=st.data())
def test_random_requests_never_raise_or_leak(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    address = st.one_of(st.integers(IOVA, IOVA + 4 * PAGE), st.integers(0, 2**64 - 1))
    piece = st.tuples(address, st.integers(1, 3 * PAGE))
    pieces = st.lists(piece.map(lambda p: (p[0], min(p[1], 2**64 - p[0]))), max_size=4)
    path = tmp_path_factory.getbasetemp() / "random.img"
    path.write_bytes(bytes(4096))
    kinds = st.sampled_from(MEMORY_KINDS)
    with closing(DiskFile(path)) as disk, make_rig(data.draw(kinds)) as rig:
        rig.map(IOVA, 0, 2 * PAGE)
        rig.map(IOVA + 2 * PAGE, 3 * PAGE, PAGE, Access.READ)
        rig.map(IOVA + 3 * PAGE, RAM_SIZE, PAGE)
        rig.map(2**64 - PAGE, 8 * PAGE, PAGE)
        kind = data.draw(st.sampled_from([*RequestType, 77]))
        sector = data.draw(st.sampled_from([0, 1, 7, 2**63]))
        rig.memory.write(0, HEADER.pack(kind, sector) * (PAGE // HEADER.size))
        requests = BlkRequests(disk, rig.dma, b"", LIMITS)
        requests.configure(write_through=False, optional=OPTIONAL)
        readable, writable = data.draw(pieces), data.draw(pieces)
        sizes = [sum(size for _, size in part) for part in (readable, writable)]
        used = requests.handle(Chain(0, readable, writable, *sizes))
        assert 0 <= used <= sizes[1]
        assert rig.exports == 0
        assert path.stat().st_size == 4096
