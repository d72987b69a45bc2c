"""The whole chain: guest drivers, sockets, a machine, its IOMMU, and the endpoints behind it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from viommu.endpoints.edu_registers import FaultPolicy, Register, Result
from viommu.errors import Access
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_blk import RequestType
from viommu.spec.virtio_blk import Status as BlkStatus
from viommu.spec.virtio_config import STATUS_DEVICE_NEEDS_RESET
from viommu.spec.virtio_iommu import FaultReason, ReservedKind, Status
from viommu.testing.blk_driver import BlkDriver, BlkError
from viommu.testing.edu_driver import EduDriver, Times
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.iommu_driver import (
    FaultReport,
    IommuDriver,
    MappedDma,
    Reserved,
    attach_request,
    detach_request,
    map_request,
    unmap_request,
)
from viommu.testing.serving import LoopThread
from viommu.vfio_user.client import Client
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Iterator

IOMMU = Bdf.parse("00:05.0")
EDU = Bdf.parse("00:06.0")
DISK = Bdf.parse("00:07.0")
RAM_SIZE = 8 << 20
DISK_SIZE = 1 << 20
DOMAIN = 3
IOVA = 0x5_0000_0000
READ_FAULT = spec.FAULT_F_ADDRESS | spec.FAULT_F_READ
WRITE_FAULT = spec.FAULT_F_ADDRESS | spec.FAULT_F_WRITE


class Clock:
    """The server's time in seconds, moved by :meth:`advance`."""

    server: LoopThread

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> int:
        """Let time pass in the server and return the time, in nanoseconds."""

        def move() -> None:
            self.now += seconds

        self.server.call(move)
        return int(self.now * 1e9)


class Guest:
    """One VM: its memory, and the drivers of everything that is served."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.ram = stack.enter_context(GuestRam(RAM_SIZE))
        self.iommu = stack.enter_context(IommuDriver(self.connect(IOMMU), self.ram))
        # Faults are not reported before the first request: a kernel isn't ready for them.
        assert self.iommu.probe(EDU.number)[0] == Status.OK

    def connect(self, bdf: Bdf) -> Client:
        client = self._stack.enter_context(Client(self._directory / f"{bdf}.sock"))
        self.ram.give(client)
        return client

    def edu(self) -> EduDriver:
        return self._stack.enter_context(EduDriver(self.connect(EDU)))

    def disk(self, dma: MappedDma) -> BlkDriver:
        return self._stack.enter_context(BlkDriver(self.connect(DISK), dma))

    def attach(self, bdf: Bdf, domain: int = DOMAIN) -> None:
        assert self.iommu.attach(domain, bdf.number) == Status.OK

    def page(self, content: bytes = b"") -> int:
        gpa = self.ram.pages.allocate(PAGE)
        self.ram.memory.write(gpa, content.ljust(PAGE, b"\0"))
        return gpa

    def map(
        self, iova: int, gpa: int, size: int = PAGE, access: Access = Access.READ | Access.WRITE
    ) -> None:
        assert self.iommu.map(DOMAIN, iova, gpa, size, access) == Status.OK


@pytest.fixture
def directory() -> Iterator[Path]:
    # A socket's path must be short; that of pytest's own directory need not be.
    with tempfile.TemporaryDirectory(prefix="viommu-") as name:
        yield Path(name)


@pytest.fixture
def image(directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture
def clock(directory: Path, image: Path) -> Iterator[Clock]:
    """Everything served, with time that stands still until a test moves it."""
    options = MachineOptions(directory, IOMMU, [(EDU, "edu"), (DISK, f"blk,path={image}")])
    clock = Clock()
    loop = Loop(clock)
    with contextlib.closing(loop), LoopThread(loop) as server:
        clock.server = server
        machine = server.call(lambda: Machine(loop, options))
        yield clock
        server.call(machine.close)


@pytest.fixture
def guest(clock: Clock, directory: Path) -> Iterator[Guest]:
    with contextlib.ExitStack() as stack:
        yield Guest(directory, stack)


def test_probe_tells_the_msi_window(guest: Guest) -> None:
    status, regions = guest.iommu.probe(DISK.number)
    assert status == Status.OK
    assert regions == [Reserved(0xFEE0_0000, 0xFEF0_0000, ReservedKind.MSI)]
    assert guest.iommu.probe(0xFFFF) == (Status.NOENT, [])


def test_a_disk_behind_the_iommu(guest: Guest, image: Path) -> None:
    guest.attach(DISK)
    disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA))
    content = image.read_bytes()
    assert disk.capacity == DISK_SIZE // 512
    assert disk.get_id() == "disk.img"
    assert disk.read(8, 256) == content[8 * 512 : 264 * 512]
    data = os.urandom(64 << 10)
    disk.write(1000, data)
    disk.flush()
    disk.discard(0, 8)
    disk.write_zeroes(8, 8)
    disk.write_zeroes(16, 8, unmap=True)
    expected = bytearray(content)
    expected[1000 * 512 : 1000 * 512 + len(data)] = data
    expected[: 24 * 512] = bytes(24 * 512)
    assert image.read_bytes() == expected
    assert guest.iommu.faults() == []


def test_a_disk_reaches_only_what_was_mapped(guest: Guest, image: Path) -> None:
    guest.attach(DISK)
    disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA))
    secret = guest.page(b"secret" * 85)
    before = image.read_bytes()

    # A guest physical address is no IOVA, whichever way the data would go.
    status = disk.request(RequestType.OUT, 0, readable=[(secret, 512)])
    assert status == BlkStatus.IOERR
    assert guest.iommu.next_fault() == FaultReport(
        FaultReason.MAPPING, READ_FAULT, DISK.number, secret
    )
    assert disk.request(RequestType.IN, 0, writable=[(secret, 512)]) == BlkStatus.IOERR
    assert guest.iommu.next_fault() == FaultReport(
        FaultReason.MAPPING, WRITE_FAULT, DISK.number, secret
    )

    # Read-only is read-only.
    guest.map(IOVA - PAGE, secret, access=Access.READ)
    assert disk.request(RequestType.IN, 0, writable=[(IOVA - PAGE, 512)]) == BlkStatus.IOERR
    assert guest.iommu.next_fault().address == IOVA - PAGE
    assert image.read_bytes() == before
    assert guest.ram.memory.read(secret, 510) == b"secret" * 85
    assert disk.request(RequestType.OUT, 0, readable=[(IOVA - PAGE, 512)]) == BlkStatus.OK
    assert image.read_bytes()[:510] == b"secret" * 85
    assert guest.iommu.faults() == []


def test_a_request_past_the_end_fails_and_the_disk_goes_on(guest: Guest) -> None:
    guest.attach(DISK)
    disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA))
    with pytest.raises(BlkError, match="status 1"):
        disk.read(DISK_SIZE // 512, 1)
    assert len(disk.read(0, 1)) == 512


@pytest.mark.parametrize("bits", [b"\xff", b"\x00\x10"])
def test_dma_both_ways(guest: Guest, bits: bytes) -> None:
    guest.attach(EDU)
    edu = guest.edu()
    data = (bits + os.urandom(60)) * (PAGE // 64)
    source, target = guest.page(data), guest.page()
    guest.map(IOVA, source, access=Access.READ)
    guest.map(IOVA + PAGE, target, access=Access.WRITE)
    size = len(data)
    assert edu.read_memory(IOVA, size) == Result.OK
    assert edu.write_memory(IOVA + PAGE, size) == Result.OK
    assert guest.ram.memory.read(target, size) == data
    assert edu.factorial(12) == 479001600


def test_stray_dma_is_blocked_and_reported(guest: Guest) -> None:
    edu = guest.edu()
    page = guest.page(b"untouched")
    # Not attached: everything is blocked, and the reason is the domain.
    assert edu.write_memory(page, 8) == Result.TRANSLATION_FAULT
    assert guest.iommu.next_fault() == FaultReport(
        FaultReason.DOMAIN, WRITE_FAULT, EDU.number, page
    )
    guest.attach(EDU)
    guest.map(IOVA, page, access=Access.READ)
    for iova in (IOVA, IOVA + PAGE - 4, IOVA + PAGE, page):
        assert edu.write_memory(iova, 8) == Result.TRANSLATION_FAULT
        assert guest.iommu.next_fault() == FaultReport(
            FaultReason.MAPPING, WRITE_FAULT, EDU.number, iova
        )
    assert guest.iommu.unmap(DOMAIN, IOVA, PAGE) == Status.OK
    assert edu.read_memory(IOVA, 8) == Result.TRANSLATION_FAULT
    assert guest.iommu.next_fault() == FaultReport(
        FaultReason.MAPPING, READ_FAULT, EDU.number, IOVA
    )
    assert guest.ram.memory.read(page, 9) == b"untouched"


def test_an_unmap_completes_only_after_the_release(guest: Guest, clock: Clock) -> None:
    guest.attach(EDU)
    guest.attach(DISK)
    disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA + (1 << 30)))
    edu = guest.edu()
    page = guest.page()
    guest.map(IOVA, page)
    edu.hold(2000)
    exported = clock.advance(0)
    edu.start_write(IOVA, 64)
    clock.advance(1)
    unmap, later = guest.iommu.submit(
        unmap_request(DOMAIN, IOVA, PAGE), map_request(DOMAIN, IOVA, page, PAGE, Access.READ)
    )
    # Requests behind it wait, and everything else runs.
    with pytest.raises(TimeoutError):
        guest.iommu.wait(unmap, 0.02)
    assert disk.request(RequestType.FLUSH) == BlkStatus.OK
    assert not guest.iommu.is_done(unmap)
    assert not guest.iommu.is_done(later)

    released = clock.advance(1)
    reply = guest.iommu.wait(unmap)
    assert (reply.status, reply.length) == (Status.OK, spec.TAIL_SIZE)
    assert guest.iommu.wait(later).status == Status.OK
    assert edu.wait() == Result.OK
    assert edu.times == Times(exported, exported + 10**9, released)
    assert edu.write_memory(IOVA, 64) == Result.TRANSLATION_FAULT


def test_an_endpoint_may_let_go_at_once(guest: Guest) -> None:
    guest.attach(EDU)
    edu = guest.edu()
    guest.map(IOVA, guest.page())
    edu.hold(5000, FaultPolicy.RELEASE)
    edu.start_write(IOVA, 64)
    assert guest.iommu.unmap(DOMAIN, IOVA, PAGE) == Status.OK
    assert edu.wait() == Result.ABORTED


def test_detach_of_an_endpoint_in_flight_waits_too(guest: Guest, clock: Clock) -> None:
    guest.attach(EDU)
    edu = guest.edu()
    guest.map(IOVA, guest.page())
    edu.hold(50)
    edu.start_write(IOVA, 64)
    (detach,) = guest.iommu.submit(detach_request(DOMAIN, EDU.number))
    with pytest.raises(TimeoutError):
        guest.iommu.wait(detach, 0.02)
    clock.advance(0.05)
    assert guest.iommu.wait(detach).status == Status.OK
    assert edu.times.released
    assert edu.write_memory(IOVA, 64) == Result.TRANSLATION_FAULT
    assert guest.iommu.next_fault().reason == FaultReason.DOMAIN


@pytest.mark.parametrize("leave", ["reset", "bus master", "disconnect"])
def test_an_endpoint_that_leaves_has_released(guest: Guest, leave: str) -> None:
    guest.attach(EDU)
    edu = guest.edu()
    guest.map(IOVA, guest.page())
    edu.hold(5000)
    edu.start_write(IOVA, 64)
    (unmap,) = guest.iommu.submit(unmap_request(DOMAIN, IOVA, PAGE))
    with pytest.raises(TimeoutError):
        guest.iommu.wait(unmap, 0.02)
    if leave == "reset":
        edu.pci.reset_function()
    elif leave == "bus master":
        edu.pci.set_bus_master(enabled=False)
    else:
        edu.pci.client.close()
    assert guest.iommu.wait(unmap).status == Status.OK


def test_two_endpoints_share_a_domain(guest: Guest, image: Path) -> None:
    guest.attach(EDU)
    page = guest.page(os.urandom(512))
    guest.map(IOVA, page)  # before the disk is attached: it is replayed
    guest.attach(DISK)
    disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA + PAGE))
    edu = guest.edu()
    assert edu.read_memory(IOVA, 512) == Result.OK
    assert disk.request(RequestType.OUT, 5, readable=[(IOVA, 512)]) == BlkStatus.OK
    assert image.read_bytes()[5 * 512 : 6 * 512] == guest.ram.memory.read(page, 512)


def test_an_endpoint_moves_between_domains(guest: Guest) -> None:
    guest.attach(EDU, 1)
    edu = guest.edu()
    first, second = guest.page(b"first"), guest.page(b"second")
    assert guest.iommu.map(1, IOVA, first, PAGE) == Status.OK
    statuses = [
        guest.iommu.wait(pending).status
        for pending in guest.iommu.submit(
            attach_request(2, EDU.number),
            map_request(2, IOVA, second, PAGE, Access.READ),
        )
    ]
    assert statuses == [Status.OK, Status.OK]
    assert edu.read_memory(IOVA, 6) == Result.OK
    assert guest.iommu.map(2, IOVA + PAGE, first, PAGE) == Status.OK
    assert edu.write_memory(IOVA + PAGE, 6) == Result.OK
    assert guest.ram.memory.read(first, 6) == b"second"


def test_a_bypass_domain_reaches_memory_by_its_address(guest: Guest) -> None:
    edu = guest.edu()
    status = guest.iommu.attach(9, EDU.number, flags=spec.ATTACH_F_BYPASS)
    assert status == Status.OK
    source, target = guest.page(b"by address"), guest.page()
    assert edu.read_memory(source, 10) == Result.OK
    assert edu.write_memory(target, 10) == Result.OK
    assert guest.ram.memory.read(target, 10) == b"by address"


@pytest.mark.usefixtures("clock")
def test_the_next_guest_finds_everything_as_after_power_on(directory: Path, image: Path) -> None:
    for sector in range(2):
        with contextlib.ExitStack() as stack:
            guest = Guest(directory, stack)
            edu = guest.edu()
            assert edu.read(Register.TRANSFERS) == 0
            assert edu.write_memory(IOVA, 8) == Result.TRANSLATION_FAULT
            assert guest.iommu.next_fault().reason == FaultReason.DOMAIN
            guest.attach(DISK)
            disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA))
            disk.write(sector, bytes([sector + 1]) * 512)
    assert image.read_bytes()[:1024] == b"\1" * 512 + b"\2" * 512


def test_the_disk_is_free_once_the_machine_is_closed(directory: Path, image: Path) -> None:
    options = MachineOptions(directory, IOMMU, [(DISK, f"blk,path={image}")])
    with LoopThread() as server:
        for _ in range(2):
            machine = server.call(lambda: Machine(server.loop, options))
            server.call(machine.close)


def test_memory_is_read_once_it_is_unmapped_no_more(guest: Guest) -> None:
    """A ring whose mapping is gone breaks the disk, not the server."""
    guest.attach(DISK)
    dma = MappedDma(guest.iommu, DOMAIN, IOVA)
    disk = guest.disk(dma)
    disk.flush()
    assert guest.iommu.unmap(DOMAIN, IOVA, 1 << 30) == Status.OK
    ticket = disk.queue.add([(IOVA, 16)], [(IOVA + 64, 1)])
    disk.queue.kick(always=True)
    with pytest.raises(TimeoutError):
        disk.queue.wait(ticket, 0.05)
    assert disk.virtio.status & STATUS_DEVICE_NEEDS_RESET
    assert guest.iommu.next_fault().endpoint == DISK.number
    assert guest.iommu.probe(EDU.number)[0] == Status.OK
