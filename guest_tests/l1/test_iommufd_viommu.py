"""vIOMMUs of the kernel's mock, and what is made of them: devices, queues, events."""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.function import host_device
from guest_tests.l1.layout import TEST_DEVICE
from guest_tests.l1.mock import (
    EVENT,
    EVENTS,
    MOCK_APERTURE,
    QUEUE_COUNT,
    QUEUES,
    VIOMMU,
    MockDevice,
    MockViommu,
    attach,
    guest_page_table,
    mock_domain,
    report_event,
)
from guest_tests.l1.outcome import number_of
from guest_tests.l1.pages import PAGE, Pages
from viommu.errors import Access, BackendError
from viommu.spec.iommufd import ViommuType
from viommu_backends.iommufd_context import Iommufd
from viommu_backends.iommufd_viommu import Vevent, VeventQueue, Viommu
from viommu_backends.vfio_device import open_cdev

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mock

IOVA = MOCK_APERTURE[0]
RW = Access.READ | Access.WRITE
VIRTUAL_ID = 0x208
NOTHING = 4711  # no id of an object


@pytest.fixture
def context() -> Iterator[Iommufd]:
    context = Iommufd()
    yield context
    context.close()


@pytest.fixture
def ioas(context: Iommufd) -> int:
    return context.alloc_ioas()


@pytest.fixture
def device(context: Iommufd, ioas: int) -> MockDevice:
    return mock_domain(context, ioas)


@pytest.fixture
def parent(context: Iommufd, ioas: int, device: MockDevice) -> int:
    return context.alloc_page_table(device.device, ioas, nest_parent=True)


@pytest.fixture
def viommu(context: Iommufd, device: MockDevice, parent: int) -> MockViommu:
    return MockViommu(context, device, parent)


@pytest.fixture
def memory() -> Iterator[Pages]:
    pages = Pages(4)
    yield pages
    pages.close()


def test_a_viommu_needs_a_device_and_a_nest_parent(
    context: Iommufd, ioas: int, device: MockDevice, parent: int
) -> None:
    plain = context.alloc_page_table(device.device, ioas)
    for kind, of, below, answer in (
        (VIOMMU, device.device, parent, 0),
        (0, device.device, parent, errno.EOPNOTSUPP),
        (ViommuType.ARM_SMMUV3, device.device, parent, errno.EOPNOTSUPP),
        (VIOMMU, NOTHING, parent, errno.ENOENT),
        (VIOMMU, parent, parent, errno.ENOENT),
        (VIOMMU, device.device, NOTHING, errno.ENOENT),
        (VIOMMU, device.device, ioas, errno.ENOENT),
        (VIOMMU, device.device, plain, errno.EINVAL),
    ):
        arguments = (context, kind, of, below)
        assert number_of(Viommu, *arguments) == answer, arguments


def test_a_driver_wants_its_own_structure(
    context: Iommufd, device: MockDevice, parent: int
) -> None:
    for size, answer in ((1, errno.EINVAL), (4, errno.EINVAL), (24, 0)):
        data = bytearray(size)
        arguments = (context, VIOMMU, device.device, parent, data)
        assert number_of(Viommu, *arguments) == answer, size


def test_every_object_waits_for_what_was_made_of_it(
    context: Iommufd, ioas: int, device: MockDevice, parent: int, viommu: MockViommu
) -> None:
    virtual = viommu.alloc_device(device.device, VIRTUAL_ID)
    table = guest_page_table(context, device, viommu.number)
    attach(context, device, table)
    events = viommu.alloc_events(EVENTS, 1, EVENT.size)

    for used in (ioas, parent, viommu.number, table, events.number):
        assert number_of(context.destroy, used) == errno.EBUSY, used
    attach(context, device, ioas)
    context.destroy(table)
    context.destroy(virtual)
    assert number_of(viommu.destroy) == errno.EBUSY
    events.close()
    events.close()
    viommu.destroy()
    assert number_of(viommu.destroy) == errno.ENOENT
    context.destroy(parent)


def test_a_device_has_one_number_and_a_number_one_device(
    context: Iommufd, ioas: int, device: MockDevice, viommu: MockViommu
) -> None:
    other = mock_domain(context, ioas)
    virtual = viommu.alloc_device(device.device, VIRTUAL_ID)

    for of, number, answer in (
        (device.device, VIRTUAL_ID + 1, errno.EEXIST),
        (other.device, VIRTUAL_ID, errno.EEXIST),
        (NOTHING, VIRTUAL_ID, errno.ENOENT),
        (other.device, (1 << 64) - 1, 0),
    ):
        arguments = (of, number)
        assert number_of(viommu.alloc_device, *arguments) == answer, arguments
    context.destroy(virtual)
    viommu.alloc_device(device.device, VIRTUAL_ID + 1)


def test_a_queue_is_mapped_memory_in_one_piece(
    context: Iommufd, ioas: int, viommu: MockViommu, memory: Pages
) -> None:
    context.map(ioas, IOVA, memory.address, PAGE, RW)
    # The same page twice: two that follow each other here, and don't in the host's memory.
    context.map(ioas, IOVA + PAGE, memory.address, PAGE, RW)

    for iova, size, answer in (
        (IOVA, 0, errno.EINVAL),
        (IOVA - PAGE, PAGE, errno.ENOENT),
        (IOVA + PAGE, 2 * PAGE, errno.ENOENT),
        (IOVA, 2 * PAGE, errno.EFAULT),
        ((1 << 64) - PAGE, 2 * PAGE, errno.EOVERFLOW),
        ((1 << 64) - PAGE + 1, PAGE - 1, errno.ENOENT),
        (64, (1 << 64) - 64, errno.ERANGE),
        (IOVA, (1 << 64) - IOVA, errno.ENOMEM),
    ):
        arguments = (QUEUES, 0, iova, size)
        assert number_of(viommu.alloc_queue, *arguments) == answer, arguments
    assert number_of(viommu.alloc_queue, 0, 0, IOVA, PAGE) == errno.EOPNOTSUPP
    assert number_of(viommu.alloc_queue, 1, 0, IOVA, PAGE) == errno.EOPNOTSUPP

    # Where in a page it begins and ends is up to the driver; this one takes anything.
    queue = viommu.alloc_queue(QUEUES, 0, IOVA + 64, 128)
    context.destroy(queue)
    assert context.unmap_all(ioas) == 2 * PAGE


def test_the_memory_of_a_queue_stays_mapped(
    context: Iommufd, ioas: int, viommu: MockViommu, memory: Pages
) -> None:
    context.map(ioas, IOVA, memory.address, 2 * PAGE, RW)
    context.map(ioas, IOVA + 2 * PAGE, memory.address, PAGE, RW)
    queue = viommu.alloc_queue(QUEUES, 0, IOVA + PAGE, PAGE)

    assert number_of(context.unmap, ioas, IOVA, 2 * PAGE) == errno.EBUSY
    assert context.unmap(ioas, IOVA + 2 * PAGE, PAGE) == PAGE
    assert number_of(viommu.destroy) == errno.EBUSY
    context.destroy(queue)
    assert context.unmap(ioas, IOVA, 2 * PAGE) == 2 * PAGE


def test_queues_come_in_order_and_go_in_the_opposite_one(
    context: Iommufd, ioas: int, viommu: MockViommu, memory: Pages
) -> None:
    context.map(ioas, IOVA, memory.address, PAGE, RW)

    def refused(index: int) -> int:
        return number_of(viommu.alloc_queue, QUEUES, index, IOVA, PAGE)

    assert refused(1) == errno.EIO
    first = viommu.alloc_queue(QUEUES, 0, IOVA, PAGE)
    assert refused(0) == errno.EEXIST
    second = viommu.alloc_queue(QUEUES, 1, IOVA, PAGE)
    assert refused(QUEUE_COUNT) == errno.EINVAL
    assert number_of(context.destroy, first) == errno.EBUSY
    context.destroy(second)
    context.destroy(first)


def test_a_kind_of_events_has_one_queue(viommu: MockViommu) -> None:
    for kind, depth, answer in (
        (0, 1, errno.EOPNOTSUPP),
        (EVENTS, 0, errno.EINVAL),
        (EVENTS, (1 << 19) + 1, errno.EINVAL),
    ):
        arguments = (kind, depth, EVENT.size)
        assert number_of(viommu.alloc_events, *arguments) == answer, arguments
    queue = viommu.alloc_events(EVENTS, 1 << 19, EVENT.size)
    assert number_of(viommu.alloc_events, EVENTS, 1, EVENT.size) == errno.EEXIST
    queue.close()
    viommu.alloc_events(EVENTS, 1, EVENT.size).close()


@pytest.fixture
def events(context: Iommufd, device: MockDevice, viommu: MockViommu) -> Iterator[VeventQueue]:
    """A queue for two events, and a device that a guest has attached."""
    queue = viommu.alloc_events(EVENTS, 2, EVENT.size)
    viommu.alloc_device(device.device, VIRTUAL_ID)
    attach(context, device, guest_page_table(context, device, viommu.number))
    yield queue
    queue.close()


def readable(queue: VeventQueue) -> bool:
    return bool(select.select([queue.fileno()], [], [], 0)[0])


def test_events_are_of_devices_of_the_guest(
    context: Iommufd, device: MockDevice, viommu: MockViommu
) -> None:
    assert number_of(report_event, context, device) == errno.ENOENT
    viommu.alloc_device(device.device, VIRTUAL_ID)
    assert number_of(report_event, context, device) == errno.ENOENT
    attach(context, device, guest_page_table(context, device, viommu.number))
    assert number_of(report_event, context, device) == errno.EOPNOTSUPP
    queue = viommu.alloc_events(EVENTS, 1, EVENT.size)
    report_event(context, device)
    queue.close()


def test_events_are_read_in_their_order(
    context: Iommufd, device: MockDevice, events: VeventQueue
) -> None:
    assert not readable(events)
    assert events.read() == []

    for sequence in range(4):
        report_event(context, device)
        assert readable(events)
        assert events.read() == [Vevent(sequence, 0, EVENT.pack(VIRTUAL_ID))]
    report_event(context, device)
    report_event(context, device)
    assert [event.sequence for event in events.read()] == [4, 5]
    assert not readable(events)


def test_a_full_queue_says_how_many_it_has_lost(
    context: Iommufd, device: MockDevice, events: VeventQueue
) -> None:
    data = EVENT.pack(VIRTUAL_ID)
    for _ in range(5):
        report_event(context, device)
    assert events.read() == [Vevent(0, 0, data), Vevent(1, 0, data), Vevent(4, 3, None)]

    report_event(context, device)
    assert events.read() == [Vevent(5, 0, data)]


def test_an_event_after_those_that_were_lost_says_so_too(
    context: Iommufd, device: MockDevice, viommu: MockViommu
) -> None:
    viommu.alloc_device(device.device, VIRTUAL_ID)
    attach(context, device, guest_page_table(context, device, viommu.number))
    queue = viommu.alloc_events(EVENTS, 80, EVENT.size)  # more than are read at once
    for _ in range(85):
        report_event(context, device)

    assert len(queue.read()) == 64
    report_event(context, device)
    rest = queue.read()
    assert [event.sequence for event in rest] == [*range(64, 80), 85]
    assert rest[-1].lost == 5
    queue.close()


def test_events_of_another_size_than_the_queue_was_told_can_not_be_read(
    context: Iommufd, device: MockDevice, viommu: MockViommu
) -> None:
    viommu.alloc_device(device.device, VIRTUAL_ID)
    attach(context, device, guest_page_table(context, device, viommu.number))
    for size in (0, 2 * EVENT.size):
        queue = viommu.alloc_events(EVENTS, 2, size)
        report_event(context, device)
        assert number_of(queue.read) == errno.EPROTO
        queue.close()
        assert number_of(queue.read) == errno.EBADF


def test_events_outlive_the_context(
    context: Iommufd, device: MockDevice, events: VeventQueue
) -> None:
    report_event(context, device)
    context.close()

    assert len(events.read()) == 1


def test_an_iommu_that_can_not_nest_has_no_viommus() -> None:
    context = Iommufd()
    device = open_cdev(host_device(TEST_DEVICE), context)
    try:
        ioas, number = context.alloc_ioas(), device.number
        assert number is not None
        with pytest.raises(BackendError) as raised:
            context.alloc_page_table(number, ioas, nest_parent=True)
        assert raised.value.errno == errno.EOPNOTSUPP
        table = context.alloc_page_table(number, ioas)
        kind = ViommuType.ARM_SMMUV3
        assert number_of(Viommu, context, kind, number, table) == errno.EOPNOTSUPP
    finally:
        device.close()
        context.close()
