"""Domains: replay on attach, rollback, several mappers."""

import errno
from collections.abc import Iterable

import pytest

from viommu.basic import BasicMemoryMapper
from viommu.domain import (
    IDENTITY,
    X86_MSI_WINDOW,
    Domain,
    DomainKind,
    ReservedRegion,
    sorted_reserved,
)
from viommu.errors import Access, BackendError, GuestError, InternalError, UsageError
from viommu.events import Event
from viommu.mapper import AddMapResult, MappingInfo, MemoryMapper, RemoveMapResult
from viommu.spec.virtio_iommu import ReservedKind, Status

RW = Access.READ | Access.WRITE
PAGE = 0x1000
ONE = MappingInfo(0, 0x10000, PAGE, RW)
TWO = MappingInfo(PAGE, 0x20000, PAGE, RW)


class Flaky(BasicMemoryMapper):
    """A real mapper whose host refuses the calls numbered in ``add_fails`` and ``remove_fails``."""

    def __init__(self, *, detach: bool = True) -> None:
        super().__init__()
        self.adds = self.removes = 0
        self.add_fails: set[int] = set()
        self.remove_fails: set[int] = set()
        self._detach = detach

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        self.adds += 1
        if self.adds in self.add_fails:
            raise BackendError(errno.ENOMEM, f"map {mapping}")
        return super().add_map(mapping)

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        self.removes += 1
        if self.removes in self.remove_fails:
            raise BackendError(errno.EIO, f"unmap {iova_start:#x}")
        return super().remove_map(iova_start, size)

    def supports_detach(self) -> bool:
        return self._detach


def translating(*mappers: BasicMemoryMapper) -> Domain:
    domain = Domain(DomainKind.TRANSLATING, 1)
    for mapper in mappers:
        domain.add_group(mapper)
    return domain


def test_a_map_reaches_every_mapper() -> None:
    mappers = [Flaky(), Flaky(), Flaky()]
    domain = translating(*mappers)

    domain.map_range(ONE)

    assert [m.mappings() for m in mappers] == [[ONE]] * 3
    domain._check()


def test_a_failure_in_the_third_mapper_undoes_the_first_two() -> None:
    mappers = [Flaky(), Flaky(), Flaky()]
    domain = translating(*mappers)
    domain.map_range(ONE)
    mappers[2].add_fails = {2}

    with pytest.raises(BackendError):
        domain.map_range(TWO)

    assert [m.mappings() for m in mappers] == [[ONE]] * 3
    assert list(domain.map) == [ONE]
    domain.map_range(TWO)
    domain._check()


def test_an_undo_that_fails_empties_the_mapper_and_says_so_until_it_moves() -> None:
    first, second = Flaky(), Flaky()
    domain = translating(first, second)
    domain.map_range(TWO)
    second.add_fails = {2}
    first.remove_fails = {1}

    with pytest.raises(BackendError):
        domain.map_range(ONE)

    broken = domain.groups[0]
    assert broken.broken
    assert first.mappings() == []
    with pytest.raises(InternalError, match="out of order"):
        domain.map_range(ONE)
    # What must not be mapped any longer still goes from the others.
    assert domain.unmap_range(PAGE, 2 * PAGE) == []
    assert second.mappings() == []
    blocked = Domain(DomainKind.BLOCKED)
    blocked.take(broken)
    domain.take(broken)
    assert not broken.broken
    domain.map_range(ONE)
    assert first.mappings() == second.mappings() == [ONE]


def test_an_overlap_with_what_the_host_keeps_is_invalid() -> None:
    mapper = Flaky()
    domain = translating(mapper)
    mapper.add_map(ONE)

    with pytest.raises(GuestError) as caught:
        domain.map_range(ONE)

    assert caught.value.status == Status.INVAL
    assert not len(domain.map)


def test_an_unmap_that_a_host_refuses_is_put_back_everywhere() -> None:
    first, second = Flaky(), Flaky()
    domain = translating(first, second)
    domain.map_range(ONE)
    domain.map_range(TWO)
    second.remove_fails = {1}

    with pytest.raises(BackendError):
        domain.unmap_range(0, 2 * PAGE)

    assert first.mappings() == second.mappings() == list(domain.map) == [ONE, TWO]
    assert domain.unmap_range(0, 2 * PAGE) == []
    assert first.mappings() == second.mappings() == []


def test_an_unmap_whose_undo_fails_too_breaks_the_mapper() -> None:
    first, second = Flaky(), Flaky()
    domain = translating(first, second)
    domain.map_range(ONE)
    second.remove_fails = {1}
    first.add_fails = {2}

    with pytest.raises(BackendError):
        domain.unmap_range(0, PAGE)

    assert domain.groups[0].broken
    assert domain.groups[1].broken is None


def test_a_mapper_that_disagrees_about_what_is_mapped_is_our_bug() -> None:
    mapper = Flaky()
    domain = translating(mapper)
    domain.map_range(TWO)
    mapper.remove_map(PAGE, PAGE)
    mapper.add_map(MappingInfo(PAGE, 0, 2 * PAGE, RW))

    with pytest.raises(InternalError, match="would split"):
        domain.unmap_range(PAGE, 3 * PAGE)
    assert list(domain.map) == [TWO]


def test_a_map_that_is_taken_out_is_gone_everywhere_and_says_who_must_let_go() -> None:
    mappers = [Flaky(), Flaky(), Flaky()]
    domain = translating(*mappers)
    domain.map_range(ONE)
    domain.map_range(TWO)
    mappers[0].start_export_session()
    mappers[0].export(PAGE, 4)
    mappers[2].remove_fails = {1}

    waits = domain.take_out(TWO)

    assert len(waits) == 1
    assert list(domain.map) == mappers[0].mappings() == mappers[1].mappings() == [ONE]
    assert mappers[2].mappings() == []
    assert [group.broken is None for group in domain.groups] == [True, True, False]
    mappers[0].release(PAGE, 4)
    assert waits[0].is_set()


def test_unmapping_exported_memory_of_two_mappers_waits_for_both() -> None:
    mappers = [Flaky(), Flaky(), Flaky()]
    domain = translating(*mappers)
    domain.map_range(ONE)
    for mapper in mappers[:2]:
        mapper.start_export_session()
        mapper.export(0, 4)

    waits = domain.unmap_range(0, PAGE)

    assert len(waits) == 2
    mappers[0].release(0, 4)
    assert [w.is_set() for w in waits] == [True, False]


def test_a_group_that_is_taken_back_holds_its_domain_again() -> None:
    mapper = Flaky()
    home, other = translating(mapper), Domain(DomainKind.TRANSLATING, 2)
    home.map_range(ONE)
    (group,) = home.groups
    other.map.add(TWO)
    other.take(group)
    mapper.start_export_session()
    mapper.export(PAGE, 4)

    resolution = home.take_back(group)

    assert resolution is not None
    assert mapper.mappings() == [ONE]
    assert (group.domain, group.broken) == (home, None)
    home._check()
    other._check()


def test_a_group_that_can_not_be_put_right_is_taken_back_broken() -> None:
    mapper = Flaky()
    home, other = translating(mapper), Domain(DomainKind.TRANSLATING, 2)
    home.map_range(ONE)
    (group,) = home.groups
    other.take(group)
    mapper.add_fails = {2}

    assert home.take_back(group) is None
    assert mapper.mappings() == []
    assert group.domain is home
    assert "putting its domain back failed" in str(group.broken)


class Joining(Flaky):
    """Mappers that share one space, as devices in one iommufd IOAS do."""

    def __init__(self) -> None:
        super().__init__()
        self.space = Flaky()
        self.joins = 0
        self.join_fails = False

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        return self.space.add_map(mapping)

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        return self.space.remove_map(iova_start, size)

    def mappings(self) -> list[MappingInfo]:
        return self.space.mappings()

    def id(self) -> int:
        return self.space.id()

    def join(self, other: MemoryMapper) -> bool:
        if not isinstance(other, Joining):
            return False
        if self.join_fails:
            raise BackendError(errno.EINVAL, "attach")
        self.joins += 1
        self.space = other.space
        return True

    def reset_domain(self) -> Event | None:
        self.space = Flaky()
        return None


def test_mappers_that_can_share_a_space_are_not_replayed_to() -> None:
    first, second, plain = Joining(), Joining(), Flaky()
    domain = translating(first, plain)
    domain.map_range(ONE)
    domain.add_group(second)

    domain.map_range(TWO)

    assert second.joins == 1
    assert first.space is second.space
    assert first.space.adds == 2
    assert plain.mappings() == second.mappings() == [ONE, TWO]
    assert domain.unmap_range(0, 2 * PAGE) == []
    assert plain.mappings() == second.mappings() == []


def test_leaving_a_shared_space_takes_nothing_along_even_when_it_is_empty() -> None:
    first, second = Joining(), Joining()
    domain, other = translating(first), translating()
    group = domain.add_group(second)
    other.map_range(ONE)

    other.take(group)

    assert first.space is not second.space
    assert second.mappings() == [ONE]
    assert first.mappings() == []


def test_a_join_that_the_host_refuses_leaves_the_group_where_it_was() -> None:
    domain, source = translating(Joining()), Domain(DomainKind.BLOCKED)
    domain.map_range(ONE)
    late = Joining()
    group = source.add_group(late)
    late.join_fails = True

    with pytest.raises(BackendError):
        domain.take(group)

    assert group.domain is source
    assert late.mappings() == []


def test_taking_a_group_replays_every_mapping() -> None:
    domain = translating(Flaky())
    domain.map_range(ONE)
    domain.map_range(TWO)
    other = Domain(DomainKind.BLOCKED)
    newcomer = Flaky()
    group = other.add_group(newcomer)

    assert domain.take(group) is None

    assert newcomer.mappings() == [ONE, TWO]
    assert group.domain is domain
    assert other.groups == []


def test_a_replay_that_fails_leaves_the_group_where_it_was() -> None:
    source, target = translating(), translating()
    mapper = Flaky()
    group = source.add_group(mapper)
    source.map_range(MappingInfo(0x8000, 0, PAGE, RW))
    target.map_range(ONE)
    target.map_range(TWO)
    mapper.add_fails = {3}

    with pytest.raises(BackendError):
        target.take(group)

    assert group.domain is source
    assert mapper.mappings() == list(source.map)
    assert group.broken is None
    source._check()
    target._check()


def test_a_group_that_can_not_be_put_back_is_broken() -> None:
    source, target = translating(), translating()
    mapper = Flaky()
    group = source.add_group(mapper)
    source.map_range(ONE)
    target.map_range(TWO)
    mapper.add_fails = {2, 3}

    with pytest.raises(InternalError, match="putting its domain back"):
        target.take(group)
    assert group.broken


def test_a_mapper_that_can_not_detach_stays() -> None:
    source, target = translating(), translating()
    group = source.add_group(Flaky(detach=False))
    source.map_range(ONE)

    with pytest.raises(GuestError) as caught:
        target.take(group)

    assert caught.value.status == Status.UNSUPP
    assert group.domain is source


class Switching(Flaky):
    """A mapper that can go to another address space in one step, when it is ``able``."""

    def __init__(self, *, able: bool = True) -> None:
        super().__init__()
        self.able = able
        self.switched: list[tuple[list[MappingInfo], list[MemoryMapper]]] = []

    def switch(self, mappings: Iterable[MappingInfo], mates: Iterable[MemoryMapper]) -> bool:
        if not self.able:
            return False
        self.switched.append((list(mappings), list(mates)))
        super().reset_domain()
        for mapping in self.switched[-1][0]:
            super().add_map(mapping)
        return True


@pytest.mark.parametrize("able", [True, False])
def test_a_group_moves_in_one_step_where_its_host_can(able: bool) -> None:
    moving, mate = Switching(able=able), Switching()
    old, new = translating(moving), translating(mate)
    old.map_range(ONE)
    new.map_range(TWO)
    (group,) = old.groups

    assert new.take(group) is None

    assert moving.mappings() == [TWO]
    assert moving.switched == ([([TWO], [mate])] if able else [])
    assert (old.groups, new.groups[-1], group.domain) == ([], group, new)
    new._check()
    assert old.take_back(group) is None
    assert moving.mappings() == [ONE]
    assert len(moving.switched) == (2 if able else 0)
    old._check()


def test_a_group_leaves_bypass_in_one_step_and_enters_it_so() -> None:
    mapper = Switching()
    bypass, domain = Domain(DomainKind.BYPASS), translating()
    group = bypass.add_group(mapper)

    domain.take(group)
    bypass.take(group)

    assert mapper.switched == [([], []), ([IDENTITY], [])]
    assert mapper.mappings() == [IDENTITY]


def test_to_and_from_being_blocked_there_is_only_one_step_anyway() -> None:
    mapper = Switching()
    blocked, domain = Domain(DomainKind.BLOCKED), translating()
    group = blocked.add_group(mapper)

    domain.take(group)
    blocked.take(group)

    assert mapper.switched == []


def test_bypass_is_the_identity() -> None:
    bypass = Domain(DomainKind.BYPASS)
    mapper = Flaky()

    group = bypass.add_group(mapper)
    assert mapper.mappings() == [IDENTITY]
    assert Domain(DomainKind.BLOCKED).take(group) is None
    assert mapper.mappings() == []


def test_leaving_bypass_waits_for_exports() -> None:
    mapper = Flaky()
    group = Domain(DomainKind.BYPASS).add_group(mapper)
    mapper.start_export_session()
    mapper.export(0x1234, 1)

    resolution = Domain(DomainKind.BLOCKED).take(group)

    assert resolution is not None
    mapper.release(0x1234, 1)
    assert resolution.is_set()


@pytest.mark.parametrize(
    "regions",
    [
        [ReservedRegion(5, 5)],
        [ReservedRegion(0, 5), ReservedRegion(4, 6)],
        [ReservedRegion(0, (1 << 64) + 1)],
        [X86_MSI_WINDOW, ReservedRegion(0, 1, ReservedKind.MSI)],
    ],
)
def test_what_probe_must_not_say_is_refused(regions: list[ReservedRegion]) -> None:
    with pytest.raises(UsageError, match="ReservedRegion"):
        sorted_reserved(regions)


def test_reserved_regions_are_sorted() -> None:
    first = ReservedRegion(0, 5)

    assert sorted_reserved([X86_MSI_WINDOW, first]) == (first, X86_MSI_WINDOW)


@pytest.mark.parametrize("damage", ["kind", "group", "deferred"])
def test_check_finds_damage(damage: str) -> None:
    domain = translating(Flaky())
    if damage == "kind":
        domain.map_range(ONE)
        domain.kind = DomainKind.BLOCKED
    elif damage == "deferred":
        domain.deferred.append(domain.groups[0])
    else:
        domain.groups[0].domain = Domain(DomainKind.BLOCKED)

    with pytest.raises(InternalError):
        domain._check()
