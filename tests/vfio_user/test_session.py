"""What each command answers on the wire; names are those of libvfio-user's own tests."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user import register_bank
from tests.vfio_user.conftest import HELLO, PAGE, Peer, open_fds
from tests.vfio_user.register_bank import BAR, BIG, CONFIG, MAPPABLE, RW, RegisterBank
from viommu.errors import GuestMemoryError
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.vfio_user import Server

EINVAL = errno.EINVAL
TOP = 1 << 64
FILE = 2  # descriptors of a mapped file: the mapping's own, and one to map it elsewhere


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return spec.REGION_ACCESS.pack(offset, region, count) + data


def dma_map(gpa: int, size: int, *, flags: int = 3, offset: int = 0, argsz: int = 32) -> bytes:
    return spec.DMA_MAP.pack(argsz, flags, offset, gpa, size)


def dma_unmap(gpa: int, size: int, *, flags: int = 0, argsz: int = 24) -> bytes:
    return spec.DMA_UNMAP.pack(argsz, flags, gpa, size)


# --- VERSION


@pytest.mark.parametrize(
    ("command", "payload", "size"),
    [
        (Command.VERSION, b"", None),
        (Command.VERSION, spec.VERSION.pack(999, 0), None),
        (Command.VERSION, HELLO + b"{\0", None),
        (999, b"", None),
        (Command.DEVICE_GET_INFO, spec.DEVICE_INFO.pack(16, 0, 0, 0), None),
        (Command.DMA_MAP, dma_map(0, PAGE), None),
        (Command.DEVICE_RESET, b"", None),
        (Command.VERSION, HELLO, 15),
        (Command.VERSION, HELLO, spec.MAX_MESSAGE + 1),
    ],
    ids=[
        "short_write",
        "invalid_major",
        "missing_closing_brace",
        "bad_command",
        "info before version",
        "map before version",
        "reset before version",
        "short_size",
        "long_write",
    ],
)
def test_a_failed_negotiation_closes_the_connection(
    connect: Callable[[], Peer], bank: RegisterBank, command: int, payload: bytes, size: int | None
) -> None:
    peer = connect()
    assert peer.refused(command, payload, size=size) == EINVAL
    assert peer.closed()
    assert bank.irqs is None
    assert bank.departures == 0
    second = connect()  # it keeps listening
    second.ok(Command.VERSION, HELLO)
    assert bank.irqs is not None


def test_a_reply_before_the_version_closes_the_connection(connect: Callable[[], Peer]) -> None:
    peer = connect()
    assert peer.refused(Command.VERSION, HELLO, flags=spec.F_TYPE_REPLY) == EINVAL
    assert peer.closed()


def test_a_posted_version_that_fails_is_not_answered(connect: Callable[[], Peer]) -> None:
    peer = connect()
    peer.post(Command.VERSION, b"", flags=spec.F_NO_REPLY)
    assert peer.closed()


def test_a_second_version_is_refused(peer: Peer) -> None:
    assert peer.refused(Command.VERSION, HELLO) == EINVAL
    assert not peer.closed()


# --- headers


def test_too_small(peer: Peer) -> None:
    assert peer.refused(Command.DEVICE_GET_INFO, size=15) == EINVAL
    assert peer.ok(Command.DEVICE_RESET) == b""


@pytest.mark.parametrize("size", [3, spec.MAX_MESSAGE + 1])
def test_fds_of_an_impossible_message_are_closed(
    peer: Peer, memfd: Callable[..., int], size: int
) -> None:
    fd = memfd()
    before = open_fds()
    assert peer.refused(Command.DMA_MAP, b"", [fd], size=size) == EINVAL
    assert open_fds() <= before


def test_too_large(peer: Peer) -> None:
    assert peer.refused(Command.REGION_WRITE, size=spec.MAX_MESSAGE + 1) == EINVAL
    assert peer.closed()  # the body would be taken for messages


def test_too_large_and_posted(peer: Peer) -> None:
    peer.post(Command.REGION_WRITE, size=spec.MAX_MESSAGE + 1, flags=spec.F_NO_REPLY)
    assert peer.closed()


def test_unsolicited_reply(peer: Peer) -> None:
    assert peer.refused(Command.DMA_READ, b"data", flags=spec.F_TYPE_REPLY) == EINVAL
    assert not peer.closed()


def test_a_type_that_is_neither(peer: Peer) -> None:
    assert peer.refused(Command.DEVICE_RESET, flags=2) == EINVAL


@pytest.mark.parametrize("command", [0, 11, 12, 14, 15, 16, 17, 18, 19, 26, 999, 0xFFFF])
def test_bad_command(peer: Peer, command: int) -> None:
    assert peer.refused(command, bytes(32)) == EINVAL
    assert peer.refused(command) == EINVAL


@pytest.mark.parametrize(
    "command", [c for c in Command if c not in (Command.VERSION, Command.DEVICE_RESET)]
)
def test_no_payload(peer: Peer, command: Command) -> None:
    assert peer.refused(command) == EINVAL


def test_the_error_bit_of_a_command_is_ignored(peer: Peer) -> None:
    message = peer.request(Command.DEVICE_RESET, flags=spec.F_ERROR)
    assert message.flags == spec.F_TYPE_REPLY


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_GET_INFO, spec.DEVICE_INFO.pack(16, 0, 0, 0)),
        (Command.REGION_WRITE, access(0x1000, BAR, 4, b"beef")),
        (Command.REGION_WRITE, access(register_bank.REFUSED, BAR, 4, b"beef")),
        (Command.REGION_WRITE, access(8, BAR, 4, b"beef")),
        (Command.DEVICE_RESET, b""),
        (999, b""),
    ],
    ids=["info", "invalid write", "refused write", "write", "reset", "unknown"],
)
def test_a_posted_command_is_never_answered(peer: Peer, command: int, payload: bytes) -> None:
    peer.post(command, payload, flags=spec.F_NO_REPLY)
    assert peer.receive() is None
    peer.ok(Command.DEVICE_RESET)


def test_bad_request_closes_fds(peer: Peer, eventfd: Callable[..., int]) -> None:
    fds = [eventfd(), eventfd()]
    before = open_fds()
    bad = vfio.IRQ_SET.pack(20, vfio.IRQ_SET_DATA_BOOL | vfio.IRQ_SET_ACTION_TRIGGER, 2, 0, 2)
    assert peer.refused(Command.DEVICE_SET_IRQS, bad, fds) == EINVAL
    assert open_fds() == before


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("command", [Command.DEVICE_RESET, Command.REGION_READ, 999])
def test_fds_nobody_asked_for_are_closed(
    peer: Peer, memfd: Callable[..., int], command: int, count: int
) -> None:
    fd = memfd()
    before = open_fds()
    peer.request(command, access(0, BAR, 4), [fd] * count)
    assert open_fds() == before


def test_too_many_fds_are_refused(peer: Peer, memfd: Callable[..., int]) -> None:
    fd = memfd()
    before = open_fds()
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE), [fd] * 64) == EINVAL
    assert open_fds() == before
    assert peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [fd]) == b""


# --- DEVICE_GET_INFO


def test_device_info(peer: Peer) -> None:
    for argsz in (16, 32):
        reply = peer.ok(Command.DEVICE_GET_INFO, spec.DEVICE_INFO.pack(argsz, 0, 0, 0))
        flags = vfio.DEVICE_FLAGS_PCI | vfio.DEVICE_FLAGS_RESET
        assert spec.DEVICE_INFO.unpack(reply) == (16, flags, 9, 5)


def test_device_info_refused(peer: Peer) -> None:
    assert peer.refused(Command.DEVICE_GET_INFO, bytes(8)) == EINVAL
    assert peer.refused(Command.DEVICE_GET_INFO, spec.DEVICE_INFO.pack(8, 0, 0, 0)) == EINVAL


# --- DEVICE_GET_REGION_INFO


def region_info(index: int, argsz: int = 32) -> bytes:
    return vfio.REGION_INFO.pack(argsz, 0, index, 0, 0, 0)


@pytest.mark.parametrize(
    "payload", [bytes(8), region_info(0, 8), region_info(9), region_info(2**32 - 1)],
    ids=["short_write", "bad_argsz", "bad_index", "wild index"],
)  # fmt: skip
def test_region_info_refused(peer: Peer, payload: bytes) -> None:
    assert peer.refused(Command.DEVICE_GET_REGION_INFO, payload) == EINVAL


@pytest.mark.parametrize("argsz", [32, 40])
def test_region_info(peer: Peer, argsz: int) -> None:
    reply = peer.ok(Command.DEVICE_GET_REGION_INFO, region_info(CONFIG, argsz))
    assert vfio.REGION_INFO.unpack(reply) == (32, RW, CONFIG, 0, 4096, 0)
    # A region that isn't there: 32 bytes, no flags, no capabilities.
    reply = peer.ok(Command.DEVICE_GET_REGION_INFO, region_info(5, argsz))
    assert vfio.REGION_INFO.unpack(reply) == (32, 0, 5, 0, 0, 0)


def test_small_argsz_caps(peer: Peer) -> None:
    reply = peer.ok(Command.DEVICE_GET_REGION_INFO, region_info(MAPPABLE))
    flags = RW | vfio.REGION_INFO_FLAG_MMAP
    assert vfio.REGION_INFO.unpack(reply) == (80, flags, MAPPABLE, 0, 0x8000, 0x8000)


def test_caps(peer: Peer, bank: RegisterBank) -> None:
    message = peer.request(Command.DEVICE_GET_REGION_INFO, region_info(MAPPABLE, 80))
    assert len(message.payload) == 80
    flags = RW | vfio.REGION_INFO_FLAG_MMAP | vfio.REGION_INFO_FLAG_CAPS
    head = vfio.REGION_INFO.unpack_from(message.payload)
    assert head == (80, flags, MAPPABLE, 32, 0x8000, 0x8000)
    assert vfio.SPARSE_MMAP.unpack_from(message.payload, 32) == (1, 1, 0, 2, 0)
    areas = list(vfio.SPARSE_MMAP_AREA.iter_unpack(message.payload[48:]))
    assert areas == [(0, 0x1000), (0x2000, 0x1000)]
    (fd,) = message.fds
    assert os.fstat(fd).st_ino == os.fstat(bank.store).st_ino
    os.close(fd)


# --- DEVICE_GET_REGION_IO_FDS


def test_region_io_fds(peer: Peer) -> None:
    command = Command.DEVICE_GET_REGION_IO_FDS
    for bad in (
        spec.REGION_IO_FDS.pack(16, 1, BAR, 0),
        spec.REGION_IO_FDS.pack(16, 0, BAR, 1),
        spec.REGION_IO_FDS.pack(15, 0, BAR, 0),
        spec.REGION_IO_FDS.pack((1 << 20) + 1, 0, BAR, 0),
        spec.REGION_IO_FDS.pack(16, 0, 5, 0),
        spec.REGION_IO_FDS.pack(16, 0, 512, 0),
        bytes(15),
    ):
        assert peer.refused(command, bad) == EINVAL
    reply = peer.ok(command, spec.REGION_IO_FDS.pack(512, 0, BAR, 0))
    assert spec.REGION_IO_FDS.unpack(reply) == (16, 0, BAR, 0)


# --- DEVICE_GET_IRQ_INFO


def test_irq_info(peer: Peer) -> None:
    for index, count in enumerate((1, 0, 2048, 1, 1)):
        for argsz in (16, 64):
            reply = peer.ok(Command.DEVICE_GET_IRQ_INFO, vfio.IRQ_INFO.pack(argsz, 0, index, 0))
            assert vfio.IRQ_INFO.unpack(reply) == (16, vfio.IRQ_INFO_EVENTFD, index, count)
    for bad in (bytes(8), vfio.IRQ_INFO.pack(8, 0, 0, 0), vfio.IRQ_INFO.pack(16, 0, 5, 0)):
        assert peer.refused(Command.DEVICE_GET_IRQ_INFO, bad) == EINVAL


# --- DEVICE_SET_IRQS (the table of what is refused is in test_irqs.py)


def test_set_irqs(peer: Peer, bank: RegisterBank, eventfd: Callable[..., int]) -> None:
    fd = eventfd()
    flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
    assert peer.ok(Command.DEVICE_SET_IRQS, vfio.IRQ_SET.pack(20, flags, 2, 5, 1), [fd]) == b""
    assert bank.irqs is not None
    assert bank.irqs.vectors(2) == [5]
    peer.ok(Command.REGION_WRITE, access(register_bank.DOORBELL, BAR, 4, b"\5\0\0\0"))
    assert os.eventfd_read(fd) == 1
    assert peer.refused(Command.DEVICE_SET_IRQS, vfio.IRQ_SET.pack(20, flags, 1, 0, 1)) == EINVAL


# --- REGION_READ and REGION_WRITE


def test_regions_are_read_and_written(peer: Peer) -> None:
    head = access(3, BAR, 5)
    assert peer.ok(Command.REGION_WRITE, head + b"hello") == head
    assert peer.ok(Command.REGION_READ, head) == head + b"hello"
    assert peer.ok(Command.REGION_READ, head + b"trailing") == head + b"hello"


@pytest.mark.parametrize("region", [BAR, CONFIG, MAPPABLE])
def test_zero_count(peer: Peer, region: int, bank: RegisterBank) -> None:
    for offset in (0, 16, bank.infos[region].size):
        head = access(offset, region, 0)
        assert peer.ok(Command.REGION_READ, head) == head
        assert peer.ok(Command.REGION_WRITE, head) == head


def test_the_whole_configuration_is_one_message(peer: Peer) -> None:
    assert len(peer.ok(Command.REGION_READ, access(0, CONFIG, 4096))) == 16 + 4096


@pytest.mark.parametrize(
    ("offset", "region", "count"),
    [
        (TOP - 1, BAR, 256),
        (0, BIG, (1 << 20) + 8),
        (0xFFF, BAR, 2),
        (0x1000, BAR, 1),
        (0x1001, BAR, 0),
        (0, BAR, 0x1001),
        (0, 5, 1),
        (0, 5, 0),
        (0, 9, 1),
        (0, 2**32 - 1, 1),
    ],
    ids=[
        "region_offset_overflow",
        "large_count",
        "out of bounds by one",
        "behind",
        "far behind, nothing",
        "larger than the region",
        "zero size",
        "zero size, nothing",
        "bad region",
        "wild region",
    ],
)
def test_what_is_not_in_a_region_is_refused(
    peer: Peer, offset: int, region: int, count: int
) -> None:
    assert peer.refused(Command.REGION_READ, access(offset, region, count)) == EINVAL
    if count <= 1 << 13:
        data = bytes(count)
        assert peer.refused(Command.REGION_WRITE, access(offset, region, count, data)) == EINVAL


@pytest.mark.parametrize("count", [0, 3, 5, 2**32 - 1])
def test_a_write_announces_what_it_brings(peer: Peer, count: int) -> None:
    assert peer.refused(Command.REGION_WRITE, access(0, BAR, count, b"1234")) == EINVAL


def test_short_region_access(peer: Peer) -> None:
    assert peer.refused(Command.REGION_WRITE, bytes(8)) == EINVAL
    assert peer.refused(Command.REGION_READ, bytes(15)) == EINVAL


def test_a_device_may_refuse(peer: Peer) -> None:
    where = register_bank.REFUSED
    assert peer.refused(Command.REGION_READ, access(where, BAR, 4)) == errno.ENXIO
    assert peer.refused(Command.REGION_WRITE, access(where, BAR, 4, b"1234")) == errno.ENXIO
    # DMA to what is not memory, by a device that doesn't catch it.
    start = access(register_bank.DMA_START, BAR, 4, b"1234")
    assert peer.refused(Command.REGION_WRITE, start) == errno.EFAULT


def test_a_short_read_is_an_error_without_payload(peer: Peer, server: Server) -> None:
    assert peer.refused(Command.REGION_READ, access(register_bank.SHORT, BAR, 4)) == errno.EIO


def test_a_defect_costs_one_reply(
    peer: Peer, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    where = register_bank.DEFECT
    assert peer.refused(Command.REGION_READ, access(where, BAR, 4)) == errno.EIO
    assert peer.ok(Command.REGION_READ, access(0, BAR, 4))
    assert server.counters.internal_errors == 1
    assert "a bug of the device" in caplog.text


# --- DEVICE_RESET


def test_reset_is_answered_with_a_header(peer: Peer, bank: RegisterBank) -> None:
    assert peer.ok(Command.DEVICE_RESET) == b""
    assert peer.ok(Command.DEVICE_RESET, b"payload") == b""
    assert bank.resets == 2


# --- DMA_MAP and DMA_UNMAP


def test_mapped_memory_is_the_client_s(
    peer: Peer, bank: RegisterBank, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    before = open_fds()
    assert peer.ok(Command.DMA_MAP, dma_map(0x10000, 4 * PAGE, offset=PAGE), [fd]) == b""
    assert open_fds() == before + FILE
    address = (0x10008).to_bytes(8, "little")
    peer.ok(Command.REGION_WRITE, access(register_bank.DMA_ADDRESS, BAR, 8, address))
    peer.ok(Command.REGION_WRITE, access(register_bank.DMA_START, BAR, 4, b"beef"))
    assert os.pread(fd, 4, PAGE + 8) == b"beef"
    reply = peer.ok(Command.DMA_UNMAP, dma_unmap(0x10000, 4 * PAGE, argsz=99))
    assert reply == dma_unmap(0x10000, 4 * PAGE, argsz=99)
    assert open_fds() == before
    assert bank.memory.regions() == []


def test_read_only_memory(peer: Peer, bank: RegisterBank, memfd: Callable[..., int]) -> None:
    peer.ok(Command.DMA_MAP, dma_map(0, PAGE, flags=1), [memfd()])
    assert bank.memory.read(0, 1) == b"\0"
    with pytest.raises(GuestMemoryError):
        bank.memory.write(0, b"1")


def test_memory_without_a_file_is_remembered(peer: Peer, bank: RegisterBank) -> None:
    peer.ok(Command.DMA_MAP, dma_map(0xE0000001, 33))  # alignment doesn't matter either
    (region,) = bank.memory.regions()
    assert not region.shared
    peer.ok(Command.DMA_UNMAP, dma_unmap(0xE0000001, 33))


@pytest.mark.parametrize(
    ("payload", "number"),
    [
        (dma_map(0, PAGE, argsz=31), EINVAL),
        (bytes(31), EINVAL),
        (dma_map(0, PAGE, flags=0x10), EINVAL),
        (dma_map(0, PAGE, flags=3 | spec.DMA_MAP_F_MMAP), EINVAL),
        (dma_map(0, PAGE, flags=3 | spec.DMA_MAP_F_FILE_IO), EINVAL),
        (dma_map(TOP - PAGE, 2 * PAGE), EINVAL),
        (dma_map(0, TOP - 1), errno.ENOSPC),
        (dma_map(0, (8 << 40) + PAGE), errno.ENOSPC),
    ],
    ids=["argsz", "short", "flag 0x10", "mmap", "file I/O", "wrap", "huge", "too_big"],
)
def test_dma_map_refused(peer: Peer, bank: RegisterBank, payload: bytes, number: int) -> None:
    assert peer.refused(Command.DMA_MAP, payload) == number
    assert bank.memory.regions() == []


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 7, 15])
def test_dma_map_flags(
    peer: Peer, bank: RegisterBank, memfd: Callable[..., int], flags: int
) -> None:
    peer.ok(Command.DMA_MAP, dma_map(0, PAGE, flags=flags, argsz=64), [memfd()])
    (region,) = bank.memory.regions()
    assert (region.readable, region.writable) == (bool(flags & 1), bool(flags & 2))


def test_file_io_is_not_offered(peer: Peer, memfd: Callable[..., int]) -> None:
    flags = 3 | spec.DMA_MAP_F_FILE_IO
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE, flags=flags), [memfd()]) == errno.ENOTSUP


def test_a_map_of_nothing_is_no_error(peer: Peer, bank: RegisterBank) -> None:
    assert peer.ok(Command.DMA_MAP, dma_map(PAGE, 0)) == b""
    assert bank.memory.regions() == []


def test_the_last_page_can_be_mapped(peer: Peer, memfd: Callable[..., int]) -> None:
    peer.ok(Command.DMA_MAP, dma_map(TOP - PAGE, PAGE), [memfd()])
    peer.ok(Command.DMA_UNMAP, dma_unmap(TOP - PAGE, PAGE))


def test_the_second_fd_is_closed(peer: Peer, memfd: Callable[..., int]) -> None:
    fd = memfd()
    before = open_fds()
    peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [fd, fd])
    assert open_fds() == before + FILE


@pytest.mark.parametrize(
    ("size", "offset"), [(17 * PAGE, 0), (PAGE, 16 * PAGE), (PAGE, TOP - PAGE), (1, 16 * PAGE)]
)
def test_a_file_that_is_too_short_is_refused(
    peer: Peer, bank: RegisterBank, memfd: Callable[..., int], size: int, offset: int
) -> None:
    fd = memfd()
    before = open_fds()
    assert peer.refused(Command.DMA_MAP, dma_map(0, size, offset=offset), [fd]) == EINVAL
    assert open_fds() == before
    assert bank.memory.regions() == []


def test_what_cannot_be_mapped_is_refused(peer: Peer) -> None:
    reader, writer = os.pipe()
    before = open_fds()
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE), [reader]) == errno.EACCES
    assert open_fds() == before
    os.close(reader)
    os.close(writer)


def test_the_same_map_again(peer: Peer, bank: RegisterBank, memfd: Callable[..., int]) -> None:
    fd = memfd()
    for _ in range(3):
        peer.ok(Command.DMA_MAP, dma_map(0, PAGE), [fd])
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE, flags=1), [fd]) == EINVAL
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE, offset=PAGE), [fd]) == EINVAL
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE), [memfd()]) == EINVAL
    assert peer.refused(Command.DMA_MAP, dma_map(0, PAGE)) == EINVAL
    assert peer.refused(Command.DMA_MAP, dma_map(PAGE - 1, PAGE), [fd]) == EINVAL
    assert len(bank.memory.regions()) == 1
    peer.ok(Command.DMA_UNMAP, dma_unmap(0, PAGE))
    assert bank.memory.regions() == []


@pytest.mark.parametrize(
    ("payload", "number"),
    [
        (bytes(8), EINVAL),
        (dma_unmap(PAGE, PAGE, argsz=8), EINVAL),
        (dma_unmap(PAGE, PAGE, argsz=(1 << 20) + 8), EINVAL),
        (dma_unmap(PAGE, PAGE, flags=spec.DMA_UNMAP_F_GET_DIRTY_BITMAP), EINVAL),
        (dma_unmap(PAGE, PAGE, flags=4), EINVAL),
        (dma_unmap(PAGE, 2 * PAGE), errno.ENOENT),
        (dma_unmap(0, 2 * PAGE), errno.ENOENT),
        (dma_unmap(PAGE, 1), errno.ENOENT),
        (dma_unmap(5 * PAGE, PAGE), errno.ENOENT),
        (dma_unmap(PAGE, 0), errno.ENOENT),
        (dma_unmap(TOP - 1, TOP - 1), errno.ENOENT),
        (dma_unmap(PAGE, PAGE, flags=spec.DMA_UNMAP_F_ALL), EINVAL),
        (dma_unmap(0, PAGE, flags=spec.DMA_UNMAP_F_ALL), EINVAL),
        (dma_unmap(0, 0, flags=3), EINVAL),
    ],
    ids=[
        "short_write",
        "bad_argsz",
        "bad_argsz2",
        "dirty_bad_argsz",
        "invalid_flags",
        "superset",
        "superset below",
        "subset",
        "invalid_addr",
        "nothing",
        "wild",
        "unmap_all_invalid_addr",
        "unmap_all_invalid_size",
        "unmap_all_with_dirty",
    ],
)
def test_dma_unmap_refused(
    peer: Peer, bank: RegisterBank, memfd: Callable[..., int], payload: bytes, number: int
) -> None:
    peer.ok(Command.DMA_MAP, dma_map(PAGE, PAGE), [memfd()])
    assert peer.refused(Command.DMA_UNMAP, payload) == number
    assert len(bank.memory.regions()) == 1


def test_dma_unmap_all(peer: Peer, bank: RegisterBank, memfd: Callable[..., int]) -> None:
    request = dma_unmap(0, 0, flags=spec.DMA_UNMAP_F_ALL)
    assert peer.ok(Command.DMA_UNMAP, request) == request  # no error when there is nothing
    fd = memfd()
    for page in range(4):
        peer.ok(Command.DMA_MAP, dma_map(page * PAGE, PAGE), [fd] if page else [])
    assert peer.ok(Command.DMA_UNMAP, request) == request
    assert bank.memory.regions() == []


def test_a_page_at_a_time_is_one_mapping(
    peer: Peer, bank: RegisterBank, memfd: Callable[..., int]
) -> None:
    """QEMU behind an IOMMU of its own maps page by page, the same offset at many addresses."""
    fd = memfd()
    before = open_fds()
    for page in range(64):
        peer.ok(Command.DMA_MAP, dma_map(page * PAGE, PAGE, offset=page % 4 * PAGE), [fd])
    assert open_fds() == before + FILE
    assert len(bank.memory.regions()) == 64


# --- logs


def test_refusals_are_logged_but_not_without_end(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        peer.refused(999)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert 1 <= len(warnings) < 20
    assert "999" in warnings[0].getMessage()
