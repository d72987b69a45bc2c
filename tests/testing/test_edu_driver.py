from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.testing.served import connected
from viommu.basic import BasicMemoryMapper
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.edu_registers import Command, FaultPolicy, Register, Result
from viommu.errors import Access, UsageError
from viommu.mapper import MappingInfo
from viommu.memory import GuestMemory
from viommu.pci import Identity, PciFunction
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE, GuestRam

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.loop import Loop

IOVA = 0x7000_0000


def make_edu(loop: Loop) -> EduFunction:
    """An edu whose IOMMU maps one page for reading and one for writing."""
    memory, mapper = GuestMemory(), BasicMemoryMapper()
    mapper.add_map(MappingInfo(IOVA, 0, PAGE, Access.READ))
    mapper.add_map(MappingInfo(IOVA + PAGE, PAGE, PAGE, Access.WRITE))
    dma = EndpointDma(mapper, memory, lambda fault: None, loop)
    return EduFunction("edu", memory, dma, loop)


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(4 * PAGE) as ram:
        yield ram


@pytest.fixture
def edu(ram: GuestRam) -> Iterator[EduDriver]:
    with connected(make_edu) as client:
        ram.give(client)
        with EduDriver(client) as edu:
            yield edu


def test_moves_data(edu: EduDriver, ram: GuestRam) -> None:
    data = os.urandom(100)
    ram.memory.write(0, data)
    assert edu.read_memory(IOVA, 100, offset=8) == Result.OK
    assert edu.write_memory(IOVA + PAGE, 50, offset=58) == Result.OK
    assert ram.memory.read(PAGE, 50) == data[50:]
    assert edu.times.released >= edu.times.exported > 0
    assert edu.times.faulted == 0
    assert edu.read(Register.IRQ_STATUS) == 0


def test_returns_what_went_wrong(edu: EduDriver) -> None:
    assert edu.read_memory(IOVA + PAGE, 4) == Result.TRANSLATION_FAULT
    assert edu.write_memory(IOVA, 4) == Result.TRANSLATION_FAULT
    assert edu.write_memory(IOVA + PAGE, 5000) == Result.BAD_RANGE


def test_a_held_transfer_is_busy(edu: EduDriver) -> None:
    edu.hold(5000, FaultPolicy.RELEASE)
    edu.start_read(IOVA, 4)
    assert edu.read(Register.DMA_COMMAND) & Command.RUN
    with pytest.raises(TimeoutError, match="no end of the transfer"):
        edu.wait(0.01)
    edu.pci.set_bus_master(enabled=False)
    edu.pci.set_bus_master()
    assert not edu.busy
    assert edu.read(Register.RESULT) == Result.ABORTED


def test_factorial(edu: EduDriver) -> None:
    assert [edu.factorial(n) for n in (0, 5, 40)] == [1, 120, 0]


def test_what_is_no_edu_is_refused() -> None:
    def make(loop: Loop) -> PciFunction:
        return PciFunction("other", GuestMemory(), Identity(0x1234, 0x11E9, 0xFF0000))

    with connected(make) as client, pytest.raises(UsageError, match="1234:11e9 is no edu"):
        EduDriver(client)
