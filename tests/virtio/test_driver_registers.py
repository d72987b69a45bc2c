from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.spec import virtio_pci as spec
from viommu.virtio.driver_registers import DriverRegisters

LAYOUT: Any = spec.CommonCfg


@pytest.fixture
def registers() -> DriverRegisters:
    return DriverRegisters()


def write(registers: DriverRegisters, name: str, value: int) -> bool:
    field = getattr(LAYOUT, name)
    return registers.wrote(field.offset, value.to_bytes(field.size, "little"))


def set_up(registers: DriverRegisters, queue: int = 1, **values: int) -> None:
    write(registers, "queue_select", queue)
    for name, value in values.items():
        write(registers, f"queue_{name}", value)


def test_a_driver_that_sets_a_device_up(registers: DriverRegisters) -> None:
    for status in (1, 3):
        write(registers, "device_status", status)
    for select, word in ((0, 0x30000000), (1, 3), (9, 0xFF)):
        write(registers, "driver_feature_select", select)
        write(registers, "driver_feature", word)
    write(registers, "config_msix_vector", 4)
    set_up(
        registers,
        size=64,
        msix_vector=5,
        desc_lo=0x1000,
        desc_hi=1,
        driver_lo=0x2000,
        driver_hi=2,
        device_lo=0x3000,
        device_hi=3,
        enable=1,
    )
    write(registers, "device_status", 15)

    assert registers.status == 15
    assert registers.features == 3 << 32 | 3 << 28
    assert registers.config_vector == 4
    (queue,) = registers.queues.values()
    assert list(registers.queues) == [1]
    assert (queue.size, queue.vector, queue.enabled) == (64, 5, True)
    assert (queue.desc, queue.driver, queue.device) == (0x1_00001000, 0x2_00002000, 0x3_00003000)


def test_a_reset_forgets_everything(registers: DriverRegisters) -> None:
    write(registers, "device_status", 15)
    write(registers, "config_msix_vector", 4)
    set_up(registers, enable=1)

    assert not write(registers, "device_status", 15)
    assert write(registers, "device_status", 0)

    assert (registers.status, registers.features, registers.queues) == (0, 0, {})
    assert registers.config_vector == spec.MSI_NO_VECTOR


def test_the_size_is_what_the_device_says_until_the_driver_does(
    registers: DriverRegisters,
) -> None:
    write(registers, "queue_select", 0)
    registers.answered(LAYOUT.queue_size.offset, (128).to_bytes(2, "little"))
    assert registers.queues[0].size == 128

    set_up(registers, 0, size=32)
    registers.answered(LAYOUT.queue_size.offset, (32).to_bytes(2, "little"))
    assert registers.queues[0].size == 32


def test_a_queue_that_is_reset_is_as_new(registers: DriverRegisters) -> None:
    set_up(registers, 2, size=8, enable=1)

    write(registers, "queue_reset", 0)
    assert registers.queues[2].enabled
    write(registers, "queue_reset", 1)

    assert 2 not in registers.queues


def test_one_write_may_cover_several_registers(registers: DriverRegisters) -> None:
    addresses = bytes(range(24))

    registers.wrote(LAYOUT.queue_enable.offset, b"\1\0" + bytes(2) + addresses)

    queue = registers.queues[0]
    assert queue.enabled
    assert queue.desc == int.from_bytes(addresses[:8], "little")
    assert queue.device == int.from_bytes(addresses[16:], "little")


def test_a_register_is_written_whole_or_not(registers: DriverRegisters) -> None:
    registers.wrote(LAYOUT.queue_size.offset, b"\1")
    registers.wrote(LAYOUT.queue_desc_lo.offset + 1, b"\1\2\3")

    assert registers.queues == {}


def test_a_driver_that_selects_what_no_device_has(registers: DriverRegisters) -> None:
    for queue in range(0, 1 << 16, 100):
        set_up(registers, queue, size=8, enable=1)

    assert len(registers.queues) == 11
    assert max(registers.queues) < 1024


@given(st.lists(st.tuples(st.integers(0, 70), st.binary(max_size=64), st.booleans()), max_size=40))
def test_any_accesses_can_be_followed(accesses: list[tuple[int, bytes, bool]]) -> None:
    registers = DriverRegisters()
    for offset, data, written in accesses:
        if written:
            registers.wrote(offset, data)
        else:
            registers.answered(offset, data)
