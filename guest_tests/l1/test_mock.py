"""What an IOAS holds, to the byte: the kernel itself does DMA through it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from guest_tests.l1.bench import Bench
from guest_tests.l1.mock import MOCK_APERTURE, SoftwareDma, mock_domain
from guest_tests.l1.outcome import number_of
from guest_tests.l1.pages import PAGE, Pages
from viommu.errors import Access
from viommu.mapper import AddMapResult, MappingInfo
from viommu.testing.mapper_machine import PAGES, MapperMachine
from viommu_backends.iommufd import IommufdMapper
from viommu_backends.iommufd_context import Iommufd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.mapper import MemoryMapper
    from viommu.memory.dma_target import DmaNeeds, DmaRegistration, DmaTarget

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


def test_mappers_without_devices_share_memory_by_joining(context: Iommufd) -> None:
    with Bench() as bench:
        ram = bench.add_ram(GPA, 2 * PAGE)
        ram.bytes[:4] = b"once"
        first, second = (mapper(bench, context) for _ in range(2))
        assert first.add_map(MappingInfo(IOVA, GPA, PAGE, R)) is AddMapResult.OK
        assert second.join(first)
        assert second.ioas is not None
        with SoftwareDma(context, second.ioas) as dma:
            assert dma.read(IOVA, 4) == b"once"
        first.reset_domain()
        with SoftwareDma(context, second.ioas) as dma:
            assert dma.read(IOVA, 4) == b"once"
        second.reset_domain()


def test_an_ioas_holds_what_the_model_says() -> None:
    class Machine(MapperMachine):
        page = PAGE
        base = IOVA
        gpa = GPA
        exports = False

        def make_mapper(self) -> MemoryMapper:
            self.context = Iommufd()
            self.bench = Bench()
            self.ram = self.bench.add_ram(GPA, 2 * PAGES * PAGE)
            for page in range(2 * PAGES):
                self.ram.bytes[page * PAGE : page * PAGE + 8] = os.urandom(8)
            self.real = mapper(self.bench, self.context)
            return self.real

        @invariant()
        def memory_is_where_it_was_mapped(self) -> None:
            if self.real.ioas is None:
                assert not self.model.pages
                return
            with SoftwareDma(self.context, self.real.ioas) as dma:
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
                self.context.close()

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


def mapper(bench: Bench, context: Iommufd) -> IommufdMapper:
    """Return a mapper for no device, with the memory of ``bench``."""

    def register(name: str, target: DmaTarget, needs: DmaNeeds) -> DmaRegistration:
        return bench.regions.register(target, name, needs)

    return IommufdMapper(context, [], register)
