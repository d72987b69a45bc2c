"""The kernel's iommufd does what :class:`Iommufd` says of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.function import Function, host_device
from guest_tests.l1.layout import (
    APERTURE_BITS,
    EDU,
    GROUPED_EDU,
    MSI_WINDOW,
    OTHER_GROUPED_EDU,
    SHARED_MEMORY,
    SHARED_MEMORY_SIZE,
    TEST_DEVICE,
)
from guest_tests.l1.limits import locked_memory
from guest_tests.l1.pages import PAGE, Pages
from guest_tests.l1.word_writer import WORD, WordWriter
from viommu.errors import Access, BackendError
from viommu_backends.iommufd_context import IoasRanges, Iommufd
from viommu_backends.type1_container import Type1Container
from viommu_backends.vfio_device import VfioDevice, open_cdev

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.iommufd

IOVA = 0x100000
R, W = Access.READ, Access.WRITE
RW = R | W


@pytest.fixture
def context() -> Iterator[Iommufd]:
    context = Iommufd()
    yield context
    context.close()


@pytest.fixture
def device(context: Iommufd) -> Iterator[VfioDevice]:
    """A device that writes words, bound and blocked."""
    device = open_cdev(host_device(TEST_DEVICE), context)
    yield device
    device.close()


@pytest.fixture
def writer(device: VfioDevice) -> Iterator[WordWriter]:
    function = Function(device)
    yield WordWriter(function)
    function.close()


@pytest.fixture
def ioas(context: Iommufd, device: VfioDevice) -> int:
    """An IOAS that the device is attached to."""
    number = context.alloc_ioas()
    device.attach(number)
    return number


@pytest.fixture
def memory() -> Iterator[Pages]:
    pages = Pages(16)
    yield pages
    pages.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def refused(number: int, call: Callable[..., object], *arguments: object) -> str:
    """Check that a call fails with ``number`` and return its message."""
    with pytest.raises(BackendError) as raised:
        call(*arguments)
    assert raised.value.errno == number, raised.value
    return str(raised.value)


def test_what_can_be_mapped_depends_on_the_devices(context: Iommufd, device: VfioDevice) -> None:
    ioas = context.alloc_ioas()
    assert context.iova_ranges(ioas) == IoasRanges(((0, 1 << 64),), 1)

    device.attach(ioas)
    assert context.iova_ranges(ioas) == IoasRanges(
        ((0, MSI_WINDOW[0]), (MSI_WINDOW[1], 1 << APERTURE_BITS)), PAGE
    )

    device.detach()
    assert context.iova_ranges(ioas) == IoasRanges(((0, 1 << 64),), 1)


def test_a_mapping_leads_to_memory(
    context: Iommufd, ioas: int, memory: Pages, writer: WordWriter
) -> None:
    assert not writer.write(IOVA)
    context.map(ioas, IOVA, memory.address + PAGE, 2 * PAGE, RW)

    assert writer.write(IOVA + PAGE + 8)
    assert memory.read(2 * PAGE + 8, 4) == WORD

    assert context.unmap(ioas, IOVA, 2 * PAGE) == 2 * PAGE
    assert not writer.write(IOVA + PAGE + 8)


def test_a_file_is_mapped_by_its_descriptor(
    context: Iommufd, ioas: int, memfd: int, writer: WordWriter
) -> None:
    assert context.can_map_files()
    context.map_file(ioas, IOVA, memfd, PAGE, 2 * PAGE, RW)

    assert writer.write(IOVA + 8)

    assert os.pread(memfd, 4, PAGE + 8) == WORD


@pytest.mark.parametrize("by_file", [False, True], ids=["address", "file"])
@pytest.mark.parametrize(("page", "count"), [(0, 1), (-1, 2), (1, 1), (3, 4), (-1, 6)], ids=str)
def test_overlap(  # noqa: PLR0917 - fixtures
    context: Iommufd,
    ioas: int,
    memory: Pages,
    memfd: int,
    page: int,
    count: int,
    *,
    by_file: bool,
) -> None:
    context.map(ioas, IOVA, memory.address, 4 * PAGE, RW)
    where, size = IOVA + page * PAGE, count * PAGE
    os.ftruncate(memfd, 8 * PAGE)
    if by_file:
        refused(errno.EEXIST, context.map_file, ioas, where, memfd, 0, size, RW)
    else:
        message = refused(errno.EEXIST, context.map, ioas, where, memory.address, size, RW)
        assert f"[{where:#x}, {where + size:#x}) in IOAS {ioas}" in message
    assert context.unmap_all(ioas) == 4 * PAGE


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (MSI_WINDOW[0], PAGE),
        (MSI_WINDOW[0] - PAGE, 2 * PAGE),
        (MSI_WINDOW[1] - PAGE, 2 * PAGE),
        ((1 << APERTURE_BITS) - PAGE, 2 * PAGE),
        (1 << APERTURE_BITS, PAGE),
        (IOVA + 512, PAGE),
        (IOVA, 512),
        (IOVA, 0),
    ],
)
def test_what_cannot_be_mapped_where_a_device_is(
    context: Iommufd, ioas: int, memory: Pages, iova: int, size: int
) -> None:
    refused(errno.EINVAL, context.map, ioas, iova, memory.address, size, RW)
    assert context.unmap_all(ioas) == 0


def test_past_the_end_of_the_address_space(context: Iommufd, ioas: int, memory: Pages) -> None:
    refused(errno.EOVERFLOW, context.map, ioas, (1 << 64) - PAGE, memory.address, 2 * PAGE, RW)


def test_memory_that_is_not_there(context: Iommufd, ioas: int, memory: Pages) -> None:
    refused(errno.EFAULT, context.map, ioas, IOVA, memory.end, PAGE, RW)
    refused(errno.EFAULT, context.map, ioas, IOVA, memory.end - PAGE, 2 * PAGE, RW)
    context.map(ioas, IOVA, memory.end - PAGE, PAGE, RW)
    assert context.unmap_all(ioas) == PAGE


def test_memory_that_cannot_be_written(context: Iommufd, ioas: int) -> None:
    memory = Pages(1, mmap.PROT_READ)
    refused(errno.EFAULT, context.map, ioas, IOVA, memory.address, PAGE, RW)
    context.map(ioas, IOVA, memory.address, PAGE, R)
    assert context.unmap_all(ioas) == PAGE
    memory.close()


def test_files_that_cannot_be_mapped(context: Iommufd, ioas: int, memfd: int) -> None:
    refused(errno.EINVAL, context.map_file, ioas, IOVA, memfd, 2 * PAGE, 4 * PAGE, RW)
    refused(errno.EINVAL, context.map_file, ioas, IOVA, context.fileno(), 0, PAGE, RW)
    refused(errno.EBADF, context.map_file, ioas, IOVA, -1, 0, PAGE, RW)
    assert context.unmap_all(ioas) == 0


def test_nothing_is_asked_of_an_ioas_without_a_device(
    context: Iommufd, device: VfioDevice, memory: Pages, writer: WordWriter
) -> None:
    poisoned = context.alloc_ioas()
    context.map(poisoned, IOVA, memory.end, PAGE, RW)  # as if there were memory
    refused(errno.EFAULT, device.attach, poisoned)

    reserved = context.alloc_ioas()
    context.map(reserved, MSI_WINDOW[0], memory.address, PAGE, RW)
    refused(errno.EADDRINUSE, device.attach, reserved)

    # A failed ATTACH keeps what was attached.
    good = context.alloc_ioas()
    context.map(good, IOVA, memory.address, PAGE, RW)
    device.attach(good)
    refused(errno.EFAULT, device.attach, poisoned)
    assert writer.write(IOVA)
    assert memory.read(0, 4) == WORD


def test_too_little_lockable_memory_says_both_numbers(
    context: Iommufd, ioas: int, memory: Pages
) -> None:
    with locked_memory(8 * PAGE):
        context.map(ioas, IOVA, memory.address, 6 * PAGE, RW)
        message = refused(
            errno.ENOMEM,
            context.map,
            ioas,
            IOVA + 8 * PAGE,
            memory.address + 8 * PAGE,
            4 * PAGE,
            RW,
        )
        assert f"{4 * PAGE} more bytes would be locked, {6 * PAGE} are" in message
        assert f"the limit is {8 * PAGE}" in message
        assert context.unmap_all(ioas) == 6 * PAGE


@pytest.mark.parametrize(("page", "count"), [(1, 1), (2, 1), (1, 2), (2, 4), (8, 1)])
def test_an_unmap_must_be_of_whole_mappings_and_of_some(
    context: Iommufd, ioas: int, memory: Pages, page: int, count: int
) -> None:
    context.map(ioas, IOVA + PAGE, memory.address, 3 * PAGE, RW)
    refused(errno.ENOENT, context.unmap, ioas, IOVA + page * PAGE, count * PAGE)
    assert context.unmap(ioas, IOVA, 8 * PAGE) == 3 * PAGE


def test_unmap_tells_what_was_there(context: Iommufd, ioas: int, memory: Pages) -> None:
    for page in (0, 2, 3):
        context.map(ioas, IOVA + page * PAGE, memory.address, PAGE, RW)
    assert context.unmap(ioas, IOVA, 8 * PAGE) == 3 * PAGE
    assert context.unmap_all(ioas) == 0


def test_a_copy_has_the_same_memory_for_itself(
    context: Iommufd, ioas: int, memory: Pages, writer: WordWriter
) -> None:
    source = context.alloc_ioas()
    context.map(source, IOVA, memory.address, 4 * PAGE, RW)
    context.copy(ioas, source, 2 * PAGE, 16 * IOVA, IOVA + PAGE, RW)
    assert context.unmap_all(source) == 4 * PAGE

    assert writer.write(16 * IOVA + PAGE)
    assert memory.read(2 * PAGE, 4) == WORD
    assert not writer.write(16 * IOVA + 2 * PAGE)


def test_a_copy_has_no_more_rights_than_its_source(
    context: Iommufd, ioas: int, memory: Pages
) -> None:
    source = context.alloc_ioas()
    context.map(source, IOVA, memory.address, PAGE, R)
    refused(errno.EPERM, context.copy, ioas, source, PAGE, IOVA, IOVA, RW)
    refused(errno.ENOENT, context.copy, ioas, source, 2 * PAGE, IOVA, IOVA, R)


def test_objects_in_use_are_not_destroyed(context: Iommufd, device: VfioDevice, ioas: int) -> None:
    refused(errno.EBUSY, context.destroy, ioas)
    device.detach()
    context.destroy(ioas)
    refused(errno.ENOENT, context.destroy, ioas)


def test_attach_replaces_and_detach_blocks(
    context: Iommufd, device: VfioDevice, memory: Pages, writer: WordWriter
) -> None:
    first, second = context.alloc_ioas(), context.alloc_ioas()
    context.map(first, IOVA, memory.address, PAGE, RW)
    context.map(second, IOVA, memory.address + PAGE, PAGE, RW)
    assert not writer.write(IOVA)

    device.attach(first)
    assert writer.write(IOVA)
    device.attach(second)
    assert writer.write(IOVA + 8)
    assert memory.read(0, 12) == WORD + bytes(8)
    assert memory.read(PAGE, 12) == bytes(8) + WORD

    refused(errno.ENOENT, device.attach, 4711)
    assert writer.write(IOVA + 16)
    device.detach()
    device.detach()
    assert not writer.write(IOVA)


def test_a_device_has_one_owner(context: Iommufd, device: VfioDevice) -> None:
    host = host_device(TEST_DEVICE)
    with pytest.raises(BackendError):
        open_cdev(host, context)
    with pytest.raises(BackendError) as raised:
        Type1Container(host)
    assert raised.value.errno == errno.EBUSY
    device.close()

    container = Type1Container(host)
    with pytest.raises(BackendError) as raised:
        open_cdev(host, context)
    assert raised.value.errno == errno.EBUSY
    container.close()


def test_a_group_has_one_context_and_one_space(context: Iommufd) -> None:
    first = open_cdev(host_device(GROUPED_EDU), context)
    other = Iommufd()
    try:
        with pytest.raises(BackendError) as raised:
            open_cdev(host_device(OTHER_GROUPED_EDU), other)
        assert raised.value.errno == errno.EPERM

        second = open_cdev(host_device(OTHER_GROUPED_EDU), context)
        first.attach(context.alloc_ioas())
        refused(errno.EINVAL, second.attach, context.alloc_ioas())
        second.close()
    finally:
        first.close()
        other.close()


def test_a_bar_is_mapped_as_dma_buf_and_revoked_for_good(
    context: Iommufd, ioas: int, writer: WordWriter
) -> None:
    peer = open_cdev(host_device(SHARED_MEMORY), context)
    function = Function(peer, bar=2)
    try:

        def map_bar(offset: int, size: int) -> None:
            fd = peer.export_dma_buf(2, offset, size)
            try:
                context.map_file(ioas, IOVA, fd, 0, size, RW)
            finally:
                os.close(fd)

        function.enable(memory=False, master=False)
        refused(errno.ENODEV, map_bar, 0, PAGE)  # it can be exported, but is revoked at once
        function.enable(master=False)
        function.bytes[:] = bytes(SHARED_MEMORY_SIZE)
        map_bar(PAGE, 2 * PAGE)
        assert writer.write(IOVA + PAGE)
        assert bytes(function.bytes[2 * PAGE : 2 * PAGE + 4]) == WORD
        assert not writer.write(IOVA + 2 * PAGE)

        function.enable(memory=False, master=False)
        assert not writer.write(IOVA)
        function.enable(master=False)
        assert not writer.write(IOVA)

        assert context.unmap(ioas, IOVA, 2 * PAGE) == 2 * PAGE
        map_bar(0, PAGE)
        assert writer.write(IOVA + 8)
        assert bytes(function.bytes[8:12]) == WORD
    finally:
        function.close()
        peer.close()


def test_what_is_no_bar_is_not_exported(context: Iommufd) -> None:
    peer = open_cdev(host_device(SHARED_MEMORY), context)
    try:
        for arguments, number in (
            ((2, 512, PAGE), errno.EINVAL),
            ((2, 0, 512), errno.EINVAL),
            ((2, SHARED_MEMORY_SIZE - PAGE, 2 * PAGE), errno.EINVAL),
            ((4, 0, PAGE), errno.ENODEV),
        ):
            refused(number, peer.export_dma_buf, *arguments)
    finally:
        peer.close()


def test_an_address_in_a_bar_is_no_memory(context: Iommufd, ioas: int) -> None:
    device = open_cdev(host_device(EDU), context)
    function = Function(device)
    function.enable(master=False)
    address = ctypes.addressof(ctypes.c_char.from_buffer(function.bytes))
    refused(errno.EFAULT, context.map, ioas, IOVA, address, PAGE, RW)
    function.close()
    device.close()


def test_many_more_mappings_than_type1_allows(
    context: Iommufd, ioas: int, memory: Pages, writer: WordWriter
) -> None:
    count = 70_000
    for number in range(count):
        context.map(ioas, IOVA + number * PAGE, memory.address, PAGE, RW)
    assert writer.write(IOVA + (count - 1) * PAGE)
    assert memory.read(0, 4) == WORD
    assert context.unmap_all(ioas) == count * PAGE
