"""The region manager against a model that looks at every page, with targets that fail.

The model knows what should be seen. What it takes from the manager is only which
regions could not be active and which entries are stuck, and that must have a reason.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.memory.recording import PAGE, Entry, RecordingTarget, pages, peek
from viommu.errors import ViommuError
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import DmaNeeds, DmaRegistration, FileMissingError, MemoryKind
from viommu.memory.incident import IncompleteError
from viommu.memory.region import MapParameters, Region, RegionError, RegionOverlapError
from viommu.memory.regions import RegionManager

PAGES = 6
MAX_TARGETS = 4
MAX_REGIONS = 5
PRIVATE = 100  # the number of the first page of private memory; the file's first is 1

first_pages = st.integers(0, PAGES - 1)
sizes = st.integers(1, 3)
kinds = st.sampled_from([MemoryKind.RAM, MemoryKind.RAM, MemoryKind.DEVICE])
needs = st.sampled_from([DmaNeeds.NONE, DmaNeeds.HOST_VA, DmaNeeds.HOST_VA, DmaNeeds.FILE])
faults = st.sets(first_pages, min_size=1, max_size=2)
indices = st.integers(0, 99)


class Page(NamedTuple):
    """What a target should have mapped at a page."""

    number: int
    writable: bool
    kind: MemoryKind


@dataclass
class Piece:
    """A sub-mapping: pages counted from the region's start, and the number of the first one."""

    start: int
    count: int
    number: int
    writable: bool


@dataclass
class Model:
    """A region as its owner sees it."""

    region: Region
    pages: range
    writable: bool | None = None  # None: disabled
    pieces: list[Piece] = field(default_factory=list)

    def at(self, page: int) -> Page | None:
        """Return what is at a page while the region is seen."""
        for piece in self.pieces:
            index = page - self.pages.start - piece.start
            if 0 <= index < piece.count:
                writable = bool(piece.writable and self.writable)
                return Page(piece.number + index, writable, self.region.kind)
        return None

    def may_overlap(self, where: range, priority: int) -> bool:
        mine, theirs = set(self.pages), set(where)
        if mine.isdisjoint(theirs):
            return True
        if self.region.priority == priority:
            return mine == theirs
        return mine >= theirs if self.region.priority > priority else mine <= theirs


class RegionMachine(RuleBasedStateMachine):
    """Random changes by owners, targets that come and go, and faults of targets."""

    def __init__(self) -> None:
        super().__init__()
        fd = os.memfd_create("machine")
        os.ftruncate(fd, 2 * PAGES * PAGE)
        self.file = FileBacking(fd)
        os.close(fd)
        self.private = PrivateBacking(2 * PAGES * PAGE)
        for page in range(2 * PAGES):
            os.pwrite(self.file.fileno(), bytes([1 + page]), page * PAGE)
            self.private.view[page * PAGE] = PRIVATE + page
        self.manager = RegionManager(reservation=PAGES * PAGE, report=lambda incident: None)
        self.models: list[Model] = []
        self.targets: dict[RecordingTarget, DmaRegistration | None] = {}
        self.names = 0

    def teardown(self) -> None:
        self.heal()
        for registration in self.targets.values():
            if registration:
                registration.release()
        for model in list(self.models):
            self.manager.remove_region(model.region)
        self.manager._check()
        assert self.manager.snapshot()["targets"] == []
        assert self.manager.snapshot()["addresses"] is None
        assert not any(target.entries for target in self.targets)
        assert (self.file.uses, self.private.uses) == (1, 1)
        self.file.close()
        self.private.close()

    # What owners of regions do

    @initialize(need=needs, kind=kinds, count=st.integers(1, PAGES))
    def begin(self, need: DmaNeeds, kind: MemoryKind, count: int) -> None:
        """Begin with two targets and memory, so that most runs get to what can fail."""
        self.register(DmaNeeds.HOST_VA, set())
        self.register(need, set())
        self.add_region(0, PAGES, 1, kind, filled=count)

    @precondition(lambda self: len(self.models) < MAX_REGIONS)
    @rule(
        first=first_pages, count=sizes, priority=st.integers(0, 2), kind=kinds, filled=sizes,
    )  # fmt: skip
    def add_region(
        self, first: int, count: int, priority: int, kind: MemoryKind, *, filled: int
    ) -> None:
        """Add a region with one sub-mapping and enable it."""
        where = range(first, min(first + count, PAGES))
        self.names += 1
        try:
            region = self.manager.add_region(
                f"region {self.names}", pages(where.start, len(where)), kind, priority=priority
            )
        except RegionOverlapError:
            assert not all(model.may_overlap(where, priority) for model in self.models)
            return
        assert all(model.may_overlap(where, priority) for model in self.models)
        self.models.append(Model(region, where))
        self.add_mapping(-1, 0, min(filled, len(where)), where.start, writable=True, private=False)
        self.enable(-1, writable=True)

    @precondition(lambda self: self.models)
    @rule(index=indices)
    def remove_region(self, index: int) -> None:
        model = self.pick(index)
        self.models.remove(model)
        self.take_away(lambda: self.manager.remove_region(model.region))

    @precondition(lambda self: self.models)
    @rule(index=indices, writable=st.booleans())
    def enable(self, index: int, *, writable: bool) -> None:
        model = self.pick(index)
        trouble = self.trouble()
        before = model.region.parameters
        try:
            self.manager.enable(model.region, writable=writable)
        except ViommuError:
            assert trouble
            assert model.region.parameters == before
            return
        model.writable = writable
        assert model.region.parameters == MapParameters(writable)

    @precondition(lambda self: self.models)
    @rule(index=indices)
    def disable(self, index: int) -> None:
        model = self.pick(index)
        model.writable = None
        self.take_away(lambda: self.manager.disable(model.region))

    @precondition(lambda self: self.models)
    @rule(
        index=indices, start=first_pages, count=sizes, offset=st.integers(0, PAGES),
        writable=st.booleans(), private=st.sampled_from([False, False, False, True]),
    )  # fmt: skip
    def add_mapping(
        self, index: int, start: int, count: int, offset: int, *, writable: bool, private: bool
    ) -> None:
        model = self.pick(index)
        wanted = Piece(start, count, offset + (PRIVATE if private else 1), writable)
        fits = start + count <= len(model.pages) and not any(
            piece.start < start + count and start < piece.start + piece.count
            for piece in model.pieces
        )
        backing = self.private if private else self.file
        trouble = self.trouble()
        try:
            self.manager.add_mapping(
                model.region, pages(start, count), backing.retain(), offset * PAGE,
                writable=writable,
            )  # fmt: skip
        except ViommuError as error:
            backing.close()
            if isinstance(error, RegionError):
                assert not fits
            elif isinstance(error, FileMissingError):
                assert private
                assert any(DmaNeeds.FILE in target.needs for target in self.registered())
            else:
                assert trouble
            return
        assert fits
        model.pieces.append(wanted)

    @precondition(lambda self: any(model.pieces for model in self.models))
    @rule(index=indices, start=first_pages, count=st.integers(1, PAGES))
    def remove_mappings(self, index: int, start: int, count: int) -> None:
        filled = [model for model in self.models if model.pieces]
        model = filled[index % len(filled)]
        meeting = [p for p in model.pieces if p.start < start + count and start < p.start + p.count]
        splits = any(p.start < start or p.start + p.count > start + count for p in meeting)
        try:
            self.take_away(lambda: self.manager.remove_mappings(model.region, pages(start, count)))
        except RegionError:
            assert splits
            return
        assert not splits
        model.pieces = [piece for piece in model.pieces if piece not in meeting]

    # What targets do

    @precondition(lambda self: len(self.targets) < MAX_TARGETS)
    @rule(need=needs, rejects=st.one_of(st.just(set[int]()), faults))
    def register(self, need: DmaNeeds, rejects: set[int]) -> None:
        target = RecordingTarget(f"target {len(self.targets)}", need)
        target.reject = set(rejects)
        self.targets[target] = None
        trouble = self.trouble()
        try:
            self.targets[target] = self.manager.register(target, target.name, need)
        except FileMissingError:
            assert any(p.number >= PRIVATE for model in self.models for p in model.pieces)
        except ViommuError:
            assert trouble

    @precondition(lambda self: self.registered())
    @rule(index=indices)
    def release(self, index: int) -> None:
        target = self.registered()[index % len(self.registered())]
        registration = self.targets[target]
        assert registration is not None
        self.targets[target] = None
        self.take_away(registration.release)

    @precondition(lambda self: self.registered())
    @rule(index=indices, where=faults)
    def reject(self, index: int, where: set[int]) -> None:
        self.registered()[index % len(self.registered())].reject = set(where)

    @precondition(lambda self: self.registered())
    @rule(index=indices, where=faults)
    def refuse(self, index: int, where: set[int]) -> None:
        self.registered()[index % len(self.registered())].refuse = set(where)

    @precondition(lambda self: self.trouble())
    @rule()
    def retry(self) -> None:
        self.take_away(self.manager.retry)

    @precondition(lambda self: self.trouble())
    @rule()
    def heal(self) -> None:
        """Without faults, one retry puts all in order."""
        for target in self.targets:
            target.reject.clear()
            target.refuse.clear()
        self.manager.retry()
        assert not self.trouble()
        assert not any(t.entries for t, registration in self.targets.items() if not registration)
        self.targets = {t: r for t, r in self.targets.items() if r is not None}

    # What must hold at any time

    @invariant()
    def the_manager_finds_no_fault_with_itself(self) -> None:
        self.manager._check()

    @invariant()
    def targets_hold_what_is_seen(self) -> None:
        for target in self.targets:
            stuck = self.stuck(target)
            for page in range(PAGES):
                wanted = self.seen(page) if target in self.registered() else None
                entry = next((e for e in target.entries.values() if holds(e, page)), None)
                found = entry and page_of(entry, page)
                if found == wanted or (entry and entry.where.start in stuck):
                    continue
                # Only device memory may be missing.
                assert found is None, (target.name, page, found, wanted)
                assert wanted is not None
                assert wanted.kind is MemoryKind.DEVICE, (target.name, page, wanted)

    @invariant()
    def addresses_stay_while_they_are_used(self) -> None:
        for target in self.targets:
            assert target.violations == []
            for entry in target.entries.values():
                for index, expected in enumerate(entry.first):
                    assert entry.host_va is not None
                    assert expected is not None
                    assert peek(entry.host_va + index * PAGE) == expected

    @invariant()
    def books_say_what_targets_hold(self) -> None:
        books = {ledger.target: ledger for ledger in self.manager._placements.targets()}
        for target in self.targets:
            held = [placement.where for placement in books.get(target, ())]
            assert held == [entry.where for _, entry in sorted(target.entries.items())]

    # The model

    def pick(self, index: int) -> Model:
        return self.models[index % len(self.models)]

    def registered(self) -> list[RecordingTarget]:
        return [target for target, registration in self.targets.items() if registration]

    def trouble(self) -> bool:
        """Return whether there is any reason for something to fail."""
        return (
            any(target.reject or target.refuse for target in self.targets)
            or bool(self.manager._placements.lingering)
            or any(model.region.failure for model in self.models)
        )

    def take_away(self, operation: object) -> None:
        """Do what is always carried out; it may complain only with a reason."""
        trouble = self.trouble()
        assert callable(operation)
        try:
            operation()
        except IncompleteError:
            assert trouble

    def seen(self, page: int) -> Page | None:
        """Return what should be mapped at a page."""
        there = [m for m in self.models if m.writable is not None and page in m.pages]
        best = max(there, key=lambda m: m.region.priority, default=None)
        for model in there:
            assert model.region.active is (model is best and model.region.failure is None)
        return None if best is None or not best.region.active else best.at(page)

    def stuck(self, target: RecordingTarget) -> set[int]:
        """Return where entries of a target start that it would not remove."""
        for ledger in self.manager._placements.targets():
            if ledger.target is target:
                return {entry.placement.where.start for entry in ledger.stuck()}
        return set()


def holds(entry: Entry, page: int) -> bool:
    return entry.where.holds(pages(page))


def page_of(entry: Entry, page: int) -> Page:
    """Say what a target has at a page: where it has an address, by what is really there."""
    index = page - entry.where.start // PAGE
    if entry.first:
        first = entry.first[index]
        assert first is not None
        number = first[0]
    else:
        number = entry.file_offset // PAGE + index + (PRIVATE if entry.file is None else 1)
    return Page(number, entry.writable, entry.kind)


TestRegionMachine = RegionMachine.TestCase
TestRegionMachine.settings = settings(max_examples=60, stateful_step_count=40)
