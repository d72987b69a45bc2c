"""What a VFIO device is asked, byte for byte, and what its answers mean; no kernel is asked.

What the real kernel answers is tested in ``guest_tests/l1``.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from viommu.errors import BackendError
from viommu.spec import vfio
from viommu.spec.vfio_host import Ioctl
from viommu_backends import vfio_device
from viommu_backends.bar_file import BarFile
from viommu_backends.vfio_device import HostIrq, HostRegion, VfioDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "0000:04:00.0"
AREAS = ((0, 0x2000), (0x4000, 0x4000))
RW = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
BAR, SPARSE_BAR, CONFIG = 0, 2, vfio.PCI_CONFIG_REGION_INDEX


class Kernel:
    """Answers ioctls on a device with a plain BAR, one with areas, and configuration space."""

    def __init__(self) -> None:
        self.refuse: dict[int, int] = {}
        self.results: dict[int, int] = {}
        self.asked: list[tuple[int, bytes | int]] = []

    def ask(self, _: int, request: int, argument: bytearray | int, what: str) -> int:
        self.asked.append((request, argument if isinstance(argument, int) else bytes(argument)))
        if number := self.refuse.get(request):
            raise BackendError(number, what)
        if isinstance(argument, bytearray):
            if request == Ioctl.DEVICE_GET_INFO:
                struct.pack_into("<IIII", argument, 0, 24, 3, 9, 5)
            elif request == Ioctl.DEVICE_GET_REGION_INFO:
                self._region(argument)
            elif request == Ioctl.DEVICE_GET_IRQ_INFO:
                (index,) = struct.unpack_from("<I", argument, 8)
                if index == vfio.PCI_ERR_IRQ_INDEX:
                    raise BackendError(errno.EINVAL, what)
                struct.pack_into("<IIII", argument, 0, 16, 1, index, index + 1)
        return self.results.get(request, 0)

    def _region(self, argument: bytearray) -> None:
        (index,) = struct.unpack_from("<I", argument, 8)
        if index == vfio.PCI_VGA_REGION_INDEX:
            raise BackendError(errno.EINVAL, "no VGA")
        size = {BAR: 0x1000, SPARSE_BAR: 0x8000, CONFIG: 0x100}.get(index, 0)
        offset = index << 12
        if index != SPARSE_BAR:
            struct.pack_into("<IIIIQQ", argument, 0, 32, RW, index, 0, size, offset)
            return
        # A capability of another kind comes first.
        needed = 32 + 8 + 16 + 32
        flags = RW | vfio.REGION_INFO_FLAG_MMAP | vfio.REGION_INFO_FLAG_CAPS
        at = 32 if len(argument) >= needed else 0
        struct.pack_into("<IIIIQQ", argument, 0, needed, flags, index, at, size, offset)
        if at:
            struct.pack_into("<HHI", argument, at, 3, 1, at + 8)
            struct.pack_into("<HHIII", argument, at + 8, 1, 1, 0, len(AREAS), 0)
            struct.pack_into("<QQQQ", argument, at + 24, *AREAS[0], *AREAS[1])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(vfio_device, "ask", kernel.ask)
    return kernel


@pytest.fixture
def device(kernel: Kernel) -> Iterator[VfioDevice]:
    """A device whose regions are in a file, as they are in a device's."""
    fd = os.memfd_create("device")
    os.ftruncate(fd, 0x7800)
    device = VfioDevice(fd, NAME)
    kernel.asked.clear()
    yield device
    device.close()


def test_what_a_device_is(device: VfioDevice) -> None:
    assert (device.can_reset, device.num_regions, device.num_irqs) == (True, 9, 5)
    assert device.regions[BAR] == HostRegion(0x1000, RW, 0, ())
    assert device.regions[SPARSE_BAR].areas == AREAS
    assert device.regions[vfio.PCI_VGA_REGION_INDEX] == HostRegion(0, 0, 0, ())
    assert device.irqs[2] == HostIrq(3, 1)
    assert device.irqs[vfio.PCI_ERR_IRQ_INDEX] == HostIrq(0, 0)


def test_what_is_no_device_is_closed(kernel: Kernel) -> None:
    kernel.refuse[Ioctl.DEVICE_GET_INFO] = errno.ENOTTY

    with pytest.raises(BackendError, match=NAME):
        VfioDevice(os.memfd_create("other"), NAME)


def test_regions_are_read_and_written_where_they_are(device: VfioDevice) -> None:
    device.write(SPARSE_BAR, 0x10, b"data")

    assert os.pread(device.fd, 4, 0x2010) == b"data"
    assert device.read(SPARSE_BAR, 0x12, 2) == b"ta"


def test_a_short_answer_is_completed_as_a_bus_does(device: VfioDevice) -> None:
    assert device.read(CONFIG, 0x7FE, 4) == b"\0\0\xff\xff"


@pytest.mark.parametrize("access", ["read", "write"])
def test_an_access_that_fails_says_where(device: VfioDevice, access: str) -> None:
    os.close(device.fd)
    device.fd = os.open("/", os.O_RDONLY)

    with pytest.raises(BackendError, match=rf"{access} of region 0 at 0x10"):
        device.read(BAR, 0x10, 4) if access == "read" else device.write(BAR, 0x10, b"data")


def test_eventfds_are_given_by_number_and_nobody_is_minus_one(
    device: VfioDevice, kernel: Kernel
) -> None:
    device.set_irqs(0x24, 2, 1, 2, [7, -1])

    expected = struct.pack("<IIIIIii", 28, 0x24, 2, 1, 2, 7, -1)
    assert kernel.asked == [(Ioctl.DEVICE_SET_IRQS, expected)]


def test_fewer_interrupts_than_asked_for_are_an_error(device: VfioDevice, kernel: Kernel) -> None:
    kernel.results[Ioctl.DEVICE_SET_IRQS] = 3

    with pytest.raises(BackendError, match="the host has 3") as caught:
        device.set_irqs(0x24, 2, 0, 8, [-1] * 8)

    assert caught.value.errno == errno.ENOSPC


def test_reset_attach_detach(device: VfioDevice, kernel: Kernel) -> None:
    device.reset()
    assert device.attach(5) == 5
    device.detach()

    assert kernel.asked == [
        (Ioctl.DEVICE_RESET, 0),
        (Ioctl.DEVICE_ATTACH_IOMMUFD_PT, struct.pack("<III", 12, 0, 5)),
        (Ioctl.DEVICE_DETACH_IOMMUFD_PT, struct.pack("<II", 8, 0)),
    ]


def test_part_of_a_bar_as_dma_buf(device: VfioDevice, kernel: Kernel) -> None:
    kernel.results[Ioctl.DEVICE_FEATURE] = 42

    with BarFile(device) as file:
        assert file.dma_buf(0x4000, 0x2000) == 42

    flags = os.O_RDWR | os.O_CLOEXEC
    expected = struct.pack("<IIIIIIQQ", 40, 1 << 16 | 11, SPARSE_BAR, flags, 0, 1, 0x2000, 0x2000)
    assert kernel.asked == [(Ioctl.DEVICE_FEATURE, expected)]


def test_closing_twice_is_harmless(device: VfioDevice) -> None:
    device.close()
    device.close()

    assert device.fd == -1
