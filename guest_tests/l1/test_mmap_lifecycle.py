"""Device memory that is mapped: one table of steps for the kernel's iommufd and for our own."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

import pytest

from guest_tests.l1.limits import locked_memory, pinned
from guest_tests.l1.mock import MOCK_APERTURE, MockDevice, MockViommu, mock_domain
from guest_tests.l1.outcome import number_of
from guest_tests.l1.pages import PAGE, DeviceMemory, Pages
from tests.memory.mmap_lifecycle import OFFSETS, TableService, run
from viommu.errors import Access
from viommu_backends.iommufd_context import Iommufd

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mock

RW = Access.READ | Access.WRITE
WORD = 0x5EED
HOW: Final = {
    "shared": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    "private": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
    "exec": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC),
}


class KernelService:
    """A client of the kernel: owners are vIOMMUs of the mock, their parent is a page table.

    What is mapped for DMA in the context shows when the last of its objects is gone.
    """

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._memory = Pages(1)
        self._closing.callback(self._memory.close)
        self._context = Iommufd()
        self._closing.callback(self._context.close)
        self._ioas = self._context.alloc_ioas()
        self._device = mock_domain(self._context, self._ioas)
        with locked_memory(1 << 20):
            self._context.map(self._ioas, MOCK_APERTURE[0], self._memory.address, PAGE, RW)
        self._objects: dict[str, int] = {}
        self._mappings: dict[str, DeviceMemory] = {}

    def create(self, owner: str, parent: str | None = None) -> int:
        if parent is None:
            self._objects[owner] = self._context.alloc_page_table(
                self._device.device, self._ioas, nest_parent=True
            )
        else:
            viommu = MockViommu(self._context, self._device, self._objects[parent])
            assert (viommu.offset, viommu.length) == (OFFSETS[owner] * PAGE, 2 * PAGE)
            self._objects[owner] = viommu.number
        return 0

    def destroy(self, owner: str) -> int:
        return number_of(self._context.destroy, self._objects[owner])

    def map(self, mapping: str, offset: int, count: int, how: str = "shared") -> int:
        def attempt() -> None:
            fd = self._context.fileno()
            self._mappings[mapping] = DeviceMemory(fd, offset * PAGE, count * PAGE, *HOW[how])

        return number_of(attempt)

    def unmap(self, mapping: str, first: int = 0, count: int = 2) -> int:
        return number_of(self._mappings[mapping].unmap, first * PAGE, count * PAGE)

    def fork(self) -> int:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        self._child = self._closing.enter_context(contextlib.ExitStack())
        self._child.callback(os.waitpid, child, 0)
        self._child.callback(os.close, writer)
        return 0

    def exit_child(self) -> int:
        self._child.close()
        return 0

    def close(self) -> int:
        self._context.close()
        return 0

    def find_nothing(self) -> int:
        return errno.EBUSY if pinned() else 0

    def end(self) -> None:
        self._closing.close()


def test_the_lifecycle_step_by_step_in_the_kernel() -> None:
    service = KernelService()
    try:
        run(service)
    finally:
        service.end()


def test_the_lifecycle_step_by_step_in_our_own_table() -> None:
    run(TableService())


@pytest.fixture
def context() -> Iterator[Iommufd]:
    context = Iommufd()
    yield context
    context.close()


@pytest.fixture
def device(context: Iommufd) -> MockDevice:
    return mock_domain(context, context.alloc_ioas())


@pytest.fixture
def viommu(context: Iommufd, device: MockDevice) -> MockViommu:
    ioas = context.alloc_ioas()
    parent = context.alloc_page_table(device.device, ioas, nest_parent=True)
    return MockViommu(context, device, parent, WORD)


def test_what_is_mapped_is_the_memory_of_the_device(context: Iommufd, viommu: MockViommu) -> None:
    assert viommu.echo == WORD
    one, two = (context.map_device_memory(viommu.offset, viommu.length) for _ in range(2))

    assert int.from_bytes(one[:4], "little") == WORD
    one[PAGE : PAGE + 4] = b"both"
    assert two[PAGE : PAGE + 4] == b"both"

    one.close()
    assert number_of(viommu.destroy) == errno.EBUSY
    two.close()
    viommu.destroy()
    offset, length = viommu.offset, viommu.length
    assert number_of(context.map_device_memory, offset, length) == errno.ENXIO


def test_only_what_is_offered_is_mapped(context: Iommufd, viommu: MockViommu) -> None:
    offset, length = viommu.offset, viommu.length
    for attempt in ((0, length), (offset + PAGE, PAGE), (offset, PAGE), (offset, 2 * length)):
        assert number_of(context.map_device_memory, *attempt) == errno.ENXIO, attempt
    for attempt in ((offset + 1, length), (offset, 0)):
        assert number_of(context.map_device_memory, *attempt) == errno.EINVAL, attempt
    # The call itself rounds up to whole pages.
    context.map_device_memory(offset, length - 1).close()
    viommu.destroy()


def test_a_mapping_that_was_cut_is_as_many_mappings(context: Iommufd, viommu: MockViommu) -> None:
    memory = DeviceMemory(context.fileno(), viommu.offset, viommu.length)
    memory.protect(PAGE, PAGE, mmap.PROT_READ)
    memory.unmap(0, PAGE)
    assert number_of(viommu.destroy) == errno.EBUSY
    memory.unmap(PAGE, PAGE)
    viommu.destroy()
