"""What an IOAS holds, to the byte: the kernel itself does DMA through it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from guest_tests.l1.bench import Bench
from guest_tests.l1.limits import locked_memory, pinned
from guest_tests.l1.mock import MOCK_APERTURE, SoftwareDma, mock_domain
from guest_tests.l1.outcome import number_of
from guest_tests.l1.pages import PAGE, Pages
from viommu.errors import Access
from viommu.mapper import AddMapResult, MappingInfo
from viommu.testing.mapper_machine import PAGES, MapperMachine
from viommu_backends.iommufd import IommufdMapper
from viommu_backends.iommufd_context import Iommufd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.mapper import MemoryMapper

pytestmark = pytest.mark.mock

IOVA = MOCK_APERTURE[0]
GPA = 0x100000
R, W = Access.READ, Access.WRITE
RW = R | W


@pytest.fixture
def context() -> Iterator[Iommufd]:
    context = Iommufd()
    yield context
    context.close()


def test_software_dma_is_held_to_the_mappings(context: Iommufd) -> None:
    memory = Pages(4)
    ioas = context.alloc_ioas()
    for page, prot in enumerate((RW, R, W)):
        context.map(ioas, IOVA + page * PAGE, memory.address + page * PAGE, PAGE, prot)
    with SoftwareDma(context, ioas) as dma:
        dma.write(IOVA + 5, b"bytes")
        assert memory.read(0, 12) == b"\0\0\0\0\0bytes\0\0"
        memory.write(PAGE - 2, b"over")
        assert dma.read(IOVA + PAGE - 2, 4) == b"over"

        for outcome, attempt in (
            (errno.EPERM, lambda: dma.write(IOVA + PAGE, b"x")),
            (errno.EPERM, lambda: dma.read(IOVA + 2 * PAGE, 1)),
            (errno.ENOENT, lambda: dma.read(IOVA + 3 * PAGE, 1)),
        ):
            assert number_of(attempt) == outcome
    memory.close()


def test_a_domain_of_the_mock_has_an_aperture(context: Iommufd) -> None:
    memory = Pages(1)
    ioas = context.alloc_ioas()
    context.map(ioas, MOCK_APERTURE[1], memory.address, PAGE, RW)
    assert number_of(mock_domain, context, ioas) == errno.EADDRINUSE
    context.unmap_all(ioas)

    device = mock_domain(context, ioas)

    assert context.iova_ranges(ioas).ranges == (MOCK_APERTURE,)
    assert number_of(context.map, ioas, MOCK_APERTURE[1], memory.address, PAGE, RW) == errno.EINVAL
    context.destroy(device.selftest)
    context.destroy(ioas)
    memory.close()


def test_mappers_without_devices_share_memory_by_joining() -> None:
    with Bench("iommufd") as bench:
        ram = bench.add_ram(GPA, 2 * PAGE)
        ram.bytes[:4] = b"once"
        first, second = mapper(bench), mapper(bench)
        assert first.add_map(MappingInfo(IOVA, GPA, PAGE, R)) is AddMapResult.OK
        assert second.join(first)
        assert read(bench, second, IOVA, 4) == b"once"
        first.reset_domain()
        assert read(bench, second, IOVA, 4) == b"once"


def test_the_kernel_counts_what_is_mapped_again_unless_it_is_a_copy(context: Iommufd) -> None:
    memory, size = Pages(16), 16 * PAGE
    source, *spaces = (context.alloc_ioas() for _ in range(3))
    devices = [mock_domain(context, ioas) for ioas in spaces]
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)

    def count(map_in: Callable[[int], None]) -> list[int]:
        """Return how much is pinned after each domain has mapped, and after each has unmapped."""
        counts = []
        for change in (map_in, context.unmap_all):
            for ioas in spaces:
                change(ioas)
                counts.append(pinned())
        return counts

    with locked_memory(1 << 20):
        assert count(lambda ioas: context.map(ioas, IOVA, memory.address, size, RW)) == [
            size, 2 * size, size, 0,
        ]  # fmt: skip
        assert count(lambda ioas: context.map_file(ioas, IOVA, fd, 0, size, RW)) == [
            size, 2 * size, size, 0,
        ]  # fmt: skip
        # To have it in an IOAS without a device costs nothing.
        context.map_file(source, 0, fd, 0, size, RW)
        assert pinned() == 0
        assert count(lambda ioas: context.copy(ioas, source, size, IOVA, 0, RW)) == [
            size, size, size, 0,
        ]  # fmt: skip
        # A page counts when the first of several takes it, wherever that has it.
        half = size // 2
        context.copy(spaces[0], source, half, IOVA, 0, RW)
        context.copy(spaces[1], source, half, IOVA + size, half // 2, RW)
        assert pinned() == half + half // 2

    os.close(fd)
    context.unmap_all(spaces[0])
    context.unmap_all(spaces[1])
    for device in devices:
        context.destroy(device.selftest)
    memory.close()


def test_guest_memory_is_pinned_once_for_all_domains() -> None:
    with Bench("iommufd") as bench, locked_memory(1 << 20):
        ram = bench.add_ram(GPA, 16 * PAGE)
        first, second = mapper(bench), mapper(bench)
        for domain in (first, second):
            domain.add_map(MappingInfo(IOVA, GPA, PAGE, RW))
            bench.closing(give_device(bench, domain))
        assert pinned() == PAGE

        # Here it is whole, there in pieces, and twice at that.
        for number in range(16):
            first.add_map(MappingInfo(IOVA + (number + 8) * PAGE, GPA + number * PAGE, PAGE, RW))
        second.add_map(MappingInfo(IOVA + 64 * PAGE, GPA, 16 * PAGE, R))
        assert pinned() == 16 * PAGE
        ram.bytes[5 * PAGE : 5 * PAGE + 4] = b"both"
        assert read(bench, first, IOVA + 13 * PAGE, 4) == b"both"
        assert read(bench, second, IOVA + 69 * PAGE, 4) == b"both"

        first.remove_map(0, 1 << 64)
        assert pinned() == 16 * PAGE
        second.remove_map(IOVA + 64 * PAGE, 16 * PAGE)
        assert pinned() == PAGE


def test_memory_that_goes_leaves_no_copy() -> None:
    with Bench("iommufd") as bench, locked_memory(1 << 20):
        ram = bench.add_ram(GPA, 2 * PAGE, writable=False)
        domain = mapper(bench)
        domain.add_map(MappingInfo(IOVA, GPA, 2 * PAGE, RW))
        bench.closing(give_device(bench, domain))
        assert pinned() == 2 * PAGE
        assert domain.ioas is not None
        with SoftwareDma(bench.context, domain.ioas) as dma:
            assert number_of(dma.write, IOVA, b"x") == errno.EPERM
            bench.regions.enable(ram.region, writable=True)
            assert number_of(dma.write, IOVA, b"x") == 0

            bench.remove(ram.region)
            assert number_of(dma.read, IOVA, 1) == errno.ENOENT
        assert pinned() == 0


def test_an_ioas_holds_what_the_model_says() -> None:
    class Machine(MapperMachine):
        page = PAGE
        base = IOVA
        gpa = GPA
        exports = False

        def make_mapper(self) -> MemoryMapper:
            self.bench = Bench("iommufd")
            self.ram = self.bench.add_ram(GPA, 2 * PAGES * PAGE)
            for page in range(2 * PAGES):
                self.ram.bytes[page * PAGE : page * PAGE + 8] = os.urandom(8)
            self.real = mapper(self.bench)
            return self.real

        @invariant()
        def memory_is_where_it_was_mapped(self) -> None:
            if self.real.ioas is None:
                assert not self.model.pages
                return
            with SoftwareDma(self.bench.context, self.real.ioas) as dma:
                for page in range(PAGES + 3):
                    self.check_page(dma, IOVA + page * PAGE)

        def check_page(self, dma: SoftwareDma, iova: int) -> None:
            gpa, prot, _ = self.model.pages.get(iova, (GPA, Access.NONE, 0))
            contents = self.ram.bytes[gpa - GPA : gpa - GPA + 8]
            refused = errno.EPERM if prot else errno.ENOENT
            if R in prot:
                assert dma.read(iova, 8) == contents
            else:
                assert number_of(dma.read, iova, 8) == refused
            if W in prot:
                dma.write(iova, contents[::-1])
                assert self.ram.bytes[gpa - GPA : gpa - GPA + 8] == contents[::-1]
            else:
                assert number_of(dma.write, iova, contents[::-1]) == refused

        def teardown(self) -> None:
            try:
                super().teardown()
            finally:
                self.bench.close()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def mapper(bench: Bench) -> IommufdMapper:
    """Return a mapper for no device."""
    mapper = bench.mapper()
    assert isinstance(mapper, IommufdMapper)
    return mapper


def give_device(bench: Bench, mapper: IommufdMapper) -> Callable[[], None]:
    """Attach a device of the mock to the domain of a mapper; return what ends it."""
    assert mapper.ioas is not None
    device = mock_domain(bench.context, mapper.ioas)
    return lambda: bench.context.destroy(device.selftest)


def read(bench: Bench, mapper: IommufdMapper, iova: int, size: int) -> bytes:
    """Read what a device of a mapper would read."""
    assert mapper.ioas is not None
    with SoftwareDma(bench.context, mapper.ioas) as dma:
        return dma.read(iova, size)
