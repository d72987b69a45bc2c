"""Type1Mapper on a container in memory: the contract, and memory that comes and goes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.backends.fake_kernel import FakeContainer, Memory
from viommu.basic import BasicMemoryMapper
from viommu.domain import IDENTITY
from viommu.errors import Access, BackendError
from viommu.mapper import AddMapResult, MappingInfo, MemoryMapper
from viommu.memory.dma_target import AddressRange, DmaTarget, HostAddressMissingError, MemoryKind
from viommu.testing.mapper_machine import MapperMachine
from viommu_backends.vfio_type1 import Type1Mapper

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu_backends.type1_container import Type1Container

RW = Access.READ | Access.WRITE
MIB = 1 << 20


class World:
    def __init__(self) -> None:
        self.container = FakeContainer()
        self.mapper = Type1Mapper(cast("Type1Container", self.container))
        self.memory = Memory()
        self.memory.add(0, 16 * MIB)
        self.registration = self.memory.register(self.mapper, "type1", self.mapper.needs)


@pytest.fixture
def world() -> World:
    return World()


def test_it_satisfies_both_contracts(world: World) -> None:
    assert isinstance(world.mapper, MemoryMapper)
    assert isinstance(world.mapper, DmaTarget)
    assert world.mapper.get_mask() == 0x40201000
    assert world.mapper.supports_detach()
    assert not world.mapper.join(BasicMemoryMapper())


def test_a_mapping_reaches_memory_by_its_host_address(world: World) -> None:
    assert world.mapper.add_map(MappingInfo(0x5000, MIB, 0x2000, RW)) is AddMapResult.OK

    assert world.container.entries == {0x5000: (0x2000, 0x7000_0010_0000, RW)}
    assert world.mapper.remove_map(0, 0x10000) == (True, None)
    assert world.container.entries == {}


def test_the_kernel_is_never_asked_to_split(world: World) -> None:
    world.mapper.add_map(MappingInfo(0, 0, 0x2000, RW))

    assert world.mapper.remove_map(0, 0x1000) == (False, None)
    assert len(world.container.entries) == 1


def test_bypass_follows_memory(world: World) -> None:
    world.mapper.add_map(IDENTITY)
    world.memory.add(1 << 32, (1 << 32) + MIB)
    assert sorted(world.container.entries) == [0, 1 << 32]

    world.memory.remove(0, 16 * MIB)
    assert sorted(world.container.entries) == [1 << 32]
    assert world.mapper.reset_domain() is None
    assert world.container.entries == {}


def test_memory_that_goes_takes_the_entries_that_lead_there_along(world: World) -> None:
    world.mapper.add_map(MappingInfo(0x5000, MIB, 0x1000, RW))
    world.memory.remove(0, 16 * MIB)
    assert world.container.entries == {}

    world.memory.add(0, 16 * MIB)
    assert list(world.container.entries) == [0x5000]


def test_what_the_host_refuses_is_an_error_and_leaves_nothing(world: World) -> None:
    with pytest.raises(BackendError) as caught:
        world.mapper.add_map(MappingInfo(1 << 40, 0, 0x1000, RW))

    assert caught.value.errno == errno.EINVAL
    assert world.mapper.host.mappings() == []


def test_memory_without_an_address_is_a_typed_error(world: World) -> None:
    world.mapper.add_map(MappingInfo(0, 32 * MIB, 0x1000, RW))

    with pytest.raises(HostAddressMissingError):
        world.mapper.map_dma(
            AddressRange(32 * MIB, 33 * MIB),
            host_va=None,
            mappable=None,
            file_offset=0,
            writable=True,
            kind=MemoryKind.RAM,
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda mapper: mapper.start_export_session(),
        lambda mapper: mapper.export(0, 1),
        lambda mapper: mapper.release(0, 1),
        lambda mapper: mapper.vfio_dma_map(0, 0, 0x1000, RW),
    ],
    ids=["session", "export", "release", "map"],
)
def test_a_real_device_exports_nothing(
    world: World, call: Callable[[MemoryMapper], object]
) -> None:
    with pytest.raises(BackendError) as caught:
        call(world.mapper)
    assert caught.value.errno == errno.ENOTSUP


def test_the_rule_machine_finds_no_fault_with_it() -> None:
    class Machine(MapperMachine):
        exports = False

        def make_mapper(self) -> MemoryMapper:
            return World().mapper

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck)),
    )
