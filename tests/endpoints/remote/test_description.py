from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.remote.scripted import (
    BAR2,
    CONFIG,
    ERR,
    INTX,
    MAPPABLE,
    MSIX,
    MSIX_CAP,
    READ_WRITE,
    Shape,
)
from viommu.endpoints.remote.description import Description
from viommu.errors import BackendError
from viommu.spec import pci, vfio, virtio_pci
from viommu.spec.vfio_user import Command
from viommu.vfio_user import DeviceInfo, IrqInfo, RegionInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.endpoints.remote.conftest import Rig

PAGE = 4096
NOTHING = RegionInfo(0, 0)


def describe(shape: Shape) -> Description:
    info = DeviceInfo(shape.flags, shape.num_regions, shape.num_irqs)
    return Description(info, shape.regions, shape.irqs, bytes(shape.config[:256]))


@pytest.fixture
def file() -> Iterator[Callable[[int], int]]:
    """A function that makes files of a length, which are closed at the end."""
    fds = []

    def make(size: int) -> int:
        fds.append(os.memfd_create("bar"))
        os.ftruncate(fds[-1], size)
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


# --- what a VMM is told


def test_there_are_bars_and_configuration_space_and_nothing_else() -> None:
    shape = Shape()
    shape.regions |= {
        vfio.PCI_ROM_REGION_INDEX: RegionInfo(0x800, 1),
        vfio.PCI_VGA_REGION_INDEX: RegionInfo(0x20000, READ_WRITE),
        3: RegionInfo(0x100, vfio.REGION_INFO_FLAG_READ),
    }
    told = [describe(shape).region_info(index, mappable=True) for index in range(9)]

    assert told == [
        RegionInfo(0x1000, READ_WRITE),
        NOTHING,
        RegionInfo(BAR2, READ_WRITE),
        RegionInfo(0x100, vfio.REGION_INFO_FLAG_READ),
        NOTHING,
        NOTHING,
        NOTHING,
        RegionInfo(4096, READ_WRITE),
        NOTHING,
    ]


def test_no_kind_has_more_interrupts_than_pci_has() -> None:
    shape = Shape()
    shape.irqs = {index: IrqInfo(0xFFFF_FFFF, index) for index in range(5)}

    counts = [irq.count for irq in describe(shape).irqs]

    assert counts == [1, 32, 2048, 1, 1]
    assert [irq.flags for irq in describe(shape).irqs] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("size", "told"), [(256, 256), (300, 256), (4096, 4096), (8192, 4096)])
def test_configuration_space_has_one_of_two_sizes(size: int, told: int) -> None:
    shape = Shape()
    shape.regions[CONFIG] = RegionInfo(size, READ_WRITE)

    assert describe(shape).region_info(CONFIG, mappable=True).size == told


@pytest.mark.parametrize(
    ("areas", "length", "offset", "told"),
    [
        # MSI-X is in the third and fourth page.
        ((), 0x8000, 0, ((0, 0x2000), (0x4000, 0x4000))),
        (((0x1000, 0x2000),), 0x8000, 0, ((0x1000, 0x1000),)),
        (((0x4000, 0x4000),), 0x9000, 0x1000, ((0x4000, 0x4000),)),
        (((0x4000, 0x5000), (0, 0x1000)), 0x9000, 0, ((0, 0x1000),)),
        (((0x9000, 0x1000),), 0x9000, 0, ()),
        ((), 0x7000, 0, ((0, 0x2000),)),
        ((), 0x8000, 0x1000, ((0, 0x2000),)),
        ((), 0, 0, ()),
    ],
)
def test_what_a_vmm_may_map(
    file: Callable[[int], int],
    areas: tuple[tuple[int, int], ...],
    length: int,
    offset: int,
    told: tuple[tuple[int, int], ...],
) -> None:
    shape = Shape()
    fd = file(length)
    shape.regions[2] = RegionInfo(BAR2, MAPPABLE, fd, offset, areas)
    description = describe(shape)

    expected = RegionInfo(BAR2, MAPPABLE, fd, offset, told) if told else RegionInfo(BAR2, 3)
    assert description.region_info(2, mappable=True) == expected
    assert description.region_info(2, mappable=False) == RegionInfo(BAR2, READ_WRITE)


def test_a_bar_that_is_mapped_whole_has_no_areas(file: Callable[[int], int]) -> None:
    shape = Shape()
    fd = file(0x1000)
    shape.regions[0] = RegionInfo(0x1000, MAPPABLE, fd)

    told = describe(shape).region_info(0, mappable=True)

    assert told == RegionInfo(0x1000, MAPPABLE, fd)


def test_registers_that_have_to_be_seen_are_not_mapped(file: Callable[[int], int]) -> None:
    shape = Shape()
    shape.put(pci.VENDOR_ID, 0x10421AF4, 4)
    for at, kind, offset in ((0xA0, 1, 0), (0xB0, 4, 0x2000), (0xC0, 2, 0x3000)):
        shape.config[at : at + 2] = bytes([pci.CAP_ID_VENDOR, at + 16 if kind != 2 else 0])
        shape.config[at + 2 : at + 16] = virtio_pci.CAP_BODY.pack(16, kind, 0, 0, offset, 60)
    shape.config[MSIX_CAP + 1] = 0xA0
    shape.regions[0] = RegionInfo(0x4000, MAPPABLE, file(0x4000))

    told = describe(shape).region_info(0, mappable=True)

    assert told.areas == ((0x1000, 0x1000), (0x3000, 0x1000))


def test_a_bar_without_a_file_can_not_be_mapped() -> None:
    shape = Shape()
    shape.regions[0] = RegionInfo(0x1000, MAPPABLE)

    assert describe(shape).region_info(0, mappable=True) == RegionInfo(0x1000, READ_WRITE)


def test_what_is_no_file_can_be_as_long_as_it_likes() -> None:
    shape = Shape()
    device = os.open("/dev/zero", os.O_RDWR)
    shape.regions[0] = RegionInfo(0x1000, MAPPABLE, device)

    assert describe(shape).region_info(0, mappable=True).fd == device
    os.close(device)


# --- whether it is the same


def test_a_device_is_what_it_was() -> None:
    shape = Shape()
    before = describe(shape)
    shape.put(pci.COMMAND, 7, 2)
    shape.put(pci.BASE_ADDRESS_0, 0xFE000000, 4)

    assert before.change(describe(shape)) is None


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (pci.VENDOR_ID + 3, "vendor and device"),
        (pci.CLASS_PROG, "revision and class"),
        (pci.HEADER_TYPE, "header type"),
        (pci.SUBSYSTEM_ID, "subsystem"),
        (pci.INTERRUPT_PIN, "interrupt pin"),
        (pci.CAPABILITY_LIST, "capabilities"),
    ],
)
def test_a_device_with_another_register_is_another_one(at: int, what: str) -> None:
    shape = Shape()
    before = describe(shape)
    shape.config[at] ^= 0x40

    change = before.change(describe(shape))

    assert change is not None
    assert what in change


def test_memory_is_the_same_if_it_is_the_same_file(file: Callable[[int], int]) -> None:
    shape = Shape()
    one, other = file(BAR2), file(BAR2)
    again = os.dup(one)

    def with_file(fd: int | None) -> Description:
        shape.regions[2] = RegionInfo(BAR2, MAPPABLE, fd)
        return describe(shape)

    assert with_file(one).other_file(with_file(again)) is None
    assert with_file(one).other_file(with_file(other)) == 2
    assert with_file(one).other_file(with_file(None)) == 2
    assert with_file(None).other_file(with_file(one)) is None
    os.close(again)


@pytest.mark.parametrize(
    "now",
    [
        RegionInfo(BAR2, MAPPABLE, None, 0x8000),
        RegionInfo(BAR2, MAPPABLE, None, 0, ((0, 0x1000),)),
        RegionInfo(BAR2, READ_WRITE),
    ],
)
def test_another_part_of_a_file_is_other_memory(
    file: Callable[[int], int], now: RegionInfo
) -> None:
    shape = Shape()
    fd = file(2 * BAR2)
    shape.regions[2] = RegionInfo(BAR2, MAPPABLE, fd)
    before = describe(shape)

    shape.regions[2] = now._replace(fd=fd)

    assert before.other_file(describe(shape)) == 2


# --- asking


def test_a_device_is_asked_for_what_it_has(make: Callable[..., Rig]) -> None:
    shape = Shape()
    shape.num_irqs = 3
    rig = make(shape).start()

    function = rig.function
    assert [function.irq_info(index).count for index in range(5)] == [1, 0, 8, 1, 1]
    assert function.irq_info(INTX) == shape.irqs[INTX]
    assert function.irq_info(MSIX) == IrqInfo(8, vfio.IRQ_INFO_EVENTFD)
    assert function.irq_info(ERR) == IrqInfo(1, vfio.IRQ_INFO_EVENTFD)
    assert function.region_info(CONFIG).size == 4096


def test_a_bar_that_it_does_not_describe_is_none(make: Callable[..., Rig]) -> None:
    rig = make().start()

    assert rig.function.region_info(4) == NOTHING
    assert rig.function.region_info(5) == NOTHING


def test_files_come_along(make: Callable[..., Rig], file: Callable[[int], int]) -> None:
    shape = Shape()
    fd = file(BAR2)
    shape.regions[2] = RegionInfo(BAR2, MAPPABLE, fd, 0, ((0, 0x1000), (0x5000, 0x1000)))
    rig = make(shape).start()

    told = rig.function.region_info(2)

    assert told.areas == ((0, 0x1000), (0x5000, 0x1000))
    assert told.fd is not None
    assert os.path.sameopenfile(told.fd, fd)


def no_pci(shape: Shape) -> None:
    shape.flags = 0


def few_regions(shape: Shape) -> None:
    shape.num_regions = 7


def no_config(shape: Shape) -> None:
    del shape.regions[CONFIG]


def short_config(shape: Shape) -> None:
    shape.regions[CONFIG] = RegionInfo(128, READ_WRITE)


def bridge(shape: Shape) -> None:
    shape.config[pci.HEADER_TYPE] = 1


def absent(shape: Shape) -> None:
    shape.config[:2] = b"\xff\xff"


def odd_bar(shape: Shape) -> None:
    shape.regions[4] = RegionInfo(0x1800, READ_WRITE)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (no_pci, "no PCI device"),
        (few_regions, "no PCI device"),
        (no_config, "0 bytes of configuration space"),
        (short_config, "128 bytes of configuration space"),
        (bridge, "its configuration begins with"),
        (absent, "its configuration begins with ff ff"),
        (odd_bar, "BAR 4 has 0x1800 bytes, no power of two"),
    ],
)
def test_what_can_not_be_served(
    make: Callable[..., Rig], spoil: Callable[[Shape], None], why: str, file: Callable[[int], int]
) -> None:
    shape = Shape()
    shape.regions[2] = RegionInfo(BAR2, MAPPABLE, file(BAR2))
    spoil(shape)

    with pytest.raises(BackendError, match=why) as caught:
        make(shape).start()
    assert caught.value.errno == errno.EPROTO


def test_a_second_function_does_not_make_it_a_bridge(make: Callable[..., Rig]) -> None:
    shape = Shape()
    shape.config[pci.HEADER_TYPE] = 0x80
    make(shape).start()


@pytest.mark.parametrize("command", [Command.DEVICE_GET_INFO, Command.REGION_READ])
def test_a_device_that_refuses_to_say(make: Callable[..., Rig], command: Command) -> None:
    rig = make()
    rig.stage.prepare = lambda device: device.refuse.update({command: errno.EACCES})
    with pytest.raises(BackendError) as caught:
        rig.start()
    assert caught.value.errno == errno.EACCES
