from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.testing.served import connected
from tests.virtio.harness import EchoDevice
from viommu.basic import BasicMemoryMapper
from viommu.endpoints.blk import BlkDevice
from viommu.endpoints.dma import EndpointDma
from viommu.errors import Access, UsageError
from viommu.mapper import MappingInfo
from viommu.memory import GuestMemory
from viommu.spec.virtio_blk import RequestType, Status
from viommu.testing.blk_driver import BlkDriver, BlkError
from viommu.testing.guest_ram import PAGE, DirectDma, GuestRam
from viommu.virtio.pci import VirtioPciFunction

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from viommu.loop import Loop

RAM_SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(64 << 10))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[BlkDriver]:
    """A disk whose IOMMU maps every address to itself."""
    made: list[BlkDevice] = []

    def make(loop: Loop) -> VirtioPciFunction:
        memory, mapper = GuestMemory(), BasicMemoryMapper()
        mapper.add_map(MappingInfo(0, 0, RAM_SIZE, Access.READ | Access.WRITE))
        dma = EndpointDma(mapper, memory, lambda fault: None, loop)
        made.append(BlkDevice(image, dma, loop, serial="serial"))
        return VirtioPciFunction("disk", memory, made[0], dma)

    with GuestRam(RAM_SIZE) as ram, connected(make) as client:
        ram.give(client)
        with BlkDriver(client, DirectDma(ram)) as disk:
            yield disk
    made[0].close()


def test_reads_and_writes(disk: BlkDriver, image: Path) -> None:
    before = image.read_bytes()
    assert disk.capacity == 128
    assert disk.read(127, 1) == before[-512:]
    disk.write(3, b"x" * 1024)
    disk.flush()
    disk.discard(0, 1)
    disk.write_zeroes(1, 1)
    disk.write_zeroes(2, 1, unmap=True)
    assert image.read_bytes() == bytes(1536) + b"x" * 1024 + before[2560:]
    assert disk.get_id() == "serial"


def test_a_failed_request_raises(disk: BlkDriver) -> None:
    with pytest.raises(BlkError, match="type 0 ended with status 1") as caught:
        disk.read(128, 1)
    assert (caught.value.kind, caught.value.status) == (RequestType.IN, Status.IOERR)
    with pytest.raises(BlkError):
        disk.write(0, b"short")


def test_raw_requests_return_their_status(disk: BlkDriver) -> None:
    buffer = disk.dma.allocate(PAGE)
    assert disk.request(RequestType.IN, writable=[(buffer.address, 512)]) == Status.OK
    assert disk.request(RequestType.IN, writable=[(RAM_SIZE, 512)]) == Status.IOERR
    assert disk.request(77) == Status.UNSUPP


def test_buffers_are_given_back(disk: BlkDriver) -> None:
    first = disk.dma.allocate(PAGE)
    disk.dma.free(first)
    for _ in range(100):
        disk.read(0, 64)
    with pytest.raises(BlkError):
        disk.read(1000, 64)
    assert disk.dma.allocate(PAGE) == first


def test_what_is_no_disk_is_refused() -> None:
    def make(loop: Loop) -> VirtioPciFunction:
        return VirtioPciFunction("echo", GuestMemory(), EchoDevice())

    with (
        GuestRam(RAM_SIZE) as ram,
        connected(make) as client,
        pytest.raises(UsageError, match="type 42 is no disk"),
    ):
        BlkDriver(client, DirectDma(ram))
