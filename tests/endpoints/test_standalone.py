"""Stand-alone devices, driven over their sockets by the drivers of `viommu.testing`."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.endpoints.background_client import BackgroundClient
from viommu.endpoints.edu_registers import BUFFER_SIZE, FaultPolicy, Result
from viommu.endpoints.standalone import StandaloneDevice
from viommu.errors import PeerError, UsageError
from viommu.spec.virtio_blk import RequestType, Status
from viommu.testing.blk_driver import BlkDriver, BlkError
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE, DirectDma, GuestRam
from viommu.testing.serving import LoopThread
from viommu.vfio_user import requests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RAM_SIZE = 1 << 20
HALF = RAM_SIZE // 2
DISK_SIZE = 256 << 10
MODES = ["shared", "by message", "both"]


class Host(NamedTuple):
    """A device in a process of its own, as far as a thread is one."""

    thread: LoopThread
    device: StandaloneDevice
    path: Path


@contextmanager
def hosted(description: str, directory: Path) -> Iterator[Host]:
    path = directory / "device.sock"
    with LoopThread() as thread:
        device = thread.call(lambda: StandaloneDevice(thread.loop, description, path))
        try:
            yield Host(thread, device, path)
        finally:
            thread.call(device.close)
    assert not path.exists()


class Guest:
    """A machine that has given the device its memory: shared, to be asked for, or half of each."""

    def __init__(self, path: Path, mode: str) -> None:
        self.mode = mode
        self.ram = GuestRam(RAM_SIZE)
        memory = None if mode == "shared" else self.ram.memory
        self.client = BackgroundClient(path, memory)
        self.give()

    @property
    def regions(self) -> list[tuple[int, int, int | None]]:
        """Start, size and file of what is mapped."""
        fd = self.ram._fd
        match self.mode:
            case "shared":
                return [(0, RAM_SIZE, fd)]
            case "by message":
                return [(0, RAM_SIZE, None)]
            case _:  # a border through most of what is transferred
                return [(at, PAGE, fd if at // PAGE % 2 else None) for at in range(0, HALF, PAGE)]

    def give(self) -> None:
        for at, size, fd in self.regions:
            self.client.dma_map(at, size, fd=fd, offset=at if fd is not None else 0)

    def take_back(self) -> None:
        for at, size, _ in self.regions:
            self.client.dma_unmap(at, size)

    def close(self) -> None:
        self.client.close()
        self.ram.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture
def edu_host(tmp_path: Path) -> Iterator[Host]:
    with hosted("edu", tmp_path) as host:
        yield host


@pytest.fixture(params=MODES)
def edu_guest(edu_host: Host, request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = Guest(edu_host.path, request.param)
    yield guest
    guest.close()


@pytest.fixture
def edu(edu_guest: Guest) -> Iterator[EduDriver]:
    with EduDriver(edu_guest.client) as edu:
        yield edu


@pytest.fixture
def disk_host(image: Path, tmp_path: Path) -> Iterator[Host]:
    with hosted(f"blk,path={image},serial=alone", tmp_path) as host:
        yield host


@pytest.fixture(params=MODES)
def disk_guest(disk_host: Host, request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = Guest(disk_host.path, request.param)
    yield guest
    guest.close()


# --- the endpoint does what it does behind an IOMMU


def test_edu_copies_memory(edu: EduDriver, edu_guest: Guest) -> None:
    memory = edu_guest.ram.memory
    data = os.urandom(BUFFER_SIZE)
    memory.write(PAGE - 100, data)
    assert edu.read_memory(PAGE - 100, BUFFER_SIZE) == Result.OK
    assert edu.write_memory(8 * PAGE + 1, BUFFER_SIZE) == Result.OK
    assert memory.read(8 * PAGE, BUFFER_SIZE + 2) == b"\0" + data + b"\0"
    assert edu.factorial(5) == 120


def test_a_disk_reads_and_writes(disk_guest: Guest, image: Path) -> None:
    before = image.read_bytes()
    with BlkDriver(disk_guest.client, DirectDma(disk_guest.ram)) as disk:
        assert disk.capacity == DISK_SIZE // 512
        assert disk.get_id() == "alone"
        assert disk.read(0, 16) == before[:8192]
        data = os.urandom(160 * 512)  # in more than one message
        disk.write(16, data)
        disk.flush()
        assert disk.read(16, 160) == data
        disk.write_zeroes(20, 2)
        assert disk.read(19, 4) == data[1536:2048] + bytes(1024) + data[3072:3584]
    after = image.read_bytes()
    assert after[: 16 * 512] + after[176 * 512 :] == before[: 16 * 512] + before[176 * 512 :]


def test_the_disk_lives_through_many_requests(disk_guest: Guest, image: Path) -> None:
    expected = bytearray(image.read_bytes())
    with BlkDriver(disk_guest.client, DirectDma(disk_guest.ram)) as disk:
        for number in range(40):
            data = os.urandom(1024)
            at = number * 7 % 500
            disk.write(at, data)
            expected[at * 512 : at * 512 + 1024] = data
            assert disk.read(at, 2) == data
    assert image.read_bytes() == expected


# --- what is not mapped, or not like that


def test_what_is_not_mapped_is_not_reached(edu: EduDriver, edu_guest: Guest) -> None:
    assert edu.write_memory(RAM_SIZE, 4) == Result.TRANSLATION_FAULT
    end = RAM_SIZE if edu_guest.mode != "both" else HALF
    assert edu.read_memory(end - 2, 4) == Result.TRANSLATION_FAULT
    edu_guest.take_back()
    assert edu.write_memory(0, 4) == Result.TRANSLATION_FAULT
    edu_guest.give()
    assert edu.write_memory(0, 4) == Result.OK


@pytest.mark.parametrize("shared", [True, False])
def test_the_protection_is_that_of_the_message(edu_host: Host, shared: bool) -> None:
    guest = Guest(edu_host.path, "by message")
    guest.take_back()
    fd = guest.ram._fd if shared else None
    guest.client.dma_map(0, PAGE, fd=fd, writable=False)
    guest.client.dma_map(PAGE, PAGE, fd=fd, offset=PAGE, readable=False)
    guest.client.dma_map(2 * PAGE, PAGE, fd=fd, readable=False, writable=False)
    with EduDriver(guest.client) as edu:
        assert edu.read_memory(0, 4) == Result.OK
        assert edu.write_memory(0, 4) == Result.TRANSLATION_FAULT
        assert edu.write_memory(PAGE, 4) == Result.OK
        assert edu.read_memory(PAGE, 4) == Result.TRANSLATION_FAULT
        assert edu.read_memory(2 * PAGE, 4) == Result.TRANSLATION_FAULT
        assert edu.write_memory(2 * PAGE, 4) == Result.TRANSLATION_FAULT
    guest.close()


def test_a_device_without_the_bus_reaches_nothing(edu: EduDriver, edu_guest: Guest) -> None:
    edu.pci.set_bus_master(enabled=False)
    edu.start_write(0, 4)
    edu.pci.set_bus_master()
    assert edu.read_memory(0, 4) == Result.OK
    assert edu_guest.ram.memory.read(0, 4) == bytes(4)


def test_memory_of_a_client_that_serves_none_is_out_of_reach(edu_host: Host) -> None:
    client = BackgroundClient(edu_host.path)
    client.dma_map(0, PAGE)
    with EduDriver(client) as edu:
        assert edu.write_memory(0, 4) == Result.NO_MEMORY
    with pytest.raises(PeerError):
        client.device_info()  # it is told why, as QEMU is
    client.close()


def test_memory_that_can_be_asked_for_is_no_reason_to_refuse(edu_guest: Guest) -> None:
    assert edu_guest.client.device_info().num_regions == 9


def test_what_the_client_refuses_is_an_error_of_the_device(disk_host: Host) -> None:
    """Mapped, and yet not there when it is asked for: the device lives on."""
    guest = Guest(disk_host.path, "by message")
    guest.client.dma_map(1 << 40, PAGE)
    with BlkDriver(guest.client, DirectDma(guest.ram)) as disk:
        status = disk.request(RequestType.IN, writable=[(1 << 40, 512)])
        assert status == Status.IOERR
        with pytest.raises(BlkError):
            disk.read(DISK_SIZE // 512, 1)
        assert len(disk.read(0, 1)) == 512
    guest.close()


# --- DMA_UNMAP waits until nobody holds the memory


@pytest.mark.parametrize("everything", [False, True])
def test_an_unmap_is_answered_when_the_device_has_let_go(
    edu: EduDriver, edu_guest: Guest, edu_host: Host, everything: bool
) -> None:
    edu.hold(100)
    edu_guest.ram.memory.write(0, b"data")
    assert edu.read_memory(0, 4) == Result.OK
    edu_guest.ram.memory.write(0, bytes(4))
    edu.start_write(0, 4)
    if everything:
        edu_guest.client.dma_unmap_all()
    else:
        at, size, _ = edu_guest.regions[0]
        edu_guest.client.dma_unmap(at, size)
    assert edu_guest.ram.memory.read(0, 4) == b"data", "it was answered before the data was there"
    assert edu.times.released > edu.times.exported
    assert edu.wait() == Result.OK
    regions = edu_host.thread.call(edu_host.device.memory.regions)
    assert len(regions) == (0 if everything else len(edu_guest.regions) - 1)


def test_a_device_may_let_go_at_once(edu: EduDriver, edu_guest: Guest) -> None:
    edu.hold(5000, FaultPolicy.RELEASE)
    edu.start_write(0, 4)
    edu_guest.take_back()
    assert edu.wait() == Result.ABORTED
    assert edu_guest.ram.memory.read(0, 4) == bytes(4)


def test_what_is_not_mapped_can_not_be_unmapped(edu_guest: Guest) -> None:
    with pytest.raises(PeerError, match="No such file"):
        edu_guest.client.dma_unmap(0, 17)


def test_a_client_may_leave_while_it_waits_for_an_unmap(
    edu: EduDriver, edu_guest: Guest, edu_host: Host
) -> None:
    edu.hold(5000)
    edu.start_write(0, 4)
    at, size, _ = edu_guest.regions[0]
    client = edu_guest.client
    client._thread.call(lambda: client._link.submit(requests.dma_unmap(at, size)))
    client.close()
    again = Guest(edu_host.path, edu_guest.mode)
    with EduDriver(again.client) as other:
        assert other.write_memory(0, 4) == Result.OK
    again.close()


# --- one client after the other


def test_the_next_client_finds_a_device_as_new(edu_host: Host) -> None:
    for _ in range(3):
        guest = Guest(edu_host.path, "by message")
        with EduDriver(guest.client) as edu:
            assert edu.write_memory(0, 4) == Result.OK
            edu.hold(5000)
            edu.start_write(0, 4)
            guest.close()
    host = edu_host.device
    assert edu_host.thread.call(lambda: (host.server.clients, host.memory.regions())) == (3, [])


def test_a_wrong_description_leaves_no_socket(tmp_path: Path) -> None:
    with LoopThread() as thread:
        for description, why in (("toaster", "toaster"), ("blk", "path"), ("blk,path=/x", "/x")):
            with pytest.raises(UsageError, match=why):
                StandaloneDevice(thread.loop, description, tmp_path / "x.sock")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_can_not_be_closes_what_was_opened(image: Path) -> None:
    with LoopThread() as thread:
        for _ in range(2):
            with pytest.raises(UsageError, match="can't listen"):
                StandaloneDevice(thread.loop, f"blk,path={image}", image)


def test_blocked_accesses_are_logged_and_not_for_ever(
    edu: EduDriver, edu_host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        assert edu.write_memory(RAM_SIZE, 4) == Result.TRANSLATION_FAULT
    assert caplog.text.count(f"write at IOVA {RAM_SIZE:#x} faulted") == 16
    assert edu_host.device.dma.blocked == 20


# --- its state


@pytest.mark.parametrize("shared", [True, False])
def test_the_snapshot_has_what_the_client_has_mapped(edu_host: Host, shared: bool) -> None:
    def look() -> dict[str, Any]:
        snapshot: dict[str, Any] = edu_host.thread.call(edu_host.device.snapshot)
        return snapshot

    assert (look()["connected"], look()["maps"]) == (False, [])
    guest = Guest(edu_host.path, "shared" if shared else "by message")
    try:
        guest.client.dma_map(1 << 40, PAGE, fd=guest.ram._fd, offset=PAGE, writable=False)
        found = look()
        assert found["connected"]
        assert found["maps"] == [
            [0, RAM_SIZE, 0 if shared else None, "rw"],
            [1 << 40, PAGE, PAGE, "r-"],
        ]
        guest.take_back()
        assert look()["maps"] == [[1 << 40, PAGE, PAGE, "r-"]]
        assert look()["counters"]["clients"] == 1
    finally:
        guest.close()


def test_what_is_taken_back_and_held_is_no_map_any_more(edu_host: Host) -> None:
    guest = Guest(edu_host.path, "shared")
    client = guest.client
    with EduDriver(client) as edu:
        edu.hold(5000)
        edu.start_write(0, 4)
        client._thread.call(lambda: client._link.submit(requests.dma_unmap(0, RAM_SIZE)))
        snapshot: dict[str, Any] = edu_host.thread.call(edu_host.device.snapshot)
        while snapshot["maps"]:
            snapshot = edu_host.thread.call(edu_host.device.snapshot)
        assert snapshot["held"] == [[0, 4, 1]]
        guest.close()
