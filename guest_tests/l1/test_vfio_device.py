"""A VFIO device through either kernel interface: regions, interrupts, reset."""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.layout import EDU, NVME, SHARED_MEMORY, SHARED_MEMORY_SIZE
from viommu.errors import BackendError
from viommu.spec import vfio

if TYPE_CHECKING:
    from guest_tests.l1.bench import Bench
    from viommu_backends.vfio_device import VfioDevice

CONFIG = vfio.PCI_CONFIG_REGION_INDEX
READ_WRITE_MMAP = (
    vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE | vfio.REGION_INFO_FLAG_MMAP
)
SIGNAL = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
SILENCE = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER
WAIT_SECONDS = 10.0

# registers of edu
RAISE_INTERRUPT, ACKNOWLEDGE = 0x60 // 4, 0x64 // 4


def opened(bench: Bench, bdf: str) -> VfioDevice:
    bench.mapper(bdf)
    return bench.devices[bdf]


def test_regions_and_interrupts_of_a_conventional_function(bench: Bench) -> None:
    edu = opened(bench, EDU)

    assert (edu.num_regions, edu.num_irqs) >= (vfio.PCI_NUM_REGIONS, vfio.PCI_NUM_IRQS)
    bar = edu.regions[0]
    assert (bar.size, bar.flags & READ_WRITE_MMAP, bar.areas) == (1 << 20, READ_WRITE_MMAP, ())
    assert edu.regions[1].size == 0
    assert edu.regions[vfio.PCI_VGA_REGION_INDEX].size == 0
    assert edu.regions[CONFIG].size == 256
    counts = [edu.irqs[index].count for index in range(vfio.PCI_NUM_IRQS)]
    assert counts == [1, 1, 0, 0, 1]  # INTx, MSI, MSI-X, errors, requests to let go
    assert not edu.can_reset


def test_regions_and_interrupts_of_an_express_function(bench: Bench) -> None:
    nvme = opened(bench, NVME)

    assert nvme.regions[CONFIG].size == 4096
    assert nvme.irqs[vfio.PCI_MSIX_IRQ_INDEX].count > 1
    assert nvme.irqs[vfio.PCI_MSIX_IRQ_INDEX].flags & vfio.IRQ_INFO_EVENTFD
    assert nvme.irqs[vfio.PCI_ERR_IRQ_INDEX].count == 1
    assert nvme.can_reset
    for region in nvme.regions:
        # Areas are pages of the region, in order.
        end = 0
        for offset, size in region.areas:
            assert end <= offset < offset + size <= region.size
            end = offset + size


def test_bars_are_mapped_from_their_places_in_the_file(bench: Bench) -> None:
    device = opened(bench, SHARED_MEMORY)
    assert device.regions[2].size == SHARED_MEMORY_SIZE
    function = bench.function(SHARED_MEMORY, bar=2)
    function.enable(master=False)

    function.bytes[0x1234:0x1238] = b"mmap"
    device.write(2, 0x2345, b"write")

    assert device.read(2, 0x1234, 4) == b"mmap"
    assert bytes(function.bytes[0x2345:0x234A]) == b"write"


def test_configuration_space(bench: Bench) -> None:
    edu = opened(bench, EDU)

    assert edu.read(CONFIG, 0, 4) == bytes.fromhex("34 12 e8 11")
    edu.write(CONFIG, 4, b"\x02\x00")
    assert edu.read(CONFIG, 4, 1) == b"\x02"
    edu.write(CONFIG, 4, b"\x00\x00")
    assert edu.read(CONFIG, 4, 1) == b"\x00"


def test_a_read_past_the_end_is_an_error_or_ones(bench: Bench) -> None:
    edu = opened(bench, EDU)
    size = edu.regions[CONFIG].size

    try:
        assert edu.read(CONFIG, size - 2, 4)[2:] == b"\xff\xff"
    except BackendError as error:
        assert error.errno in {errno.EINVAL, errno.EFAULT}  # noqa: PT017 - either will do


def test_an_interrupt_is_an_eventfd(bench: Bench) -> None:
    device = opened(bench, EDU)
    function = bench.function(EDU)
    function.enable()
    registers = function.registers32
    first, second = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        device.set_irqs(SIGNAL, vfio.PCI_MSI_IRQ_INDEX, 0, 1, [first])
        registers[RAISE_INTERRUPT] = 1
        assert signalled(first)
        registers[ACKNOWLEDGE] = 1

        device.set_irqs(SIGNAL, vfio.PCI_MSI_IRQ_INDEX, 0, 1, [second])
        registers[RAISE_INTERRUPT] = 2
        assert signalled(second)
        registers[ACKNOWLEDGE] = 2

        device.set_irqs(SIGNAL, vfio.PCI_MSI_IRQ_INDEX, 0, 1, [-1])
        registers[RAISE_INTERRUPT] = 4
        registers[ACKNOWLEDGE] = 4
        device.set_irqs(SILENCE, vfio.PCI_MSI_IRQ_INDEX, 0, 0)
        for eventfd in (first, second):
            with pytest.raises(BlockingIOError):
                os.eventfd_read(eventfd)
    finally:
        os.close(first)
        os.close(second)


def test_an_interrupt_that_the_device_does_not_have(bench: Bench) -> None:
    device = opened(bench, EDU)
    eventfd = os.eventfd(0)
    try:
        for index, start in ((vfio.PCI_MSIX_IRQ_INDEX, 0), (vfio.PCI_MSI_IRQ_INDEX, 1)):
            with pytest.raises(BackendError) as raised:
                device.set_irqs(SIGNAL, index, start, 1, [eventfd])
            assert raised.value.errno == errno.EINVAL
            assert f"{EDU}: interrupts {start} to {start + 1} of kind {index}" in str(raised.value)
    finally:
        os.close(eventfd)


def test_a_reset(bench: Bench) -> None:
    nvme = opened(bench, NVME)
    nvme.write(CONFIG, 4, b"\x06\x00")
    configuration = 0x14  # CC
    nvme.write(0, configuration, b"\x00\x00\x46\x00")
    assert nvme.read(0, configuration, 4) == b"\x00\x00\x46\x00"

    nvme.reset()

    nvme.write(CONFIG, 4, b"\x02\x00")
    assert nvme.read(0, configuration, 4) == bytes(4)


def test_a_device_that_cannot_be_reset(bench: Bench) -> None:
    device = opened(bench, EDU)
    with pytest.raises(BackendError) as raised:
        device.reset()
    assert raised.value.errno == errno.EINVAL


def signalled(eventfd: int) -> bool:
    """Wait for an eventfd, reset it and return whether it came."""
    if not select.select([eventfd], [], [], WAIT_SECONDS)[0]:
        return False
    os.eventfd_read(eventfd)
    return True
