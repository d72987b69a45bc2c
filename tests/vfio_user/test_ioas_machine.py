"""Any sequence of iommufd commands, against a model that is lists and sets of pages.

The model says which errno a command must get, and what the device must see.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from viommu.errors import PeerError
from viommu.memory import GuestMemory, MappedFiles
from viommu.vfio_user.ioas_table import IoasLimits, IoasTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.memory import MemoryRegion

PAGE = 4096
FILE_SIZE = 8 * PAGE
# Two apertures of four and two pages, so that space runs out and has holes.
APERTURES = ((0x10 * PAGE, 0x14 * PAGE), (0x18 * PAGE, 0x1A * PAGE))
APERTURE_PAGES = frozenset(range(0x10, 0x14)) | frozenset(range(0x18, 0x1A))
LIMITS = IoasLimits(max_ioas=3, max_mappings=9, apertures=APERTURES)

# Which of the spaces that there are, counted round; sometimes one that there isn't.
ids = st.integers(0, 11)
offsets = st.integers(0, 7).map(lambda n: n * 0x800)
sizes = st.sampled_from([1, 0x800, 0x801, PAGE, 2 * PAGE, 3 * PAGE])
accesses = st.sampled_from([(True, True), (True, False), (False, True)])
addresses = st.integers(0x1E, 0x38).map(lambda n: n * 0x800) | st.just((1 << 64) - PAGE)
nearly = st.sampled_from([0, 0, 0, 0, 1, -1])
wishes = st.none() | st.none() | addresses


class Mapped(NamedTuple):
    """What is mapped: [iova, iova + size) is the file from ``offset`` on."""

    iova: int
    size: int
    readable: bool
    writable: bool
    offset: int

    def meets(self, iova: int, size: int) -> bool:
        return iova < self.iova + self.size and self.iova < iova + size

    def pages(self) -> set[int]:
        return set(range(self.iova // PAGE, (self.iova + self.size - 1) // PAGE + 1))


def mapped_in(regions: list[MemoryRegion]) -> list[Mapped]:
    """Return what is mapped, in the order of addresses."""
    return [
        Mapped(region.gpa, region.size, region.readable, region.writable, region.offset)
        for region in regions
    ]


class IoasMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.files = MappedFiles()
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, FILE_SIZE)
        self.file = self.files.get(fd, 0, FILE_SIZE, writable=True)
        os.close(fd)
        self.memory = GuestMemory()
        self.table = IoasTable(self.memory, LIMITS)
        # The model.
        self.spaces: dict[int, list[Mapped]] = {}
        self.used_ids: set[int] = {0}
        self.legacy: list[Mapped] = []
        self.bound = False
        self.attached: int | None = None

    def teardown(self) -> None:
        self.table.close()
        self.memory.unmap_all()
        assert self.file.uses == 1
        self.file.close()

    def outcome(self, act: Callable[[], int | None], refusals: set[int]) -> int | None:
        """Do it: a refusal must be one of ``refusals``, of which there must be none else."""
        result, number = None, 0
        try:
            result = act()
        except PeerError as error:
            number = error.errno
        assert number in (refusals or {0})
        return result

    def named(self, which: int) -> int:
        known = sorted(self.spaces)
        return known[which % len(known)] if known and which < 11 else max(self.used_ids) + 7

    def unknown(self, ioas: int) -> set[int]:
        return set() if ioas in self.spaces else {errno.ENOENT}

    def full(self) -> set[int]:
        count = sum(len(space) for space in self.spaces.values())
        return {errno.ENOSPC} if count >= LIMITS.max_mappings else set()

    def placed(self, ioas: int, mapped: Mapped, wanted: int | None) -> None:
        """Compare where something was mapped with where it may be, and note it."""
        others = self.spaces[ioas]
        if wanted is not None:
            assert mapped.iova == wanted
        else:
            assert mapped.iova % PAGE == mapped.offset % PAGE
            assert mapped.pages() <= APERTURE_PAGES
            assert not any(mapped.pages() & other.pages() for other in others)
        others.append(mapped)

    def no_room(self, ioas: int, size: int, offset: int, wanted: int | None) -> set[int]:
        others = self.spaces.get(ioas, [])
        if wanted is None:
            free = APERTURE_PAGES - {page for other in others for page in other.pages()}
            count = (offset % PAGE + size + PAGE - 1) // PAGE
            fits = any(set(range(at, at + count)) <= free for at in free)
            return set() if fits else {errno.ENOSPC}
        if wanted + size > 1 << 64:
            return {errno.EINVAL}
        return {errno.EEXIST} if any(other.meets(wanted, size) for other in others) else set()

    @initialize(bound=st.booleans())
    def begin(self, *, bound: bool) -> None:
        self.alloc()
        if bound:
            self.bind()

    @rule(command=st.sampled_from(["alloc", "destroy", "unmap_all", "bind"]), which=ids)
    def on_spaces(self, command: str, which: int) -> None:
        """One rule for all of these: mostly something is to be mapped."""
        match command:
            case "alloc":
                self.alloc()
            case "destroy":
                self.destroy(self.named(which))
            case "unmap_all":
                self.unmap_all(self.named(which))
            case _:
                self.bind()

    def alloc(self) -> None:
        full = {errno.ENOSPC} if len(self.spaces) >= LIMITS.max_ioas else set()
        ioas = self.outcome(self.table.alloc, full)
        if ioas is not None:
            assert ioas not in self.used_ids
            self.used_ids.add(ioas)
            self.spaces[ioas] = []

    def destroy(self, ioas: int) -> None:
        busy = {errno.EBUSY} if ioas == self.attached else set()
        refusals = self.unknown(ioas) | busy
        self.outcome(lambda: self.table.destroy(ioas), refusals)
        if not refusals:
            del self.spaces[ioas]

    @rule(which=ids, offset=offsets, size=sizes, access=accesses, wanted=wishes)
    def map(
        self, which: int, offset: int, size: int, access: tuple[bool, bool], wanted: int | None
    ) -> None:
        if offset + size <= FILE_SIZE:
            self.map_at(self.named(which), offset, size, access, wanted)

    @precondition(lambda self: any(self.spaces.values()))
    @rule(data=st.data(), below=st.booleans(), size=sizes)
    def map_beside(self, data: st.DataObject, *, below: bool, size: int) -> None:
        """Neighbours may have a page in common."""
        ioas = data.draw(st.sampled_from([i for i, space in self.spaces.items() if space]))
        mapped = data.draw(st.sampled_from(self.spaces[ioas]))
        wanted = mapped.iova - size if below else mapped.iova + mapped.size
        self.map_at(ioas, 0, size, (True, True), wanted)

    def map_at(
        self, ioas: int, offset: int, size: int, access: tuple[bool, bool], wanted: int | None
    ) -> None:
        refusals = self.unknown(ioas) | self.full() | self.no_room(ioas, size, offset, wanted)
        readable, writable = access
        file = self.file.retain()
        iova = self.outcome(
            lambda: self.table.map(
                ioas, size, file, offset, readable=readable, writable=writable, iova=wanted
            ),
            refusals,
        )
        if iova is None:
            file.close()
        else:
            self.placed(ioas, Mapped(iova, size, readable, writable, offset), wanted)

    def unmap(self, ioas: int, iova: int, size: int) -> None:
        exact = [m for m in self.spaces.get(ioas, []) if (m.iova, m.size) == (iova, size)]
        refusals = self.unknown(ioas) | (set() if exact else {errno.ENOENT})
        self.outcome(lambda: self.done(self.table.unmap(ioas, iova, size)), refusals)
        if exact:
            self.spaces[ioas].remove(exact[0])

    @precondition(lambda self: any(self.spaces.values()))
    @rule(data=st.data(), start=nearly, size=nearly)
    def unmap_something(self, data: st.DataObject, start: int, size: int) -> None:
        ioas = data.draw(st.sampled_from([i for i, space in self.spaces.items() if space]))
        mapped = data.draw(st.sampled_from(self.spaces[ioas]))
        self.unmap(ioas, mapped.iova + start, mapped.size + size)

    def unmap_all(self, ioas: int) -> None:
        self.outcome(lambda: self.done(self.table.unmap_all(ioas)), self.unknown(ioas))
        if ioas in self.spaces:
            self.spaces[ioas] = []

    @precondition(lambda self: any(self.spaces.values()))
    @rule(
        data=st.data(),
        where=st.tuples(ids, wishes),
        part=st.tuples(st.sampled_from([0, 1, 0x800]), sizes),
        access=st.none() | accesses,
    )
    def copy(
        self,
        data: st.DataObject,
        where: tuple[int, int | None],
        part: tuple[int, int],
        access: tuple[bool, bool] | None,
    ) -> None:
        source = data.draw(st.sampled_from([i for i, space in self.spaces.items() if space]))
        mapped = data.draw(st.sampled_from(self.spaces[source]))
        ioas, wanted = self.named(where[0]), where[1]
        skip, size = part
        start = mapped.iova + skip
        # Behind it another one may begin.
        mapped = next((m for m in self.spaces[source] if m.meets(start, 1)), mapped)
        readable, writable = access or (mapped.readable, mapped.writable)
        offset = mapped.offset + start - mapped.iova
        refusals = self.unknown(ioas) | self.full() | self.no_room(ioas, size, offset, wanted)
        if start + size > mapped.iova + mapped.size:
            refusals |= {errno.ENOENT}
        if readable > mapped.readable or writable > mapped.writable:
            refusals |= {errno.EPERM}
        iova = self.outcome(
            lambda: self.table.copy(
                source,
                start,
                size,
                ioas,
                readable=access and access[0],
                writable=access and access[1],
                iova=wanted,
            ),
            refusals,
        )
        if iova is not None:
            self.placed(ioas, Mapped(iova, size, readable, writable, offset), wanted)

    def bind(self) -> None:
        device = self.outcome(self.table.bind, {errno.EEXIST} if self.bound else set())
        if device is not None:
            assert device not in self.used_ids
            self.used_ids.add(device)
        self.bound = True

    @rule(which=ids, leave=st.booleans())
    def move(self, which: int, *, leave: bool) -> None:
        if leave:
            self.detach()
        else:
            self.attach(self.named(which))

    def attach(self, ioas: int) -> None:
        refusals = self.unknown(ioas) | (set() if self.bound else {errno.EINVAL})
        self.outcome(lambda: self.done(self.table.attach(ioas)), refusals)
        if not refusals:
            self.attached = ioas

    def detach(self) -> None:
        refusals = set() if self.attached else {errno.EINVAL}
        self.outcome(lambda: self.done(self.table.detach()), refusals)
        self.attached = None

    @rule(gpa=addresses, page=st.integers(0, 7))
    def map_legacy(self, gpa: int, page: int) -> None:
        mapped = Mapped(gpa, PAGE, True, True, page * PAGE)
        refusals: set[int] = set()
        if mapped not in self.legacy and any(other.meets(gpa, PAGE) for other in self.legacy):
            refusals = {errno.EINVAL}
        file = self.file.retain()
        self.outcome(
            lambda: self.table.legacy.map(
                gpa, PAGE, readable=True, writable=True, file=file, offset=page * PAGE
            ),
            refusals,
        )
        if refusals:
            file.close()
        elif mapped not in self.legacy:
            self.legacy.append(mapped)

    @precondition(lambda self: self.legacy)
    @rule(data=st.data())
    def unmap_legacy(self, data: st.DataObject) -> None:
        mapped = data.draw(st.sampled_from(self.legacy))
        self.table.legacy.unmap(mapped.iova, mapped.size)
        self.legacy.remove(mapped)

    @staticmethod
    def done(result: object) -> None:
        assert result is None, "nobody holds this memory"

    @invariant()
    def every_space_is_as_it_should_be(self) -> None:
        assert sorted(self.table._spaces) == sorted(self.spaces)
        for ioas, space in self.spaces.items():
            assert mapped_in(self.table._spaces[ioas].regions()) == sorted(space)
        assert mapped_in(self.table.legacy.regions()) == sorted(self.legacy)
        self.table._check()

    @invariant()
    def the_device_sees_the_space_that_it_is_in(self) -> None:
        space = self.legacy if self.attached is None else self.spaces[self.attached]
        assert mapped_in(self.memory.regions()) == sorted(space)
        assert self.table.attached == self.attached
        self.memory._check()

    @invariant()
    def every_use_of_the_file_is_known(self) -> None:
        mapped = sum(len(space) for space in self.spaces.values()) + len(self.legacy)
        # Where it is kept, and where the device sees it.
        seen = 0 if self.attached is None else len(self.spaces[self.attached])
        assert self.file.uses == 1 + mapped + seen


TestIoasMachine = IoasMachine.TestCase
TestIoasMachine.settings = settings(max_examples=80, stateful_step_count=50)
