"""The kernel's type1 IOMMU does what :class:`Type1Container` says of it."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.function import host_device
from guest_tests.l1.layout import APERTURE_BITS, EDU, MSI_WINDOW, OTHER_EDU
from guest_tests.l1.limits import dma_entry_limit, locked_memory
from guest_tests.l1.pages import PAGE, Pages
from viommu.errors import Access, BackendError
from viommu_backends.type1_container import Type1Container
from viommu_backends.vfio_device import VfioDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

IOVA = 0x100000
R, RW = Access.READ, Access.READ | Access.WRITE


@pytest.fixture
def container() -> Iterator[Type1Container]:
    container = Type1Container(host_device(EDU))
    yield container
    container.close()


@pytest.fixture
def memory() -> Iterator[Pages]:
    pages = Pages(16)
    yield pages
    pages.close()


def refused(
    number: int, container: Type1Container, iova: int, va: int, size: int, *, prot: Access = RW
) -> str:
    """Check that a map fails with ``number`` and return its message."""
    with pytest.raises(BackendError) as raised:
        container.map(iova, va, size, prot)
    assert raised.value.errno == number, raised.value
    return str(raised.value)


def test_info_says_what_can_be_mapped(container: Type1Container) -> None:
    info = container.info

    assert info.page_sizes == 0x40201000
    assert info.iova_ranges == ((0, MSI_WINDOW[0]), (MSI_WINDOW[1], 1 << APERTURE_BITS))
    assert info.available == 65535


def test_available_falls_with_every_mapping(container: Type1Container, memory: Pages) -> None:
    container.map(IOVA, memory.address, PAGE, RW)
    container.map(IOVA + 4 * PAGE, memory.address, 2 * PAGE, R)
    assert container.refresh().available == 65533
    assert container.info.available == 65533

    assert container.unmap_all() == 3 * PAGE
    assert container.refresh().available == 65535


def test_unmap_tells_what_was_there(container: Type1Container, memory: Pages) -> None:
    for page in (0, 2, 3):
        container.map(IOVA + page * PAGE, memory.address, PAGE, RW)

    assert container.unmap(IOVA + 8 * PAGE, PAGE) == 0
    assert container.unmap(IOVA, 8 * PAGE) == 3 * PAGE
    assert container.unmap(IOVA, 8 * PAGE) == 0
    assert container.unmap_all() == 0


@pytest.mark.parametrize(("page", "count"), [(0, 3), (1, 2), (2, 2), (2, 8), (0, 5)])
def test_an_unmap_that_would_split_removes_nothing(
    container: Type1Container, memory: Pages, page: int, count: int
) -> None:
    container.map(IOVA, memory.address, PAGE, RW)
    container.map(IOVA + PAGE, memory.address, 3 * PAGE, RW)
    container.map(IOVA + 4 * PAGE, memory.address, 2 * PAGE, RW)

    with pytest.raises(BackendError) as raised:
        container.unmap(IOVA + page * PAGE, count * PAGE)

    assert raised.value.errno == errno.EINVAL
    assert container.refresh().available == 65532
    assert container.unmap_all() == 6 * PAGE


@pytest.mark.parametrize(
    ("iova", "size"), [(IOVA + 1, PAGE), (IOVA, PAGE + 1), (IOVA, 0)], ids=["iova", "size", "empty"]
)
def test_what_is_not_pages(container: Type1Container, memory: Pages, iova: int, size: int) -> None:
    refused(errno.EINVAL, container, iova, memory.address, size)
    with pytest.raises(BackendError) as raised:
        container.unmap(iova, size)
    assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("iova", "pages"),
    [
        (MSI_WINDOW[0], 1),
        (MSI_WINDOW[1] - PAGE, 1),
        (MSI_WINDOW[0] - PAGE, 2),
        ((1 << APERTURE_BITS) - PAGE, 2),
        (1 << APERTURE_BITS, 1),
        ((1 << 64) - PAGE, 1),
    ],
)
def test_outside_of_what_the_iommu_can_map(
    container: Type1Container, memory: Pages, iova: int, pages: int
) -> None:
    message = refused(errno.EINVAL, container, iova, memory.address, pages * PAGE)

    assert f"type1 map of [{iova:#x}, {iova + pages * PAGE:#x})" in message
    assert container.refresh().available == 65535


def test_the_last_pages_that_can_be_mapped(container: Type1Container, memory: Pages) -> None:
    for end in (MSI_WINDOW[0], 1 << APERTURE_BITS):
        container.map(end - PAGE, memory.address, PAGE, RW)
    container.map(MSI_WINDOW[1], memory.address, PAGE, RW)

    assert container.unmap_all() == 3 * PAGE


def test_past_the_end_of_the_address_space(
    container: Type1Container, memory: Pages, machine: str
) -> None:
    number = errno.EINVAL if machine.startswith("6.") else errno.EOVERFLOW
    refused(number, container, (1 << 64) - PAGE, memory.address, 2 * PAGE)
    refused(number, container, IOVA, (1 << 64) - PAGE, 2 * PAGE)


@pytest.mark.parametrize(("page", "count"), [(0, 4), (1, 1), (3, 2), (-1, 2), (-1, 6)])
def test_overlap(container: Type1Container, memory: Pages, page: int, count: int) -> None:
    container.map(IOVA, memory.address, 4 * PAGE, RW)

    refused(errno.EEXIST, container, IOVA + page * PAGE, memory.address, count * PAGE)

    assert container.unmap_all() == 4 * PAGE


def test_no_protection_is_no_mapping(container: Type1Container, memory: Pages) -> None:
    refused(errno.EINVAL, container, IOVA, memory.address, PAGE, prot=Access.NONE)


def test_memory_that_is_not_there(container: Type1Container, memory: Pages) -> None:
    refused(errno.EFAULT, container, IOVA, memory.end, PAGE)

    # Half of it is: the kernel takes everything back.
    message = refused(errno.EFAULT, container, IOVA, memory.end - PAGE, 2 * PAGE)

    assert "Bad address" in message
    container.map(IOVA, memory.end - PAGE, PAGE, RW)
    assert container.unmap_all() == PAGE


def test_memory_that_cannot_be_written(container: Type1Container) -> None:
    memory = Pages(1, mmap.PROT_READ)

    refused(errno.EFAULT, container, IOVA, memory.address, PAGE, prot=RW)
    container.map(IOVA, memory.address, PAGE, R)

    assert container.unmap_all() == PAGE
    memory.close()


def test_too_many_mappings_say_which_limit(memory: Pages) -> None:
    with dma_entry_limit(3):
        container = Type1Container(host_device(EDU))
    try:
        assert container.info.available == 3
        for page in range(3):
            container.map(IOVA + page * PAGE, memory.address, PAGE, RW)

        message = refused(errno.ENOSPC, container, IOVA + 3 * PAGE, memory.address, PAGE)

        assert "0 mappings are left of dma_entry_limit" in message
        assert container.unmap(IOVA + PAGE, PAGE) == PAGE
        container.map(IOVA + 3 * PAGE, memory.address, PAGE, RW)
        assert container.unmap_all() == 3 * PAGE
    finally:
        container.close()


def test_too_little_lockable_memory_says_both_numbers(
    container: Type1Container, memory: Pages
) -> None:
    with locked_memory(8 * PAGE):
        container.map(IOVA, memory.address, 6 * PAGE, RW)

        message = refused(
            errno.ENOMEM, container, IOVA + 8 * PAGE, memory.address + 8 * PAGE, 4 * PAGE
        )

        assert f"{4 * PAGE} more bytes would be locked, {6 * PAGE} are" in message
        assert f"the limit is {8 * PAGE}" in message
        container.map(IOVA + 8 * PAGE, memory.address + 8 * PAGE, 2 * PAGE, RW)
        assert container.unmap_all() == 8 * PAGE


def test_a_group_is_in_one_container_only(container: Type1Container) -> None:
    with pytest.raises(BackendError) as raised:
        Type1Container(host_device(EDU))
    assert raised.value.errno == errno.EBUSY

    Type1Container(host_device(OTHER_EDU)).close()


def test_a_closed_container_gives_the_group_back(memory: Pages) -> None:
    for _ in range(2):
        container = Type1Container(host_device(EDU))
        device = VfioDevice(container.device_fd(host_device(EDU)), EDU)
        container.map(IOVA, memory.address, PAGE, RW)
        device.close()
        container.close()
        container.close()


def test_a_group_does_not_leave_while_a_device_is_open() -> None:
    container = Type1Container(host_device(EDU))
    device = VfioDevice(container.device_fd(host_device(EDU)), EDU)

    with pytest.raises(BackendError) as raised:
        container.close()
    assert raised.value.errno == errno.EBUSY

    device.close()
    Type1Container(host_device(EDU)).close()


def test_a_device_of_another_group(container: Type1Container) -> None:
    with pytest.raises(BackendError) as raised:
        container.device_fd(host_device(OTHER_EDU))
    assert raised.value.errno == errno.ENODEV
