"""The rule machine accepts our mapper and rejects broken ones."""

import errno

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conformance.mappers import LaterMapper
from viommu.basic import BasicMemoryMapper
from viommu.errors import BackendError
from viommu.events import Event
from viommu.iova import ADDRESS_SPACE_END
from viommu.mapper import MappingInfo, MemoryMapper, MemRegion, RemoveMapResult
from viommu.testing.mapper_machine import PAGES, MapperMachine

FEW = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# A broken mapper only has to be noticed: no time for a minimal example.
NOTICE = settings(
    FEW,
    max_examples=400,
    stateful_step_count=40,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
)


class BasicMachine(MapperMachine):
    def make_mapper(self) -> MemoryMapper:
        return BasicMemoryMapper()


class TopMachine(BasicMachine):
    """The same at the very end of the address space."""

    base = ADDRESS_SPACE_END - (PAGES + 8) * 0x1000


@pytest.mark.parametrize("machine", [BasicMachine, TopMachine])
def test_the_software_mapper_satisfies_the_contract(machine: type[MapperMachine]) -> None:
    run_state_machine_as_test(machine, settings=FEW)


class LaterMachine(MapperMachine):
    """A mapper whose host answers later, the last question first, and refuses every third map."""

    def make_mapper(self) -> MemoryMapper:
        self.later = LaterMapper()
        self.answers = 0
        return self.later

    def wait_for(self, event: Event) -> None:
        assert not event.is_set()
        while self.later.questions:
            self.answers += 1
            self.later.answer(-1, 0 if self.answers % 3 else errno.EIO)


def test_a_mapper_that_answers_later_satisfies_the_contract() -> None:
    run_state_machine_as_test(LaterMachine, settings=FEW)


class RefusesToUnmap(LaterMapper):
    """Keeps to itself that the host did not unmap, but not quite."""

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        if self.mappings():
            self._refusal = BackendError(errno.EIO, f"unmap {iova_start:#x}")
        return super().remove_map(iova_start, size)


class NeverSettles(LaterMapper):
    """Has signalled its event, and is not settled all the same."""

    def unsettled(self) -> Event | None:
        event = super().unsettled()
        return event or Event()


@pytest.mark.parametrize("broken", [RefusesToUnmap, NeverSettles])
def test_a_mapper_that_answers_later_and_is_broken_is_noticed(broken: type[LaterMapper]) -> None:
    class Machine(LaterMachine):
        def make_mapper(self) -> MemoryMapper:
            super().make_mapper()
            self.later = broken()
            return self.later

    with pytest.raises(Exception):  # noqa: B017, PT011 - any rule may be the one that notices
        run_state_machine_as_test(Machine, settings=NOTICE)


def test_whoever_derives_says_how_to_wait() -> None:
    class Machine(MapperMachine):
        def make_mapper(self) -> MemoryMapper:
            return LaterMapper()

    with pytest.raises(NotImplementedError):
        run_state_machine_as_test(Machine, settings=NOTICE)


class Splits(BasicMemoryMapper):
    """Removes the mappings inside the range even when another would be split."""

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        for mapping in self.mappings():
            if iova_start <= mapping.iova < iova_start + size:
                super().remove_map(mapping.iova, mapping.size)
        return super().remove_map(iova_start, size)


class ForgetsProtection(BasicMemoryMapper):
    """Merges regions of unequal protection."""

    def export(self, iova: int, size: int) -> list[MemRegion]:
        regions = super().export(iova, size)
        return [MemRegion(regions[0].gpa, sum(r.len for r in regions), regions[0].prot)]


class NeverFaults(BasicMemoryMapper):
    """Unmaps exported memory without telling the client."""

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        if self._map.remove(iova_start, iova_start + size) is None:
            return RemoveMapResult(ok=False)
        return RemoveMapResult(ok=True)


class OffByOne(BasicMemoryMapper):
    """Lets a mapping overlap the last byte of the one before it."""

    def mappings(self) -> list[MappingInfo]:
        return list(self._map)

    def export(self, iova: int, size: int) -> list[MemRegion]:
        return super().export(iova, max(size - 1, 1))

    def release(self, iova: int, size: int) -> None:
        super().release(iova, max(size - 1, 1))


@pytest.mark.parametrize("broken", [Splits, ForgetsProtection, NeverFaults, OffByOne])
def test_a_broken_mapper_is_noticed(broken: type[BasicMemoryMapper]) -> None:
    class Machine(MapperMachine):
        def make_mapper(self) -> MemoryMapper:
            return broken()

    with pytest.raises(Exception):  # noqa: B017, PT011 - any rule may be the one that notices
        run_state_machine_as_test(Machine, settings=NOTICE)
