"""The shipped rule machine, with a device of our own behind the mapper, in every mode.

After each step the device's memory is what the mappings say, file and all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from hypothesis.strategies import booleans, integers

from tests.backends.vfio_user.rig import PAGE, Rig
from viommu.errors import Access
from viommu.testing.mapper_machine import MapperMachine

if TYPE_CHECKING:
    from viommu.events import Event
    from viommu.mapper import MemoryMapper

FEW = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class VfioUserMachine(MapperMachine):
    """Mappings lead to memory, to ROM, to nothing, and to more than one of them."""

    gpa = 4 * PAGE
    base = 0x100000
    memory: ClassVar[Any] = "shared"
    ioas: ClassVar[bool] = False

    def make_mapper(self) -> MemoryMapper:
        self.rig = Rig(self.memory)
        self.bank = self.rig.serve(ioas=self.ioas)
        return self.rig.mapper

    def wait_for(self, event: Event) -> None:
        while not event.is_set():
            self.rig.loop.turn(1.0)

    def teardown(self) -> None:
        super().teardown()
        self.model.reset_domain()
        self.what_the_device_has_is_what_is_mapped()
        assert not self.rig.lost
        self.rig.close()

    @rule(dies=booleans(), page=integers(0, 7))
    def remember(self, dies: bool, page: int) -> None:
        """Have memory come or go, or the device be another."""
        if dies:
            client = self.rig.client
            assert client is not None
            client.close()
            self.bank = self.rig.serve(ioas=self.ioas)
        elif self.rig.memory.region_at(20 * PAGE) is None:
            self.rig.add_ram(20, 1 + page)
        else:
            self.rig.memory.unmap(20 * PAGE, self.rig.memory.region_at(20 * PAGE).size)  # type: ignore[union-attr]
        assert self.settle() is None

    @invariant()
    def what_the_device_has_is_what_is_mapped(self) -> None:
        expected: dict[int, tuple[int | None, Access]] = {}
        for iova, (gpa, prot, _) in self.model.pages.items():
            region = self.rig.memory.region_at(gpa)
            if region is not None:
                shown = prot if region.writable else prot & Access.READ
                if shown:
                    expected[iova] = (gpa if self.memory == "shared" else None, shown)
        found: dict[int, tuple[int | None, Access]] = {}
        for region in self.bank.memory.regions():
            prot = Access.READ if region.readable else Access.NONE
            prot |= Access.WRITE if region.writable else Access.NONE
            for at in range(0, region.size, PAGE):
                found[region.gpa + at] = (region.offset + at if region.shared else None, prot)
        assert found == expected


class MessageMachine(VfioUserMachine):
    memory = "message"


class IoasMachine(VfioUserMachine):
    ioas = True


@pytest.mark.parametrize("machine", [VfioUserMachine, MessageMachine, IoasMachine])
def test_it_satisfies_the_contract(machine: type[VfioUserMachine]) -> None:
    run_state_machine_as_test(machine, settings=FEW)
