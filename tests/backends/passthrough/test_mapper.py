from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.basic import BasicMemoryMapper
from viommu.domain import IDENTITY, Domain, DomainKind
from viommu.errors import Access
from viommu.mapper import AddMapResult, MappingInfo, MemoryMapper, SwitchingMapper
from viommu_backends.passthrough.mapper import GroupMapper

if TYPE_CHECKING:
    from collections.abc import Iterable

ONE = MappingInfo(0x1000, 0x8000, 0x1000, Access.READ)


class Joining(BasicMemoryMapper):
    """A mapper that shares the space of any other of its kind, as iommufd does."""

    joined: Joining | None = None

    def join(self, other: MemoryMapper) -> bool:
        if isinstance(other, Joining):
            self.joined = other
        return isinstance(other, Joining)

    def id(self) -> int:
        return self.joined.id() if self.joined else super().id()


def mapped(mapper: BasicMemoryMapper) -> bool:
    mapper.start_export_session().close()
    return mapper.export(0x1000, 1) is not None


def test_it_passes_everything_on() -> None:
    inner = BasicMemoryMapper()
    mapper = GroupMapper(inner)

    assert isinstance(mapper, MemoryMapper)
    assert (mapper.id(), mapper.get_mask()) == (inner.id(), inner.get_mask())
    assert mapper.supports_detach() is inner.supports_detach()
    assert mapper.add_map(ONE) is AddMapResult.OK
    assert mapper.add_map(ONE) is AddMapResult.OVERLAP_FAILURE
    assert mapped(inner)
    inner.release(0x1000, 1)
    assert not mapper.remove_map(0x1000, 0x800).ok
    assert mapper.remove_map(0x1000, 0x1000) == (True, None)
    assert mapper.reset_domain() is None


def test_with_nothing_behind_it_everything_succeeds() -> None:
    inner = BasicMemoryMapper()
    mapper = GroupMapper(inner)
    mapper.add_map(ONE)
    mapper.retire()

    assert mapper.add_map(ONE) is AddMapResult.OK
    assert mapper.remove_map(0, 1 << 64) == (True, None)
    assert mapper.reset_domain() is None
    assert mapper.supports_detach()
    assert mapper.get_mask() == inner.get_mask()
    assert mapper.id() != inner.id()


def test_groups_join_as_what_is_behind_them_does() -> None:
    first, second = Joining(), Joining()
    one, two, other = GroupMapper(first), GroupMapper(second), GroupMapper(BasicMemoryMapper())

    assert not one.join(other)
    assert not one.join(second)
    assert one.join(two)
    assert first.joined is second
    assert one.id() == two.id()
    two.retire()
    assert not one.join(two)
    assert not two.join(one)


def test_groups_switch_as_what_is_behind_them_does() -> None:
    class Switching(BasicMemoryMapper):
        mates: tuple[MemoryMapper, ...] = ()

        def switch(self, mappings: Iterable[MappingInfo], mates: Iterable[MemoryMapper]) -> bool:
            self.mates = tuple(mates)
            return list(mappings) == [ONE]

    inner, mate = Switching(), Switching()
    mapper, gone = GroupMapper(inner), GroupMapper(Switching())
    gone.retire()

    assert isinstance(mapper, SwitchingMapper)
    assert mapper.switch([ONE], [BasicMemoryMapper(), gone, GroupMapper(mate)])
    assert inner.mates == (mate,)
    assert not mapper.switch([], [])
    assert not GroupMapper(BasicMemoryMapper()).switch([ONE], [])
    assert gone.switch([ONE], [])


def test_a_domain_goes_on_without_a_group_that_is_gone() -> None:
    domain = Domain(DomainKind.TRANSLATING, 7)
    gone, staying = GroupMapper(BasicMemoryMapper()), BasicMemoryMapper()
    domain.add_group(gone)
    domain.add_group(staying)
    domain.map_range(ONE)

    gone.retire()
    domain.map_range(ONE._replace(iova=0x4000))
    domain.unmap_range(0x4000, 0x5000)
    blocked = Domain(DomainKind.BLOCKED)
    for group in list(domain.groups):
        blocked.take(group)
    bypass = Domain(DomainKind.BYPASS)
    for group in list(blocked.groups):
        bypass.take(group)

    assert len(bypass.groups) == 2
    assert staying.add_map(IDENTITY) is AddMapResult.OVERLAP_FAILURE
