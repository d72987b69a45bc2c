"""The rule machine that any memory mapper must satisfy, against the kernel's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from guest_tests.l1.bench import Bench
from guest_tests.l1.layout import TEST_DEVICE
from guest_tests.l1.pages import PAGE
from viommu.testing.mapper_machine import PAGES, MapperMachine

if TYPE_CHECKING:
    from viommu.mapper import MemoryMapper

GPA = 0x100000


def test_the_mapper_is_as_good_as_the_model(backend: str) -> None:
    class Machine(MapperMachine):
        page = PAGE
        base = 0x40000000
        gpa = GPA
        exports = False

        def make_mapper(self) -> MemoryMapper:
            self.bench = Bench(backend)
            self.bench.add_ram(GPA, 2 * PAGES * PAGE)
            return self.bench.mapper(TEST_DEVICE)

        def teardown(self) -> None:
            try:
                super().teardown()
            finally:
                self.bench.close()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
