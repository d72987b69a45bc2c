from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.endpoints.rig import PAGE, Rig, make_rig
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.edu_registers import (
    BAR_SIZE,
    BUFFER_START,
    Command,
    FaultPolicy,
    Interrupt,
    Register,
    Result,
    StatusBit,
)
from viommu.spec import pci, vfio

if TYPE_CHECKING:
    from collections.abc import Iterator

IOVA = 0x1_2345_0000
GPA = 0x2000
ONES = 0xFFFF_FFFF


class Lines:
    """A client that counts its interrupts."""

    def __init__(self) -> None:
        self.raised: list[tuple[int, int]] = []

    def trigger(self, index: int, vector: int) -> bool:
        self.raised.append((index, vector))
        return True


class Edu:
    """The device as a driver sees it, enabled and connected."""

    def __init__(self, rig: Rig, hold_ms: int = 0) -> None:
        self.rig = rig
        rig.dma.enabled = False
        self.function = EduFunction("edu", rig.memory, rig.dma, rig.loop, hold_ms=hold_ms)
        self.lines = Lines()
        self.function.connect(self.lines)
        self.enable()

    def enable(self) -> None:
        self.command(pci.COMMAND_MASTER | pci.COMMAND_MEMORY)
        msi = self.capability(pci.CAP_ID_MSI)
        self.function.region_write(
            vfio.PCI_CONFIG_REGION_INDEX, msi + 2, pci.MSI_CTRL_ENABLE.to_bytes(2, "little")
        )

    def command(self, value: int) -> None:
        self.function.region_write(
            vfio.PCI_CONFIG_REGION_INDEX, pci.COMMAND, value.to_bytes(2, "little")
        )

    def capability(self, cap_id: int) -> int:
        config = self.function.region_read(vfio.PCI_CONFIG_REGION_INDEX, 0, 256)
        at = config[pci.CAPABILITY_LIST]
        while config[at] != cap_id:
            at = config[at + 1]
        return at

    def read(self, offset: int, count: int = 4) -> int:
        data = self.function.region_read(0, offset, count)
        assert len(data) == count
        return int.from_bytes(data, "little")

    def write(self, offset: int, value: int, count: int = 4) -> None:
        self.function.region_write(0, offset, value.to_bytes(count, "little"))

    def transfer(self, source: int, destination: int, count: int, command: int) -> None:
        self.write(Register.DMA_SOURCE, source, 8)
        self.write(Register.DMA_DESTINATION, destination, 8)
        self.write(Register.DMA_COUNT, count, 8)
        self.write(Register.DMA_COMMAND, command, 8)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with make_rig() as rig:
        yield rig


@pytest.fixture
def edu(rig: Rig) -> Iterator[Edu]:
    edu = Edu(rig)
    yield edu
    edu.function.disconnect()


def test_is_found_as_qemus_edu(edu: Edu) -> None:
    config = edu.function.region_read(vfio.PCI_CONFIG_REGION_INDEX, 0, 64)
    assert config[:4] == bytes.fromhex("3412e811")
    assert config[pci.REVISION_ID] == 0x10
    assert config[9:12] == bytes.fromhex("00ff00")
    assert config[pci.INTERRUPT_PIN] == 0
    assert edu.function.region_info(0).size == BAR_SIZE
    assert edu.function.irq_info(vfio.PCI_MSI_IRQ_INDEX).count == 1
    assert edu.function.irq_info(vfio.PCI_MSIX_IRQ_INDEX).count == 0


def test_identification_and_liveness(edu: Edu) -> None:
    assert edu.read(Register.ID) == 0x010000ED
    edu.write(Register.ID, 0)
    assert edu.read(Register.ID) == 0x010000ED
    edu.write(Register.LIVENESS, 0x1234_5678)
    assert edu.read(Register.LIVENESS) == 0xEDCB_A987


@pytest.mark.parametrize("value", [0, 1, 5, 12, 13, 33, 34, 35, 2**32 - 1])
def test_factorial_modulo_32_bits(rig: Rig, edu: Edu, value: int) -> None:
    edu.write(Register.FACTORIAL, value)
    assert edu.read(Register.STATUS) == StatusBit.COMPUTING
    edu.write(Register.FACTORIAL, 3)  # ignored: it is computing
    rig.advance(0)
    assert edu.read(Register.STATUS) == 0
    # 34! and everything above has more than 32 factors 2.
    assert edu.read(Register.FACTORIAL) == math.factorial(min(value, 100)) % 2**32


def test_the_factorial_may_interrupt(rig: Rig, edu: Edu) -> None:
    edu.write(Register.STATUS, ONES)
    assert edu.read(Register.STATUS) == StatusBit.IRQ_WHEN_COMPUTED
    edu.write(Register.FACTORIAL, 4)
    rig.advance(0)
    assert edu.lines.raised == [(vfio.PCI_MSI_IRQ_INDEX, 0)]
    assert edu.read(Register.IRQ_STATUS) == Interrupt.FACTORIAL
    edu.write(Register.STATUS, 0)
    edu.write(Register.FACTORIAL, 4)
    rig.advance(0)
    assert len(edu.lines.raised) == 1


def test_interrupts_are_raised_and_acknowledged(edu: Edu) -> None:
    edu.write(Register.IRQ_RAISE, 0)
    assert edu.lines.raised == []
    edu.write(Register.IRQ_RAISE, 0x8000_0011)
    edu.write(Register.IRQ_ACK, 0x8000_0001)
    assert edu.read(Register.IRQ_STATUS) == 0x10
    assert len(edu.lines.raised) == 1


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        (Register.ID, 1),
        (Register.ID, 2),
        (Register.ID, 8),
        (Register.ID, 3),
        (1, 4),
        (0x0C, 4),
        (Register.IRQ_RAISE, 4),
        (Register.DMA_SOURCE, 2),
        (Register.DMA_SOURCE, 16),
        (Register.DMA_SOURCE + 4, 4),
        (0xA0, 8),
        (Register.RELEASED_AT + 8, 8),
        (Register.RELEASED_AT + 12, 4),
        (Register.HOLD + 4, 8),
        (0x40000, 4),
        (BAR_SIZE - 1, 1),
        (0, BAR_SIZE),
    ],
)
def test_what_is_no_register_reads_as_ones(edu: Edu, offset: int, count: int) -> None:
    edu.function.region_write(0, offset, bytes(count))
    assert edu.read(offset, count) == (1 << 8 * count) - 1
    assert edu.read(Register.ID) == 0x010000ED


def test_dma_registers_take_both_widths(edu: Edu) -> None:
    edu.write(Register.DMA_SOURCE, 0x1122_3344_5566_7788, 8)
    assert edu.read(Register.DMA_SOURCE, 8) == 0x1122_3344_5566_7788
    assert edu.read(Register.DMA_SOURCE) == 0x5566_7788
    edu.write(Register.DMA_SOURCE, 0x99)
    assert edu.read(Register.DMA_SOURCE, 8) == 0x99


def test_dma_moves_data_through_the_device(rig: Rig, edu: Edu) -> None:
    rig.map(IOVA, GPA, 2 * PAGE)
    content = os.urandom(PAGE)
    rig.memory.write(GPA, content)
    edu.transfer(IOVA, BUFFER_START, PAGE, Command.RUN)
    assert edu.read(Register.DMA_COMMAND, 8) == Command.RUN
    edu.write(Register.DMA_COUNT, 1, 8)  # ignored: it is running
    rig.advance(0)
    assert edu.read(Register.DMA_COMMAND, 8) == 0
    assert edu.read(Register.DMA_COUNT, 8) == PAGE
    edu.transfer(BUFFER_START, IOVA + PAGE, PAGE, Command.RUN | Command.TO_MEMORY | Command.IRQ)
    rig.advance(0)
    assert rig.memory.read(GPA + PAGE, PAGE) == content
    assert edu.read(Register.DMA_COMMAND, 8) == Command.TO_MEMORY | Command.IRQ
    assert edu.read(Register.IRQ_STATUS) == Interrupt.DMA
    assert edu.lines.raised == [(vfio.PCI_MSI_IRQ_INDEX, 0)]
    assert edu.read(Register.RESULT) == Result.OK
    assert edu.read(Register.TRANSFERS) == 2


def test_our_registers_show_what_happened_when(rig: Rig, edu: Edu) -> None:
    rig.map(IOVA, GPA, PAGE)
    edu.write(Register.HOLD, 500)
    edu.write(Register.FAULT_POLICY, FaultPolicy.RELEASE)
    edu.transfer(BUFFER_START, IOVA, 8, Command.RUN | Command.TO_MEMORY)
    rig.advance(0.25)
    rig.unmap(IOVA, PAGE)
    rig.advance(0)
    assert edu.read(Register.RESULT) == Result.ABORTED
    assert edu.read(Register.EXPORTED_AT, 8) == 1_000_000_000_000
    assert edu.read(Register.FAULTED_AT, 8) == 1_000_250_000_000
    assert edu.read(Register.RELEASED_AT, 8) == 1_000_250_000_000
    low, high = edu.read(Register.RELEASED_AT), edu.read(Register.RELEASED_AT + 4)
    assert low | high << 32 == 1_000_250_000_000
    assert edu.read(Register.HOLD, 8) == 500
    assert edu.read(Register.FAULT_POLICY) == FaultPolicy.RELEASE


def test_without_bus_mastering_dma_fails_unseen(rig: Rig, edu: Edu) -> None:
    rig.map(IOVA, GPA, PAGE)
    edu.command(pci.COMMAND_MEMORY)
    edu.transfer(BUFFER_START, IOVA, 8, Command.RUN | Command.TO_MEMORY)
    rig.advance(0)
    assert edu.read(Register.RESULT) == Result.TRANSLATION_FAULT
    assert not rig.faults


def test_bus_mastering_off_ends_a_transfer(rig: Rig) -> None:
    edu = Edu(rig, hold_ms=1000)
    rig.map(IOVA, GPA, PAGE)
    edu.transfer(BUFFER_START, IOVA, 8, Command.RUN | Command.TO_MEMORY)
    assert rig.exports == 1
    edu.command(0)
    assert rig.exports == 0
    assert edu.read(Register.RESULT) == Result.ABORTED


@pytest.mark.parametrize("kind", ["flr", "reset", "disconnect"])
def test_every_reset_releases_and_forgets(rig: Rig, kind: str) -> None:
    edu = Edu(rig, hold_ms=1000)
    rig.map(IOVA, GPA, PAGE)
    edu.write(Register.FACTORIAL, 5)
    edu.write(Register.LIVENESS, 5)
    edu.write(Register.IRQ_RAISE, 5)
    edu.transfer(BUFFER_START, IOVA, 8, Command.RUN | Command.TO_MEMORY | Command.IRQ)
    if kind == "flr":
        express = edu.capability(pci.CAP_ID_EXPRESS)
        edu.function.region_write(
            vfio.PCI_CONFIG_REGION_INDEX,
            express + pci.EXP_DEVCTL,
            pci.EXP_DEVCTL_FLR.to_bytes(2, "little"),
        )
    else:
        getattr(edu.function, kind)()
    assert rig.exports == 0
    assert not rig.dma.enabled
    edu.lines.raised.clear()
    rig.advance(2)
    for register in Register:
        if register not in (Register.ID, Register.IRQ_RAISE, Register.IRQ_ACK, Register.HOLD):
            assert edu.read(register) == 0, register
    assert edu.lines.raised == []


@given(
    accesses=st.lists(
        st.tuples(
            st.sampled_from([*Register]) | st.integers(0, 0x300),
            st.sampled_from([1, 2, 4, 8]),
            st.sampled_from([0, 1, 3, 7, BUFFER_START, BUFFER_START + 4095, IOVA, IOVA + PAGE - 1])
            | st.integers(0, 2**64 - 1),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_no_access_raises_or_leaks(accesses: list[tuple[int, int, int, bool]]) -> None:
    with make_rig() as rig:
        rig.map(IOVA, GPA, PAGE)
        edu = Edu(rig)
        for offset, count, value, write in accesses:
            if write:
                edu.write(offset, value & (1 << 8 * count) - 1, count)
            else:
                edu.read(offset, count)
            rig.advance(0.001)
        rig.advance(10)
        assert rig.exports == 0
