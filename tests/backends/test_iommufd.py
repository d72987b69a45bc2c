"""IommufdMapper on an iommufd in memory: one IOAS a domain, attach before map, joining."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.backends.fake_kernel import FakeDevice, FakeIommufd, Memory, Source
from viommu.basic import BasicMemoryMapper
from viommu.domain import IDENTITY, Domain, DomainKind
from viommu.errors import Access, BackendError, InternalError
from viommu.mapper import AddMapResult, MappingInfo, MemoryMapper
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import DmaNeeds
from viommu.testing.mapper_machine import MapperMachine
from viommu_backends.iommufd import IommufdMapper
from viommu_backends.iommufd_memory import IommufdMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu_backends.iommufd_context import Iommufd
    from viommu_backends.vfio_device import VfioDevice

RW = Access.READ | Access.WRITE
MIB = 1 << 20
ONE = MappingInfo(0x5000, MIB, 0x2000, RW)


class World:
    def __init__(self, *, files: bool = True) -> None:
        self.kernel = FakeIommufd(files=files)
        self.memory = Memory()
        self.memory.add(0, 16 * MIB)
        self.shared = IommufdMemory(cast("Iommufd", self.kernel), self.memory.register)

    @property
    def spaces(self) -> list[int]:
        """The IOASes of domains."""
        return [number for number in self.kernel.spaces if number != self.shared.ioas]

    @property
    def targets(self) -> list[DmaNeeds]:
        """What the domains that follow guest memory need."""
        return [needs for target, needs in self.memory.targets.values() if target != self.shared]

    def mapper(self, devices: int = 1) -> tuple[IommufdMapper, list[FakeDevice]]:
        fakes = [FakeDevice(self.kernel) for _ in range(devices)]
        mapper = IommufdMapper(self.shared, [cast("VfioDevice", fake) for fake in fakes])
        return mapper, fakes


@pytest.fixture
def world() -> World:
    return World()


def entries(world: World, mapper: IommufdMapper) -> dict[int, tuple[int, Source, Access]]:
    assert mapper.ioas is not None
    return world.kernel.spaces[mapper.ioas].entries


def test_it_satisfies_the_contract(world: World) -> None:
    mapper, _ = world.mapper()

    assert isinstance(mapper, MemoryMapper)
    assert mapper.supports_detach()
    assert mapper.get_mask() & 0x1000
    assert not mapper.join(BasicMemoryMapper())


def test_a_group_is_blocked_until_something_is_mapped(world: World) -> None:
    mapper, (device,) = world.mapper()
    assert device.ioas is None
    assert mapper.remove_map(0, 1 << 64) == (True, None)
    assert mapper.mappings() == mapper.entries() == []
    assert mapper.reset_domain() is None

    assert mapper.add_map(ONE) is AddMapResult.OK

    assert device.ioas == mapper.ioas
    assert entries(world, mapper) == {0x5000: (0x2000, 0x7000_0010_0000, RW)}
    assert mapper.entries() == [ONE]
    assert mapper.add_map(ONE) is AddMapResult.OVERLAP_FAILURE
    assert world.kernel.lazy == {world.shared.ioas}, "an IOAS without a device accepts anything"


def test_leaving_destroys_the_ioas_and_the_subscription(world: World) -> None:
    mapper, (device,) = world.mapper()
    mapper.add_map(ONE)

    mapper.reset_domain()

    assert device.ioas is None
    assert world.spaces == []
    assert world.targets == []
    mapper.add_map(ONE)
    assert len(world.spaces) == 1


def test_joining_is_one_attach_and_maps_nothing(world: World) -> None:
    first, _ = world.mapper()
    second, (device,) = world.mapper()
    first.add_map(ONE)

    assert second.join(first)

    assert device.attaches == 1
    assert first.id() == second.id()
    assert len(world.spaces) == 1
    second.remove_map(0x5000, 0x2000)
    assert first.mappings() == []
    first.reset_domain()
    assert second.ioas in world.spaces
    second.reset_domain()
    assert world.spaces == []
    assert first.id() != second.id()


def test_joining_one_that_has_mapped_nothing_yet_makes_the_space_for_both(world: World) -> None:
    first, _ = world.mapper()
    second, _ = world.mapper()

    assert second.join(first)
    first.add_map(ONE)
    assert second.mappings() == [ONE]


def test_only_one_space_at_a_time(world: World) -> None:
    first, _ = world.mapper()
    second, _ = world.mapper()
    second.add_map(ONE)

    with pytest.raises(InternalError):
        second.join(first)


def test_a_mapper_that_mapped_nothing_any_more_joins(world: World) -> None:
    first, _ = world.mapper()
    second, (device,) = world.mapper()
    first.add_map(ONE)
    second.add_map(ONE)
    second.remove_map(0, 1 << 32)

    assert second.join(first)

    assert second.mappings() == [ONE]
    assert device.detaches == 0
    assert len(world.spaces) == 1


@pytest.mark.parametrize("mates", [0, 1])
def test_a_switch_is_one_attach_and_no_detach(world: World, mates: int) -> None:
    mapper, (device,) = world.mapper()
    mapper.add_map(IDENTITY)
    mate, _ = world.mapper()
    mate.add_map(ONE)
    before = device.attaches
    others: list[MemoryMapper] = [BasicMemoryMapper(), mate]

    assert mapper.switch([ONE], others[: 2 * mates])

    assert (device.attaches - before, device.detaches) == (1, 0)
    assert entries(world, mapper) == {0x5000: (0x2000, 0x7000_0010_0000, RW)}
    assert (mapper.ioas == mate.ioas) is bool(mates)
    assert len(world.spaces) == 2 - mates
    assert len(world.targets) == 2 - mates


def test_a_blocked_group_has_nothing_to_switch_from(world: World) -> None:
    mapper, _ = world.mapper()

    assert not mapper.switch([ONE], [])
    assert world.spaces == []


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("join", [False, True])
def test_a_switch_that_the_host_refuses_changes_nothing(
    world: World, devices: int, join: bool
) -> None:
    mapper, fakes = world.mapper(devices)
    mapper.add_map(ONE)
    mate, _ = world.mapper()
    mate.add_map(ONE)
    before = mapper.ioas
    fakes[-1].refuse = errno.EINVAL

    assert not mapper.switch([ONE], [mate] if join else [])

    assert {fake.ioas for fake in fakes} == {before}
    assert mapper.mappings() == [ONE]
    assert len(world.spaces) == 2


def test_a_switch_to_what_the_devices_can_not_reach_changes_nothing(world: World) -> None:
    mapper, (device,) = world.mapper()
    mapper.add_map(ONE)

    assert not mapper.switch([ONE, MappingInfo(1 << 40, 0, 0x1000, RW)], [])

    assert device.ioas == mapper.ioas
    assert mapper.mappings() == [ONE]
    assert len(world.spaces) == 1


def test_memory_that_can_not_be_mapped_ends_a_switch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapper, _ = world.mapper()
    mapper.add_map(ONE)

    def refuse(*_: object) -> None:
        raise BackendError(errno.ENOMEM, "map")

    monkeypatch.setattr(world.kernel, "copy", refuse)

    assert not mapper.switch([ONE], [])
    assert len(world.spaces) == 1


def test_mappers_of_two_contexts_do_not_join(world: World) -> None:
    first, _ = world.mapper()
    second, _ = World().mapper()

    assert not second.join(first)


def test_every_device_of_a_group_is_attached_or_none(world: World) -> None:
    mapper, devices = world.mapper(3)
    devices[2].refuse = errno.EADDRINUSE

    with pytest.raises(BackendError):
        mapper.add_map(ONE)

    assert [device.ioas for device in devices] == [None] * 3
    assert world.spaces == []
    devices[2].refuse = 0
    mapper.add_map(ONE)
    assert len({device.ioas for device in devices}) == 1


def test_a_join_that_is_refused_leaves_the_group_blocked(world: World) -> None:
    first, _ = world.mapper()
    second, (device,) = world.mapper()
    first.add_map(ONE)
    device.refuse = errno.EINVAL

    with pytest.raises(BackendError):
        second.join(first)
    assert second.ioas is None
    first.reset_domain()
    assert world.spaces == []


def test_a_first_map_that_is_refused_leaves_nothing(world: World) -> None:
    mapper, (device,) = world.mapper()

    with pytest.raises(BackendError):
        mapper.add_map(MappingInfo(1 << 40, 0, 0x1000, RW))

    assert device.ioas is None
    assert world.spaces == []


def test_a_later_map_that_is_refused_keeps_the_rest(world: World) -> None:
    mapper, _ = world.mapper()
    mapper.add_map(ONE)

    with pytest.raises(BackendError):
        mapper.add_map(MappingInfo(1 << 40, 0, 0x1000, RW))
    assert mapper.mappings() == [ONE]


@pytest.fixture
def backing() -> Iterator[FileBacking]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, MIB)
    with FileBacking(fd) as backing:
        os.close(fd)
        yield backing


@pytest.mark.parametrize("files", [True, False])
def test_a_file_is_mapped_as_a_file_where_the_kernel_can(files: bool, backing: FileBacking) -> None:
    world = World(files=files)
    world.memory.add(32 * MIB, 33 * MIB, backing)
    mapper, _ = world.mapper()

    mapper.add_map(MappingInfo(0, 32 * MIB, 0x1000, RW))

    source = (backing.fileno(), 32 * MIB) if files else 0x7000_0200_0000
    assert entries(world, mapper) == {0: (0x1000, source, RW)}
    assert world.targets == [DmaNeeds.NONE if files else DmaNeeds.HOST_VA]


def test_bypass_is_the_identity_of_memory_as_it_is_now(world: World) -> None:
    mapper, _ = world.mapper()
    mapper.add_map(IDENTITY)
    world.memory.add(1 << 32, (1 << 32) + MIB)

    assert sorted(entries(world, mapper)) == [0, 1 << 32]


def test_a_domain_of_three_kinds_of_mapper_gets_each_mapping_once(world: World) -> None:
    first, _ = world.mapper()
    second, _ = world.mapper()
    software = BasicMemoryMapper()
    domain = Domain(DomainKind.TRANSLATING, 1)
    for mapper in (first, software, second):
        domain.add_group(mapper)

    domain.map_range(ONE)

    assert first.ioas == second.ioas
    assert software.mappings() == first.mappings() == [ONE]
    domain.unmap_range(0, MIB)
    assert software.mappings() == first.mappings() == []


def test_the_rule_machine_finds_no_fault_with_it() -> None:
    class Machine(MapperMachine):
        exports = False

        def make_mapper(self) -> MemoryMapper:
            mapper, _ = World().mapper()
            return mapper

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck)),
    )
