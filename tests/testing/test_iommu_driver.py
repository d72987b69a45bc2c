from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from viommu.device import IommuConfig
from viommu.errors import Access, GuestMemoryError, UsageError
from viommu.machine import Machine, MachineOptions
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, ReservedKind, Status
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE, DmaBuffer, GuestRam
from viommu.testing.iommu_driver import (
    IommuDriver,
    MappedDma,
    Reserved,
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
IOVA = 0x1000_0000


class Served(NamedTuple):
    directory: Path
    ram: GuestRam
    iommu: IommuDriver


@pytest.fixture
def served() -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="viommu-"))
        directory = Path(name)
        options = MachineOptions(directory, IOMMU, [(EDU, "edu")], IommuConfig(probe_size=256))
        server = stack.enter_context(LoopThread())
        machine = server.call(lambda: Machine(server.loop, options))
        stack.callback(lambda: server.call(machine.close))
        ram = stack.enter_context(GuestRam(1 << 20))
        client = stack.enter_context(Client(directory / f"{IOMMU}.sock"))
        ram.give(client)
        iommu = stack.enter_context(IommuDriver(client, ram))
        yield Served(directory, ram, iommu)


@pytest.fixture
def iommu(served: Served) -> IommuDriver:
    return served.iommu


def test_configuration(iommu: IommuDriver) -> None:
    assert iommu.config.page_size_mask & PAGE
    assert iommu.probe_size == 256


def test_every_request_returns_its_status(iommu: IommuDriver) -> None:
    assert iommu.map(1, IOVA, 0, PAGE) == Status.NOENT
    assert iommu.attach(1, EDU.number) == Status.OK
    assert iommu.attach(1, 0x999) == Status.NOENT
    assert iommu.attach(1, EDU.number, flags=1 << 5) == Status.INVAL
    assert iommu.map(1, IOVA, 0, PAGE, Access.READ) == Status.OK
    assert iommu.map(1, IOVA, 0, PAGE) == Status.INVAL
    assert iommu.unmap(1, IOVA, PAGE) == Status.OK
    assert iommu.detach(1, EDU.number) == Status.OK
    assert iommu.detach(1, EDU.number) == Status.INVAL


def test_what_is_not_written_is_no_status(iommu: IommuDriver) -> None:
    reply = iommu.request(b"\x63" + bytes(19))
    assert (reply.length, reply.status) == (0, None)
    reply = iommu.request(b"")
    assert (reply.length, reply.status) == (0, None)


def test_probe(iommu: IommuDriver) -> None:
    status, regions = iommu.probe(EDU.number)
    assert status == Status.OK
    assert regions == [Reserved(0xFEE0_0000, 0xFEF0_0000, ReservedKind.MSI)]


def test_a_batch_goes_out_with_one_kick(iommu: IommuDriver) -> None:
    assert iommu.attach(1, EDU.number) == Status.OK
    batch = iommu.submit(
        *(map_request(1, IOVA + n * PAGE, n * PAGE, PAGE, Access.READ) for n in range(10)),
        unmap_request(1, IOVA, 10 * PAGE),
    )
    assert [iommu.wait(pending).status for pending in reversed(batch)] == [Status.OK] * 11


def test_slots_come_back(iommu: IommuDriver) -> None:
    for _ in range(3):
        for pending in iommu.submit(*[b"\x63" + bytes(19)] * 32):
            assert iommu.wait(pending).length == 0
    with pytest.raises(UsageError, match="33 requests, room for 32"):
        iommu.submit(*[b""] * 33)


@pytest.mark.parametrize(("request_size", "room"), [(129, 4), (20, 2000)])
def test_what_does_not_fit_a_slot_is_refused(
    iommu: IommuDriver, request_size: int, room: int
) -> None:
    with pytest.raises(UsageError, match="up to 128 bytes, replies 1920"):
        iommu.request(bytes(request_size), room)


def test_fault_reports_come_in_order_and_do_not_run_out(served: Served) -> None:
    iommu = served.iommu
    iommu.probe(EDU.number)
    with pytest.raises(TimeoutError, match="no completion on queue 1"):
        iommu.next_fault(0.01)
    with Client(served.directory / f"{EDU}.sock") as client, EduDriver(client) as edu:
        for number in range(100):
            edu.write_memory(number * PAGE, 4)
            fault = iommu.next_fault()
            assert fault.address == number * PAGE
        assert fault.endpoint == EDU.number
        assert fault.reason == FaultReason.DOMAIN
        assert fault.flags == spec.FAULT_F_ADDRESS | spec.FAULT_F_WRITE
        for number in range(3):
            edu.read_memory(number * PAGE, 4)
        faults = [iommu.next_fault() for _ in range(3)]
        assert [fault.address for fault in faults] == [0, PAGE, 2 * PAGE]
        assert iommu.faults() == []
        edu.read_memory(5 * PAGE, 4)
        edu.read_memory(6 * PAGE, 4)
        # The report is made before the transfer ends, so both are there.
        assert [fault.address for fault in iommu.faults()] == [5 * PAGE, 6 * PAGE]


def test_mapped_buffers(served: Served) -> None:
    iommu, ram = served.iommu, served.ram
    assert iommu.attach(1, EDU.number) == Status.OK
    dma = MappedDma(iommu, 1, IOVA)
    first, second = dma.allocate(100), dma.allocate(PAGE + 1)
    assert (first.address, second.address) == (IOVA, IOVA + PAGE)
    dma.memory.write(second.address + 8, b"data")
    assert ram.memory.read(second.gpa + 8, 4) == b"data"
    assert bytes(dma.memory.views(second.address + 8, 4, write=False)[0]) == b"data"
    for address, size in ((IOVA - 1, 1), (first.address, 101), (IOVA + 3 * PAGE, 1)):
        with pytest.raises(GuestMemoryError):
            dma.memory.read(address, size)

    with Client(served.directory / f"{EDU}.sock") as client, EduDriver(client) as edu:
        ram.give(client)
        assert edu.read_memory(second.address, PAGE) == 0
        dma.free(second)
        assert edu.read_memory(second.address, PAGE) == 1
    with pytest.raises(GuestMemoryError):
        dma.memory.read(second.address, 1)
    assert dma.allocate(1).address == IOVA + 3 * PAGE


def test_a_refused_mapping_takes_no_memory(served: Served) -> None:
    dma = MappedDma(served.iommu, 7, IOVA)
    probe = served.ram.pages.allocate(1)
    served.ram.pages.free(probe)
    with pytest.raises(UsageError, match="MAP of 0x1000 bytes at 0x10000000: status 6"):
        dma.allocate(1)
    assert served.ram.pages.allocate(1) == probe
    with pytest.raises(UsageError, match="UNMAP"):
        dma.free(DmaBuffer(0, IOVA, PAGE))


def test_what_is_no_iommu_is_refused(served: Served) -> None:
    with (
        Client(served.directory / f"{EDU}.sock") as client,
        pytest.raises(UsageError, match="1234:11e8 is no modern virtio device"),
    ):
        IommuDriver(client, served.ram)
