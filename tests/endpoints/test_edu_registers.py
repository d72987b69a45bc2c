"""The numbers that drivers written for QEMU's edu rely on."""

from __future__ import annotations

from itertools import pairwise

from viommu.endpoints import edu_registers as edu
from viommu.endpoints.edu_registers import Command, Interrupt, Register, StatusBit

# QEMU, docs/specs/edu.rst
QEMU = {
    Register.ID: 0x00,
    Register.LIVENESS: 0x04,
    Register.FACTORIAL: 0x08,
    Register.STATUS: 0x20,
    Register.IRQ_STATUS: 0x24,
    Register.IRQ_RAISE: 0x60,
    Register.IRQ_ACK: 0x64,
    Register.DMA_SOURCE: 0x80,
    Register.DMA_DESTINATION: 0x88,
    Register.DMA_COUNT: 0x90,
    Register.DMA_COMMAND: 0x98,
}


def test_qemus_registers_are_where_qemu_has_them() -> None:
    assert {register: int(register) for register in QEMU} == QEMU
    assert (edu.VENDOR_ID, edu.DEVICE_ID, edu.REVISION) == (0x1234, 0x11E8, 0x10)
    assert (edu.BAR_SIZE, edu.BUFFER_START, edu.BUFFER_SIZE) == (1 << 20, 0x40000, 4096)
    assert (StatusBit.COMPUTING, StatusBit.IRQ_WHEN_COMPUTED) == (0x01, 0x80)
    assert (Command.RUN, Command.TO_MEMORY, Command.IRQ) == (1, 2, 4)
    assert (Interrupt.FACTORIAL, Interrupt.DMA) == (0x001, 0x100)


def test_ours_are_64_bit_registers_that_qemu_does_not_have() -> None:
    ours = sorted(set(Register) - set(QEMU))
    assert ours[0] == edu.EXTENSION_START
    assert ours[0] > max(QEMU)
    assert all(later - earlier == 8 for earlier, later in pairwise(ours))
    assert ours[-1] + 8 <= edu.BUFFER_START
