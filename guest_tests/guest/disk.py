"""A disk behind the IOMMU: a file system on it, and a raw area behind the file system."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.guest import pci

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "check",
    "fill",
    "fill_for_ever",
    "make",
    "rebind",
    "size",
    "sums",
    "write_raw",
    "write_until_error",
    "write_until_told",
]

_MOUNT_POINT = Path("/mnt")
_CHUNK = 1 << 20
_SECTOR = 512


def size(bdf: str) -> int:
    """Return the bytes of the disk at ``bdf``."""
    return int((Path("/sys/block") / _device(bdf).name / "size").read_text()) * 512


def make(bdf: str, megabytes: int) -> None:
    """Make an ext4 file system in the first ``megabytes`` of the disk."""
    _run("mke2fs", "-q", "-F", "-t", "ext4", str(_device(bdf)), f"{megabytes}M")


def fill(bdf: str, files: dict[str, int]) -> dict[str, str]:
    """Write ``files`` (name: bytes) of random contents; return their SHA-256 by name.

    The file system is unmounted before this returns: all of it is on the disk.
    """
    digests = {}
    with _mounted(bdf) as root:
        for name, count in files.items():
            digest = hashlib.sha256()
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with (root / name).open("wb") as file:
                for start in range(0, count, _CHUNK):
                    data = os.urandom(min(_CHUNK, count - start))
                    digest.update(data)
                    file.write(data)
                os.fsync(file.fileno())
            digests[name] = digest.hexdigest()
    return digests


def fill_for_ever(bdf: str) -> None:
    """Write and remove files until the machine is no more."""
    with _mounted(bdf) as root:
        while True:
            for number in range(8):
                (root / f"churn{number}").write_bytes(os.urandom(_CHUNK))
            os.sync()
            for number in range(8):
                (root / f"churn{number}").unlink()


def sums(bdf: str) -> dict[str, str]:
    """Mount the file system and return the SHA-256 of all its files, by name."""
    with _mounted(bdf) as root:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


def check(bdf: str) -> None:
    """Let e2fsck look at everything, changing nothing.

    Raises:
        AssertionError: It found something.
    """
    _run("e2fsck", "-f", "-n", str(_device(bdf)))


def write_raw(bdf: str, offset: int, count: int) -> str:
    """Write random bytes past the file system, read them back, and return their SHA-256.

    Raises:
        AssertionError: Something else was read.
    """
    data = os.urandom(count)
    with _device(bdf).open("r+b", buffering=0) as disk:
        disk.seek(offset)
        disk.write(data)
        os.fsync(disk.fileno())
        _forget()
        disk.seek(offset)
        assert disk.read(count) == data, f"bytes at {offset:#x} of the disk read back differently"
    return hashlib.sha256(data).hexdigest()


def write_until_error(bdf: str, offset: int) -> int:
    """Write past the file system until that fails; return the errno."""
    data = os.urandom(_CHUNK)
    disk = os.open(_device(bdf), os.O_WRONLY)
    try:
        while True:
            os.pwrite(disk, data, offset)
            os.fsync(disk)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(disk)


def write_until_told(bdf: str, offset: int, sign: int) -> int:
    """Write past the file system until the host has changed the sector at ``sign``.

    Returns how many times it wrote.
    """
    data = os.urandom(_CHUNK)
    sector = mmap.mmap(-1, _SECTOR)  # aligned, as direct I/O needs it
    disk = os.open(_device(bdf), os.O_RDWR)
    uncached = os.open(_device(bdf), os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(uncached, [sector], sign)
        before = sector[:]
        times = 0
        while sector[:] == before:
            os.pwrite(disk, data, offset)
            os.fsync(disk)
            times += 1
            os.preadv(uncached, [sector], sign)
    finally:
        os.close(uncached)
        os.close(disk)
    return times


def rebind(bdf: str) -> None:
    """Take the disk from its virtio driver and its PCI driver, and give it back to both."""
    virtio = next(pci.path(bdf).glob("virtio*"))
    (virtio / "driver/unbind").write_text(virtio.name)
    assert not list(virtio.glob("block/*")), "the disk is there without its driver"
    Path("/sys/bus/virtio/drivers/virtio_blk/bind").write_text(virtio.name)
    pci.unbind(bdf)
    assert not list(pci.path(bdf).glob("virtio*")), "the virtio device is there without its driver"
    pci.bind(bdf, "virtio-pci")


@contextlib.contextmanager
def _mounted(bdf: str) -> Iterator[Path]:
    _forget()
    _run("mount", "-t", "ext4", str(_device(bdf)), str(_MOUNT_POINT))
    try:
        yield _MOUNT_POINT
    finally:
        _run("umount", str(_MOUNT_POINT))
        _forget()


def _device(bdf: str) -> Path:
    """Return the block device of the disk."""
    return Path("/dev") / next(pci.path(bdf).glob("virtio*/block/*")).name


def _forget() -> None:
    """Drop what the kernel has cached, so that reads come from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stdout}"
