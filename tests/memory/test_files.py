from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from viommu.errors import PeerError, UsageError
from viommu.memory import MappedFile, MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096


def mappings_of(fd: int) -> int:
    """How often this process maps the file behind ``fd``."""
    inode = str(os.fstat(fd).st_ino)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.split()[4] == inode and "memfd:test" in line for line in lines)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def writable(file: MappedFile) -> bool:
    return not file.view.readonly


def test_a_file_is_mapped_once_and_seen_by_all(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    duplicate = os.dup(fd)
    first = files.get(fd, 0, PAGE, writable=True)
    second = files.get(duplicate, PAGE, PAGE, writable=True)
    os.close(duplicate)
    assert first is second
    assert mappings_of(fd) == 1
    first.view[PAGE] = 7
    assert os.pread(fd, 1, PAGE) == b"\7"
    first.close()
    assert mappings_of(fd) == 1
    second.close()
    assert mappings_of(fd) == 0
    assert len(files) == 0


def test_different_files_are_different(files: MappedFiles, memfd: Callable[..., int]) -> None:
    one, other = (files.get(memfd(), 0, PAGE, writable=True) for _ in range(2))
    assert one is not other
    assert one.key != other.key
    one.close()
    other.close()


def test_no_file_descriptor_is_left(files: MappedFiles, memfd: Callable[..., int]) -> None:
    fd = memfd()
    before = open_fds()
    files.get(fd, 0, PAGE, writable=True).close()
    assert open_fds() == before


def test_a_use_can_be_taken_without_a_descriptor(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    file = files.get(memfd(), 0, PAGE, writable=True)

    assert file.retain() is file
    file.close()
    assert len(files) == 1
    file.close()
    assert len(files) == 0
    with pytest.raises(UsageError, match="is closed"):
        file.retain()


def test_the_file_can_be_mapped_elsewhere_even_when_it_is_gone_here(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    file = files.get(fd, 0, PAGE, writable=True)
    backing = file.backing.retain()
    file.close()

    assert backing.key == file.key
    assert os.fstat(backing.fileno()).st_ino == os.fstat(fd).st_ino
    backing.close()


def test_a_descriptor_that_allows_writing_replaces_one_that_does_not(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    file = files.get(read_only, 0, PAGE, writable=False)
    os.close(read_only)
    before = file.backing.writable

    assert files.get(fd, 0, PAGE, writable=True) is file

    assert (before, file.backing.writable) == (False, True)
    file.close()
    file.close()


def test_a_writer_that_could_not_be_kept_changes_nothing(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    file = files.get(reader, 0, PAGE, writable=False)
    view = file.view[:1]  # which keeps a descriptor
    free = os.dup(fd)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # one is left, for the mapping
    try:
        with pytest.raises(PeerError) as caught:
            files.get(fd, 0, PAGE, writable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert not writable(file)
    with files.get(fd, 0, PAGE, writable=True):
        assert file.backing.writable
        assert writable(file)
    view.release()
    file.close()
    os.close(reader)


def test_a_view_outlives_the_file_safely(files: MappedFiles, memfd: Callable[..., int]) -> None:
    fd = memfd()
    file = files.get(fd, 0, PAGE, writable=True)
    view = file.view[:4]
    file.close()
    view[:] = b"late"
    assert os.pread(fd, 4, 0) == b"late"
    assert mappings_of(fd) == 1
    del view
    gc.collect()
    assert mappings_of(fd) == 0


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 16 * PAGE + 1), (16 * PAGE, 1), (PAGE, 16 * PAGE), (2**64 - PAGE, PAGE), (-1, 2)],
)
def test_a_file_that_is_too_short_is_not_mapped(
    files: MappedFiles, memfd: Callable[..., int], offset: int, size: int
) -> None:
    fd = memfd()
    with pytest.raises(PeerError, match="is not in it") as caught:
        files.get(fd, offset, size, writable=True)
    assert caught.value.errno == errno.EINVAL
    assert mappings_of(fd) == 0
    assert len(files) == 0


def test_an_empty_file_is_refused(files: MappedFiles, memfd: Callable[..., int]) -> None:
    with pytest.raises(PeerError) as caught:
        files.get(memfd(0), 0, 0, writable=True)
    assert caught.value.errno == errno.EINVAL


def test_the_last_byte_of_a_file_can_be_asked_for(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    file = files.get(memfd(), 16 * PAGE - 1, 1, writable=True)
    assert file.size == 16 * PAGE
    file.close()


def test_a_memfd_can_no_longer_be_cut_off(files: MappedFiles, memfd: Callable[..., int]) -> None:
    fd = memfd()
    file = files.get(fd, 0, PAGE, writable=True)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.ftruncate(fd, 32 * PAGE)  # growing does no harm
    file.close()


@pytest.mark.parametrize("flags", [os.MFD_CLOEXEC, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING])
def test_a_memfd_that_takes_no_seals_is_accepted(
    files: MappedFiles, memfd: Callable[..., int], flags: int
) -> None:
    fd = memfd(flags=flags)
    if flags & os.MFD_ALLOW_SEALING:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    files.get(fd, 0, PAGE, writable=True).close()


def test_a_file_that_has_grown_is_mapped_anew(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    fd = memfd(PAGE)
    file = files.get(fd, 0, PAGE, writable=True)
    old = file.view
    os.ftruncate(fd, 2 * PAGE)
    assert files.get(fd, PAGE, PAGE, writable=True) is file
    assert file.size == 2 * PAGE
    old[0] = 5
    assert file.view[0] == 5
    file.close()
    file.close()


def test_a_read_only_file_serves_only_readers(files: MappedFiles, tmp_path: Path) -> None:
    path = tmp_path / "rom"
    path.write_bytes(b"rom!" * 1024)
    fd = os.open(path, os.O_RDONLY)
    try:
        file = files.get(fd, 0, PAGE, writable=False)
        assert file.view.readonly
        with pytest.raises(PeerError, match="reading and writing") as caught:
            files.get(fd, 0, PAGE, writable=True)
        assert caught.value.errno == errno.EACCES
        file.close()
    finally:
        os.close(fd)


def test_a_reader_is_followed_by_a_writer(files: MappedFiles, memfd: Callable[..., int]) -> None:
    fd = memfd()
    file = files.get(fd, 0, PAGE, writable=False)
    assert not writable(file)
    assert files.get(fd, 0, PAGE, writable=True) is file
    assert writable(file)
    assert files.get(fd, 0, PAGE, writable=False) is file
    assert writable(file)
    for _ in range(3):
        file.close()


def test_what_is_not_a_memory_file_is_refused(files: MappedFiles, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    path = os.open(tmp_path, os.O_PATH)
    device = os.open("/dev/null", os.O_RDWR)
    cases = [
        (reader, True, errno.EACCES),
        (writer, True, errno.EACCES),
        (reader, False, errno.ENODEV),
        (directory, False, errno.ENODEV),
        (path, False, errno.EACCES),
        (device, True, errno.ENODEV),
        (1_000_000, True, errno.EBADF),
    ]
    try:
        for fd, writable, number in cases:
            with pytest.raises(PeerError) as caught:
                files.get(fd, 0, 1, writable=writable)
            assert caught.value.errno == number
    finally:
        for fd in (reader, writer, directory, path, device):
            os.close(fd)
    assert len(files) == 0


def test_a_file_sealed_against_writing_is_refused_to_writers(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(PeerError) as caught:
        files.get(fd, 0, PAGE, writable=True)
    assert caught.value.errno == errno.EPERM
    assert len(files) == 0


def test_a_file_larger_than_the_address_space_is_refused(
    files: MappedFiles, memfd: Callable[..., int]
) -> None:
    with pytest.raises(PeerError) as caught:
        files.get(memfd(2**62), 0, PAGE, writable=True)
    assert caught.value.errno == errno.ENOMEM


def test_the_number_of_files_is_limited(memfd: Callable[..., int]) -> None:
    files = MappedFiles(limit=2)
    fds = [memfd() for _ in range(3)]
    kept = [files.get(fd, 0, PAGE, writable=True) for fd in fds[:2]]
    with pytest.raises(PeerError, match="more than 2") as caught:
        files.get(fds[2], 0, PAGE, writable=True)
    assert caught.value.errno == errno.ENOSPC
    kept.pop().close()
    kept.append(files.get(fds[2], 0, PAGE, writable=True))
    for file in kept:
        file.close()


def test_closing_too_often_is_told(files: MappedFiles, memfd: Callable[..., int]) -> None:
    file = files.get(memfd(), 0, PAGE, writable=True)
    file.close()
    with pytest.raises(UsageError):
        file.close()
