"""Mappings and memory make entries: by hand, with refusals, and against a page-by-page model."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from viommu.domain import IDENTITY
from viommu.errors import Access, BackendError, InternalError
from viommu.mapper import MappingInfo
from viommu_backends.host_map import HostMap, Piece

PAGE = 0x1000
R = Access.READ
RW = Access.READ | Access.WRITE


class Table:
    """A host IOMMU that checks what it is asked, and refuses when told to."""

    page_size = PAGE

    def __init__(self) -> None:
        self.entries: dict[int, tuple[int, int | None, Access]] = {}
        self.calls = 0
        self.refuse: set[int] = set()

    def map(self, iova: int, piece: Piece, prot: Access) -> None:
        self._call()
        assert prot
        assert not (iova | piece.size) % PAGE
        for start, (size, _, _) in self.entries.items():
            assert start >= iova + piece.size or iova >= start + size, "overlap"
        self.entries[iova] = (piece.size, piece.va, prot)

    def unmap(self, iova: int, size: int) -> None:
        self._call()
        assert self.entries[iova][0] == size, "not exactly what was mapped"
        del self.entries[iova]

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self.refuse:
            raise BackendError(errno.EIO, "refused")

    def pages(self) -> dict[int, tuple[int | None, Access]]:
        return {
            iova + at: (None if va is None else va + at, prot)
            for iova, (size, va, prot) in self.entries.items()
            for at in range(0, size, PAGE)
        }


def ram(page: int, count: int, *, writable: bool = True, device: bool = False) -> Piece:
    return Piece(page * PAGE, count * PAGE, (0x700 + page) * PAGE, None, 0, writable, device)


def mapping(iova: int, page: int, count: int = 1, prot: Access = RW) -> MappingInfo:
    return MappingInfo(iova * PAGE, page * PAGE, count * PAGE, prot)


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def host(table: Table) -> HostMap:
    host = HostMap(table)
    host.add_memory(ram(0, 4))
    host.add_memory(ram(4, 2, writable=False))
    host.add_memory(ram(8, 4))
    return host


def test_a_mapping_over_several_pieces_becomes_an_entry_each(host: HostMap, table: Table) -> None:
    assert host.add(mapping(0x100, 2, 8))

    assert table.entries == {
        0x100 * PAGE: (2 * PAGE, 0x702 * PAGE, RW),
        0x102 * PAGE: (2 * PAGE, 0x704 * PAGE, R),
        0x106 * PAGE: (2 * PAGE, 0x708 * PAGE, RW),
    }
    host._check()
    assert host.remove(0x100 * PAGE, 0x108 * PAGE) == [mapping(0x100, 2, 8)]
    assert table.entries == {}


def test_bypass_is_all_of_memory_and_nothing_else(host: HostMap, table: Table) -> None:
    host.add(IDENTITY)

    assert sorted(table.entries) == [0, 4 * PAGE, 8 * PAGE]
    host.add_memory(ram(20, 1))
    assert 20 * PAGE in table.entries
    host.remove_memory(0, 6 * PAGE)
    assert sorted(table.entries) == [8 * PAGE, 20 * PAGE]


def test_a_mapping_may_come_before_its_memory(host: HostMap, table: Table) -> None:
    host.add(mapping(0, 30))
    assert table.entries == {}

    host.add_memory(ram(30, 1))

    assert list(table.entries) == [0]


def test_a_mapping_without_access_has_no_entry(host: HostMap, table: Table) -> None:
    assert host.add(mapping(0, 0, 1, Access.NONE))
    assert host.add(mapping(1, 4, 1, Access.WRITE))
    assert table.entries == {}


def test_overlap_is_no_error_and_changes_nothing(host: HostMap, table: Table) -> None:
    host.add(mapping(0, 0, 2))
    before = dict(table.entries)

    assert not host.add(mapping(1, 8))
    assert table.entries == before


def test_a_removal_that_would_split_removes_nothing(host: HostMap, table: Table) -> None:
    host.add(mapping(0, 0, 2))

    assert host.remove(0, PAGE) is None
    assert len(host) == 1
    assert len(table.entries) == 1


def test_memory_smaller_than_a_page_is_left_out(table: Table) -> None:
    host = HostMap(table)
    host.add_memory(Piece(0x800, 0x1000, 0x800, None, 0, writable=True, device=False))
    host.add_memory(Piece(0x3000, 0x1800, 0x3000, None, 0, writable=True, device=False))

    host.add(IDENTITY)

    assert table.entries == {0x3000: (PAGE, 0x3000, RW)}


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_add_that_is_refused_half_way_is_undone(
    host: HostMap, table: Table, failing: int
) -> None:
    table.refuse = {failing}

    with pytest.raises(BackendError):
        host.add(mapping(0x100, 2, 8))

    assert table.entries == {}
    assert host.mappings() == []
    assert host.add(mapping(0x100, 2, 8))


@pytest.mark.parametrize("failing", [4, 5, 6])
def test_a_removal_that_is_refused_half_way_is_undone(
    host: HostMap, table: Table, failing: int
) -> None:
    host.add(mapping(0x100, 2, 8))
    before = dict(table.entries)
    table.refuse = {failing}

    with pytest.raises(BackendError):
        host.remove(0x100 * PAGE, 0x108 * PAGE)

    assert table.entries == before
    host._check()
    host.clear()
    assert table.entries == {}


def test_what_can_not_be_put_back_is_said(host: HostMap, table: Table) -> None:
    host.add(mapping(0x100, 2, 8))
    table.refuse = {5, 6}

    with pytest.raises(InternalError, match="can't be put back"):
        host.remove(0x100 * PAGE, 0x108 * PAGE)


def test_ram_that_is_refused_is_not_added(host: HostMap, table: Table) -> None:
    host.add(mapping(0, 20))
    host.add(mapping(1, 21))
    table.refuse = {2}

    with pytest.raises(BackendError):
        host.add_memory(ram(20, 2))

    assert table.entries == {}
    host.add_memory(ram(20, 2))
    assert len(table.entries) == 2


def test_a_bar_that_is_refused_is_left_out_and_counted(host: HostMap, table: Table) -> None:
    host.add(IDENTITY)
    table.refuse = {table.calls + 1}

    host.add_memory(ram(20, 2, device=True))

    assert host.refused_bars == 1
    assert 20 * PAGE not in table.entries
    host.remove_memory(20 * PAGE, 22 * PAGE)
    host._check()


def test_a_guest_that_asks_for_a_bar_is_told_when_it_is_refused(
    host: HostMap, table: Table
) -> None:
    host.add_memory(ram(20, 2, device=True))
    table.refuse = {1}

    with pytest.raises(BackendError):
        host.add(mapping(0, 20))


def test_a_removal_of_memory_that_is_refused_keeps_it(host: HostMap, table: Table) -> None:
    host.add(mapping(0, 0))
    host.add(mapping(1, 1))
    table.refuse = {4}

    with pytest.raises(BackendError):
        host.remove_memory(0, 4 * PAGE)

    assert len(table.entries) == 2
    host.remove_memory(0, 4 * PAGE)
    assert table.entries == {}


def test_what_a_host_refuses_later_is_no_entry(host: HostMap, table: Table) -> None:
    mapping = MappingInfo(0x10000, 2 * PAGE, 4 * PAGE, RW)
    host.add(mapping)
    del table.entries[0x12000]

    assert host.refuse(0x12000) == mapping
    assert host.refuse(0x12000) is None
    assert host.refuse(0x11000) is None
    assert [entry.iova for entry in host.entries()] == [0x10000]
    host.withdraw(mapping)
    assert table.entries == {}
    assert host.mappings() == [mapping]
    host._check()


def test_a_host_that_has_lost_everything_is_filled_again(host: HostMap, table: Table) -> None:
    mapping = MappingInfo(0x10000, 2 * PAGE, 4 * PAGE, RW)
    host.add_memory(ram(20, 2, device=True))
    host.add(mapping)
    host.add(MappingInfo(0x20000, 20 * PAGE, 2 * PAGE, RW))
    other = Table()
    other.refuse = {3}  # a BAR: tolerated, although it was asked for once
    copy = host.moved_to(other)

    assert copy.mappings() == host.mappings()
    assert copy.entries() == host.entries()[:2]
    assert copy.pieces() == host.pieces()
    assert copy.refused_bars == 1
    copy._check()
    copy.remove(0x10000, 0x20000)
    assert len(table.entries) == 3
    third = Table()
    third.refuse = {2}
    with pytest.raises(BackendError):
        host.moved_to(third)
    host._check()


def test_bars_that_are_refused_again_and_again_are_logged_ever_more_rarely(
    host: HostMap, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        host.tolerate(BackendError(errno.EIO, "refused"))

    assert host.refused_bars == 10
    assert caplog.text.count("a BAR stays out of reach") == 4


def test_gaps_in_a_removal_of_memory_are_no_error(host: HostMap) -> None:
    host.remove_memory(0, 1 << 64)
    host.remove_memory(0, 1 << 64)
    host._check()


def test_overlapping_memory_is_our_own_bug(host: HostMap) -> None:
    with pytest.raises(InternalError, match="overlaps"):
        host.add_memory(ram(3, 1))


SPAN = 12
spans = st.tuples(st.integers(0, SPAN - 1), st.integers(1, 4))


class Machine(RuleBasedStateMachine):
    """Random mappings and memory, some calls refused: entries are always what they must be."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.host = HostMap(self.table)
        self.memory: dict[int, Piece] = {}
        self.mappings: list[MappingInfo] = []

    @rule(span=spans, page=st.integers(0, SPAN), refuse=st.booleans())
    def add(self, span: tuple[int, int], page: int, *, refuse: bool) -> None:
        new = mapping(span[0], page, span[1])
        self.table.refuse = {self.table.calls + 2} if refuse else set()
        overlaps = any(
            new.iova < m.iova + m.size and m.iova < new.iova + new.size for m in self.mappings
        )
        try:
            assert self.host.add(new) is not overlaps
        except BackendError:
            return
        if not overlaps:
            self.mappings.append(new)

    @rule(span=spans)
    def remove(self, span: tuple[int, int]) -> None:
        self.table.refuse = set()
        start, end = span[0] * PAGE, (span[0] + span[1]) * PAGE
        removed = self.host.remove(start, end)
        if removed is not None:
            self.mappings = [m for m in self.mappings if m not in removed]

    @rule(page=st.integers(0, SPAN), count=st.integers(1, 4), writable=st.booleans())
    def add_memory(self, page: int, count: int, *, writable: bool) -> None:
        self.table.refuse = set()
        piece = ram(page, count, writable=writable)
        if not any(
            p.gpa < piece.gpa + piece.size and piece.gpa < p.gpa + p.size
            for p in self.memory.values()
        ):
            self.host.add_memory(piece)
            self.memory[piece.gpa] = piece

    @rule(data=st.data(), refuse=st.booleans())
    def remove_memory(self, data: st.DataObject, *, refuse: bool) -> None:
        if not self.memory:
            return
        piece = self.memory[data.draw(st.sampled_from(sorted(self.memory)))]
        self.table.refuse = {self.table.calls + 2} if refuse else set()
        try:
            self.host.remove_memory(piece.gpa, piece.gpa + piece.size)
        except BackendError:
            return
        del self.memory[piece.gpa]

    @invariant()
    def entries_follow(self) -> None:
        expected: dict[int, tuple[int | None, Access]] = {}
        for each in self.mappings:
            for at in range(0, each.size, PAGE):
                gpa = each.gpa + at
                for piece in self.memory.values():
                    if piece.gpa <= gpa < piece.gpa + piece.size and piece.va is not None:
                        prot = each.prot if piece.writable else each.prot & R
                        if prot:
                            expected[each.iova + at] = (piece.va + gpa - piece.gpa, prot)
        assert self.table.pages() == expected
        self.host._check()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
