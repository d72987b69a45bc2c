"""What it costs that a device is in another process, and where.

Everything that a process of its own is in use is one here. Each test takes its ways in turns:
see ``race``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.race import race
from viommu.basic import BasicMemoryMapper
from viommu.errors import Access
from viommu.export import ExportedRegion
from viommu.ipc import ExportClient
from viommu.mapper import MappingInfo
from viommu.spec.virtio_blk import RequestType
from viommu.spec.virtio_blk import Status as BlkStatus
from viommu.spec.virtio_iommu import Status
from viommu.testing.blk_driver import BlkDriver
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.iommu_driver import IommuDriver, MappedDma
from viommu.vfio_user import Client, ioas_requests
from viommu.vfio_user.loop_client import default_offers
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

    from viommu.mapper import Exporter
    from viommu.memory import GuestMemory

RAM_SIZE = 16 << 20
DISK_SIZE = 4 << 20
IOVA = 1 << 32
READ_WRITE = Access.READ | Access.WRITE

IOMMU = "00:05.0"
EXTERNAL = "00:09.0"
DISKS = {
    "in viommu's process": "00:10.0",
    "process=own": "00:11.0",
    "vfio-user, memory=shared": "00:12.0",
    "vfio-user, memory=message": "00:13.0",
}


@contextlib.contextmanager
def viommu(*arguments: str) -> Iterator[None]:
    """Run a ``viommu`` that serves, from when it is ready on."""
    command = [sys.executable, "-m", "viommu.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "ready\n" in process.stdout
            yield
        finally:
            process.terminate()


class House:
    """A server with a disk in each place, and an endpoint whose device is this process."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        image = directory / "disk.img"
        image.write_bytes(os.urandom(DISK_SIZE))
        arguments = ["serve", "--dir", str(directory / "serve"), "--iommu", IOMMU]
        inside, own, shared, by_message = DISKS.values()
        disk = f"blk,path={image},readonly=on"
        for bdf, memory in ((shared, "shared"), (by_message, "message")):
            socket = directory / bdf
            stack.enter_context(viommu("device", disk, "--socket", str(socket)))
            arguments += ["--endpoint", f"{bdf}=vfio-user,socket={socket},memory={memory}"]
        arguments += ["--endpoint", f"{inside}={disk}", "--endpoint", f"{own}={disk},process=own"]
        arguments += ["--endpoint", f"{EXTERNAL}=external"]
        stack.enter_context(viommu(*arguments))
        self.ram = stack.enter_context(GuestRam(RAM_SIZE))
        self.iommu = stack.enter_context(IommuDriver(self.connect(IOMMU), self.ram))

    def connect(self, bdf: str) -> Client:
        client = self._stack.enter_context(Client(self.directory / "serve" / f"{bdf}.sock"))
        self.ram.give(client)
        return client

    def attach(self, domain: int, bdf: str) -> None:
        assert self.iommu.attach(domain, Bdf.parse(bdf).number) == Status.OK


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="viommu-") as name, contextlib.ExitStack() as stack:
        yield House(Path(name), stack)


@pytest.fixture(scope="module")
def disks(house: House) -> Iterator[dict[str, BlkDriver]]:
    """A driver for each disk, each in a domain of its own."""
    with contextlib.ExitStack() as stack:
        drivers = {}
        for domain, (name, bdf) in enumerate(DISKS.items(), 1):
            house.attach(domain, bdf)
            space = MappedDma(house.iommu, domain, IOVA)
            drivers[name] = stack.enter_context(BlkDriver(house.connect(bdf), space))
        yield drivers


def test_export_and_release(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
    house: House,
) -> None:
    """A page is exported, touched and released."""
    house.attach(9, EXTERNAL)
    gpa = house.ram.pages.allocate(PAGE)
    assert house.iommu.map(9, IOVA, gpa, PAGE) == Status.OK
    inside = BasicMemoryMapper()
    inside.add_map(MappingInfo(IOVA, gpa, PAGE, READ_WRITE))

    def touch(exporter: Exporter, memory: GuestMemory) -> None:
        with ExportedRegion(exporter, memory, IOVA, PAGE, READ_WRITE) as region:
            region.views()[0][0] = 1

    with ExportClient(house.directory / "serve" / f"{EXTERNAL}.export.sock") as client:
        events = [inside.start_export_session(), client.start_export_session()]
        ways = {
            "in the process of the mapper": lambda: touch(inside, house.ram.memory),
            "across processes": lambda: touch(client, client.memory),
        }
        race(benchmark, record_property, ways)
    for event in events:
        event.close()


def test_map_and_unmap_in_a_device(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
) -> None:
    """A page goes into the address space of a stand-alone device, and is taken back."""
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="viommu-"))) / "edu"
        ram = stack.enter_context(GuestRam(RAM_SIZE))
        stack.enter_context(viommu("device", "edu", "--socket", str(path)))
        offers = replace(default_offers(serves=False), iommufd=True, fixed_iova=True)
        client = stack.enter_context(Client(path, offers=offers))
        ioas = client.call(ioas_requests.alloc_ioas())
        client.call(ioas_requests.bind_iommufd())
        fd = ram._fd

        def dma_map(fd: int | None) -> None:
            client.dma_map(IOVA, PAGE, fd=fd)
            client.dma_unmap(IOVA, PAGE)

        def ioas_map() -> None:
            client.call(ioas_requests.ioas_map(ioas, PAGE, fd=fd, iova=IOVA))
            client.call(ioas_requests.ioas_unmap(ioas, IOVA, PAGE))

        ways = {
            "DMA_MAP, with a file": lambda: dma_map(fd),
            "DMA_MAP, without one": lambda: dma_map(None),
            "IOAS_MAP": ioas_map,
        }
        race(benchmark, record_property, ways)


def test_map_and_unmap_of_a_guest(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
    house: House,
    disks: dict[str, BlkDriver],
) -> None:
    """A page is mapped and unmapped by requests to the IOMMU, for an endpoint in each place."""
    gpa = house.ram.pages.allocate(PAGE)

    def pair(domain: int) -> Callable[[], None]:
        def way() -> None:
            assert house.iommu.map(domain, PAGE, gpa, PAGE) == Status.OK
            assert house.iommu.unmap(domain, PAGE, PAGE) == Status.OK

        return way

    ways = {name: pair(domain) for domain, name in enumerate(disks, 1)}
    race(benchmark, record_property, ways)


@pytest.mark.parametrize("size", [4 << 10, 1 << 20], ids=["4K", "1M"])
def test_disk_read(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
    disks: dict[str, BlkDriver],
    size: int,
) -> None:
    """A request to a disk in each place, one at a time, into memory that stays mapped."""

    def reader(disk: BlkDriver) -> Callable[[], None]:
        address = disk.dma.allocate(size).address

        def way() -> None:
            status = disk.request(RequestType.IN, writable=[(address, size)])
            assert status == BlkStatus.OK

        return way

    ways = {name: reader(disk) for name, disk in disks.items()}
    race(benchmark, record_property, ways)
