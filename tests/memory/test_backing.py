from __future__ import annotations

import errno
import fcntl
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from viommu.errors import PeerError, UsageError
from viommu.memory.backing import FileBacking, PrivateBacking

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096


def test_a_file_outlives_the_descriptor_it_came_with(memfd: Callable[..., int]) -> None:
    received = os.dup(memfd())
    os.write(received, b"here")

    backing = FileBacking(received)
    os.close(received)

    assert os.pread(backing.fileno(), 4, 0) == b"here"
    backing.close()
    assert backing.fileno() == -1


def test_the_last_use_closes_the_file_and_no_other(memfd: Callable[..., int]) -> None:
    with FileBacking(memfd()) as backing:
        assert backing.retain() is backing
        assert backing.uses == 2
        backing.close()
        assert os.fstat(backing.fileno()).st_ino == backing.key.inode

    with pytest.raises(UsageError, match="more often"):
        backing.close()
    with pytest.raises(UsageError, match="is closed"):
        backing.retain()


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 0),
        (0, -1),
        (-1, 1),
        (0, 16 * PAGE + 1),
        (16 * PAGE, 1),
        (1 << 63, 1),
        (1, (1 << 63) - 1),
    ],
)
def test_a_range_outside_the_file_is_refused(
    memfd: Callable[..., int], offset: int, size: int
) -> None:
    with FileBacking(memfd(16 * PAGE)) as backing:
        backing.check(0, 16 * PAGE, writable=True)
        with pytest.raises(PeerError) as caught:
            backing.check(offset, size, writable=False)
    assert caught.value.errno == errno.EINVAL


def test_a_file_that_grew_is_as_long_as_it_is_now(memfd: Callable[..., int]) -> None:
    fd = memfd(PAGE)
    with FileBacking(fd) as backing:
        os.ftruncate(fd, 2 * PAGE)
        backing.check(PAGE, PAGE, writable=True)


def test_what_was_opened_for_reading_cant_be_written(memfd: Callable[..., int]) -> None:
    fd = os.open(f"/proc/self/fd/{memfd()}", os.O_RDONLY)
    with FileBacking(fd) as backing:
        backing.check(0, PAGE, writable=False)
        with pytest.raises(PeerError, match="can't be written") as caught:
            backing.check(0, PAGE, writable=True)
    os.close(fd)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, 0x10], ids=["write", "future write"])
def test_what_is_sealed_cant_be_written(memfd: Callable[..., int], seal: int) -> None:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    with FileBacking(fd) as backing:
        assert not backing.writable


def test_what_cant_be_mapped_is_refused(memfd: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    for flags in (os.O_WRONLY, os.O_PATH):
        fd = os.open(path, flags)
        with pytest.raises(PeerError, match="not open for reading"):
            FileBacking(fd)
        os.close(fd)
    fd = os.dup(memfd())
    os.close(fd)
    with pytest.raises(PeerError) as caught:
        FileBacking(fd)
    assert caught.value.errno == errno.EBADF


def test_the_size_of_a_device_is_its_drivers_business() -> None:
    with Path("/dev/zero").open("r+b", buffering=0) as device, FileBacking(device.fileno()) as zero:
        zero.check(1 << 40, PAGE, writable=True)
        assert not zero.sized


def test_private_memory_is_zeros_without_a_file() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with PrivateBacking(2 * PAGE) as backing:
        assert bytes(backing.view) == bytes(2 * PAGE)
        backing.view[:4] = b"mine"
        backing.check(PAGE, PAGE, writable=True)
        for offset, size in ((PAGE, PAGE + 1), (-1, 1), (0, 0)):
            with pytest.raises(PeerError):
                backing.check(offset, size, writable=False)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not backing.address


def test_private_memory_goes_with_its_last_view() -> None:
    backing = PrivateBacking(PAGE)
    start = f"{backing.address:x}-"
    view = backing.view[:4]
    backing.close()
    view[:] = b"late"
    del view
    gc.collect()
    assert not any(x.startswith(start) for x in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1])
def test_private_memory_is_whole_pages(size: int) -> None:
    with pytest.raises(UsageError):
        PrivateBacking(size)


@pytest.mark.parametrize("size", [1 << 62, 1 << 80])
def test_too_much_private_memory_is_an_error(size: int) -> None:
    with pytest.raises(PeerError) as caught:
        PrivateBacking(size)
    assert caught.value.errno == errno.ENOMEM
