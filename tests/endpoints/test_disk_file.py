from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.endpoints import disk_file
from viommu.endpoints.disk_file import DiskFile, _transfer
from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[DiskFile]:
    disk = DiskFile(image)
    yield disk
    disk.close()


def fds() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def refused(error: int) -> object:
    def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
        raise OSError(error, os.strerror(error))

    return fallocate


def test_reads_and_writes_where_asked(disk: DiskFile, image: Path) -> None:
    content = image.read_bytes()
    first, second = bytearray(100), bytearray(412)
    disk.read_into([memoryview(first), memoryview(second)], 512)
    assert bytes(first + second) == content[512:1024]
    disk.write_from([memoryview(b"a" * 512), memoryview(b"b" * 512)], SIZE - 1024)
    assert image.read_bytes() == content[:-1024] + b"a" * 512 + b"b" * 512


@given(
    sizes=st.lists(st.integers(0, 700), max_size=12),
    counts=st.lists(st.integers(1, 900), min_size=1, max_size=40),
)
def test_short_transfers_are_continued(sizes: list[int], counts: list[int]) -> None:
    steps = iter(counts)

    def short(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, cut(views, next(steps, 10_000)), offset)

    def cut(views: Sequence[memoryview], limit: int) -> list[memoryview]:
        kept = []
        for view in views:
            kept.append(view[:limit])
            limit -= min(limit, len(view))
        return kept

    fd = os.memfd_create("disk")
    try:
        content = os.urandom(9000)
        os.pwrite(fd, content, 0)
        buffers = [bytearray(size) for size in sizes]
        _transfer(short, fd, [memoryview(b) for b in buffers], 7)
        assert b"".join(buffers) == content[7 : 7 + sum(sizes)]
    finally:
        os.close(fd)


def test_more_buffers_than_one_call_takes(disk: DiskFile, image: Path) -> None:
    content = image.read_bytes()
    buffers = [bytearray(3) for _ in range(2500)]
    disk.read_into([memoryview(b) for b in buffers], 0)
    assert b"".join(buffers) == content[:7500]


def test_a_file_that_shrank_is_an_io_error(disk: DiskFile, image: Path) -> None:
    os.truncate(image, 1000)
    with pytest.raises(OSError, match="ends at 0x3e8") as caught:
        disk.read_into([memoryview(bytearray(1024))], 0)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes_reads_back_as_zeroes(disk: DiskFile, image: Path, *, unmap: bool) -> None:
    content = image.read_bytes()
    disk.write_zeroes(4096, 65536, unmap=unmap)
    assert image.read_bytes() == content[:4096] + bytes(65536) + content[4096 + 65536 :]


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_are_written_where_the_file_system_cannot_zero(
    disk: DiskFile, image: Path, monkeypatch: pytest.MonkeyPatch, *, unmap: bool
) -> None:
    monkeypatch.setattr(disk_file, "_fallocate", refused(errno.EOPNOTSUPP))
    content = image.read_bytes()
    disk.write_zeroes(512, 200_000 // 512 * 512, unmap=unmap)
    end = 512 + 200_000 // 512 * 512
    assert image.read_bytes() == content[:512] + bytes(end - 512) + content[end:]


def test_a_range_of_nothing_is_no_error(disk: DiskFile, image: Path) -> None:
    content = image.read_bytes()
    disk.discard(4096, 0)
    for unmap in (False, True):
        disk.write_zeroes(4096, 0, unmap=unmap)
    assert image.read_bytes() == content


def test_memory_is_a_file_system_that_cannot_zero() -> None:
    fd = os.memfd_create("disk")
    try:
        os.write(fd, b"x" * 8192)
        disk = DiskFile(Path(f"/proc/self/fd/{fd}"))
        disk.write_zeroes(512, 4096, unmap=False)
        disk.close()
        assert os.pread(fd, 8192, 0) == b"x" * 512 + bytes(4096) + b"x" * 3584
    finally:
        os.close(fd)


def test_discard_frees_blocks(disk: DiskFile, image: Path) -> None:
    os.sync()
    before = image.stat().st_blocks
    disk.discard(0, SIZE)
    assert image.stat().st_blocks < before
    assert image.read_bytes() == bytes(SIZE)


def test_discard_is_only_a_hint_where_the_file_system_cannot(
    disk: DiskFile, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_file, "_fallocate", refused(errno.EOPNOTSUPP))
    content = image.read_bytes()
    disk.discard(0, 4096)
    assert image.read_bytes() == content


def test_a_full_host_is_not_taken_for_a_missing_ability(
    disk: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_file, "_fallocate", refused(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        disk.write_zeroes(0, 512, unmap=False)


@pytest.mark.parametrize("size", [0, 511, 513, 1 << 20 | 1])
def test_refuses_a_size_that_is_no_disk(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(size))
    with pytest.raises(UsageError, match=rf"multiple of 512 .* this is {size} bytes"):
        DiskFile(path)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/null")):
        with pytest.raises(UsageError, match="regular file or a block device"):
            DiskFile(path)


def test_says_why_it_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        DiskFile(tmp_path / "absent.img")


@pytest.mark.parametrize("read_only", [False, True])
def test_says_when_reading_only_would_help(
    image: Path, monkeypatch: pytest.MonkeyPatch, *, read_only: bool
) -> None:
    def denied(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", denied)  # root is denied nothing
    with pytest.raises(UsageError, match="Permission denied") as caught:
        DiskFile(image, read_only=read_only)
    assert ("readonly=on" in str(caught.value)) is not read_only


def test_a_file_system_without_locks_is_told(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UsageError, match="can't lock the disk: No locks available"):
        DiskFile(image)


def test_a_disk_in_use_is_refused_and_free_after_close(image: Path) -> None:
    first = DiskFile(image)
    try:
        with pytest.raises(UsageError, match="in use by another process"):
            DiskFile(image)
        with pytest.raises(UsageError, match="in use by another process"):
            DiskFile(image, read_only=True)
    finally:
        first.close()
    DiskFile(image).close()


def test_readers_share_a_disk(image: Path) -> None:
    disks = [DiskFile(image, read_only=True) for _ in range(2)]
    for disk in disks:
        with pytest.raises(OSError, match="Bad file descriptor"):
            disk.write_from([memoryview(bytes(512))], 0)
        disk.flush()
        disk.close()


def test_a_refused_disk_leaves_no_fd_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(100))
    open_fds = fds()
    with pytest.raises(UsageError):
        DiskFile(path)
    assert fds() == open_fds
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
