"""Stand-alone devices that do DMA in I/O address spaces, at addresses that the server chose."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from viommu.endpoints.edu_registers import FaultPolicy, Result
from viommu.endpoints.standalone import StandaloneDevice
from viommu.testing.blk_driver import BlkDriver
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE, DirectDma, GuestRam
from viommu.testing.serving import LoopThread
from viommu.vfio_user import Client, ioas_requests
from viommu.vfio_user.loop_client import default_offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RAM_SIZE = 1 << 20


class Guest(Client):
    """A client with RAM, that has bound its device, and has two address spaces."""

    def __init__(self, path: Path) -> None:
        offers = replace(default_offers(serves=False), iommufd=True, fixed_iova=True)
        super().__init__(path, offers=offers)
        self.ram = GuestRam(RAM_SIZE)
        self.first = self.call(ioas_requests.alloc_ioas())
        self.second = self.call(ioas_requests.alloc_ioas())
        self.call(ioas_requests.bind_iommufd())
        self.attach(self.first)

    def map(self, ioas: int, size: int, *, offset: int = 0, iova: int | None = None) -> int:
        """Map a part of the RAM and return the IOVA."""
        return self.call(
            ioas_requests.ioas_map(ioas, size, fd=self.ram._fd, offset=offset, iova=iova)
        )

    def attach(self, ioas: int) -> None:
        self.call(ioas_requests.attach_ioas(ioas))

    def detach(self) -> None:
        self.call(ioas_requests.detach_ioas())

    def close(self) -> None:
        super().close()
        self.ram.close()


@pytest.fixture
def guest_of(tmp_path: Path) -> Iterator[Callable[[str], Guest]]:
    """A function that serves what is described, and returns its client."""
    devices: list[StandaloneDevice] = []
    guests: list[Guest] = []
    with LoopThread() as thread:

        def make(description: str) -> Guest:
            path = tmp_path / "device.sock"
            devices.append(thread.call(lambda: StandaloneDevice(thread.loop, description, path)))
            guests.append(Guest(path))
            return guests[-1]

        yield make
        for guest in guests:
            guest.close()
        for device in devices:
            thread.call(device.close)
            assert device.memory.regions() == []


@pytest.fixture
def guest(guest_of: Callable[[str], Guest]) -> Guest:
    return guest_of("edu")


@pytest.fixture
def edu(guest: Guest) -> Iterator[EduDriver]:
    with EduDriver(guest) as edu:
        yield edu


def test_edu_does_dma_in_one_space_and_is_refused_in_another(edu: EduDriver, guest: Guest) -> None:
    memory = guest.ram.memory
    source = guest.map(guest.first, PAGE, offset=4 * PAGE)
    target = guest.map(guest.first, PAGE, offset=9 * PAGE)
    elsewhere = guest.map(guest.second, 3 * PAGE, offset=64 * PAGE)
    memory.write(4 * PAGE + 16, b"between")

    assert edu.read_memory(source + 16, 7) == Result.OK
    assert edu.write_memory(target, 7) == Result.OK
    assert memory.read(9 * PAGE, 7) == b"between"
    # The second space has a third page, and the first one has not.
    assert edu.write_memory(elsewhere + 2 * PAGE, 7) == Result.TRANSLATION_FAULT

    guest.attach(guest.second)
    assert edu.write_memory(elsewhere + 2 * PAGE, 7) == Result.OK
    assert memory.read(66 * PAGE, 7) == b"between"
    # The same IOVA is now what the second space has there.
    assert target < elsewhere + 3 * PAGE
    memory.write(9 * PAGE, bytes(7))
    assert edu.write_memory(target, 7) == Result.OK
    assert memory.read(9 * PAGE, 7) == bytes(7)
    assert memory.read(65 * PAGE, 7) == b"between"


def test_an_address_of_the_client_s_own_choice(edu: EduDriver, guest: Guest) -> None:
    guest.map(guest.first, PAGE, offset=PAGE, iova=0x0ABC_D000)

    assert edu.write_memory(0x0ABC_D000, 8) == Result.OK
    assert edu.write_memory(0x0ABC_C000, 8) == Result.TRANSLATION_FAULT


def test_legacy_mappings_come_back_with_detach(edu: EduDriver, guest: Guest) -> None:
    guest.ram.give(guest)
    assert edu.write_memory(0, 8) == Result.TRANSLATION_FAULT

    guest.detach()
    assert edu.write_memory(0, 8) == Result.OK

    guest.attach(guest.second)
    assert edu.write_memory(0, 8) == Result.TRANSLATION_FAULT


def unmap(guest: Guest, iova: int) -> None:
    guest.call(ioas_requests.ioas_unmap(guest.first, iova, PAGE))


WAYS_TO_TAKE = {
    "unmap": unmap,
    "unmap all": lambda guest, _: guest.call(ioas_requests.ioas_unmap_all(guest.first)),
    "attach": lambda guest, _: guest.attach(guest.second),
    "detach": lambda guest, _: guest.detach(),
}


@pytest.mark.parametrize("take", WAYS_TO_TAKE.values(), ids=WAYS_TO_TAKE)
def test_what_the_device_holds_is_waited_for(
    edu: EduDriver, guest: Guest, take: Callable[[Guest, int], None]
) -> None:
    guest.ram.memory.write(PAGE, b"data")
    iova = guest.map(guest.first, PAGE, offset=PAGE)
    edu.hold(100)
    assert edu.read_memory(iova, 4) == Result.OK
    guest.ram.memory.write(PAGE, bytes(4))
    edu.start_write(iova, 4)

    take(guest, iova)

    assert guest.ram.memory.read(PAGE, 4) == b"data", "answered before the data was there"
    assert edu.wait() == Result.OK
    times = edu.times
    assert times.exported < times.faulted <= times.released
    assert edu.write_memory(iova, 4) == Result.TRANSLATION_FAULT


def test_the_space_that_follows_is_there_when_the_answer_is(edu: EduDriver, guest: Guest) -> None:
    first = guest.map(guest.first, PAGE)
    second = guest.map(guest.second, PAGE, offset=PAGE)
    edu.hold(5000, FaultPolicy.RELEASE)
    edu.start_write(first, 4)

    guest.attach(guest.second)

    assert edu.wait() == Result.ABORTED
    edu.hold(0)
    assert edu.write_memory(second, 4) == Result.OK


def test_a_disk_has_its_rings_and_data_where_the_server_put_them(
    guest_of: Callable[[str], Guest], tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(64 << 10))
    guest = guest_of(f"blk,path={image}")
    # The server gives the lowest address again, so it is known before there is RAM.
    start = guest.map(guest.first, PAGE)
    guest.call(ioas_requests.ioas_unmap(guest.first, start, PAGE))
    with GuestRam(RAM_SIZE, start) as ram:
        request = ioas_requests.ioas_map(guest.first, RAM_SIZE, fd=ram._fd)
        assert guest.call(request) == start != 0

        with BlkDriver(guest, DirectDma(ram)) as disk:
            assert disk.read(0, 32) == image.read_bytes()[: 32 * 512]
            data = os.urandom(32 * 512)
            disk.write(64, data)
            disk.flush()
    assert image.read_bytes()[64 * 512 : 96 * 512] == data
