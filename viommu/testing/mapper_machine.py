"""A hypothesis rule machine that every memory mapper must satisfy.

Derive from :class:`MapperMachine`, give :meth:`MapperMachine.make_mapper` and
run ``TestMine = MyMachine.TestCase``. Needs the extra ``viommu[testing]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from viommu.errors import Access, ExportError, SessionFaulted, TranslationFault
from viommu.mapper import AddMapResult, DeferredMapper, MappingInfo, MemRegion
from viommu.testing.model import ModelMapper

if TYPE_CHECKING:
    from viommu.errors import BackendError
    from viommu.events import Event
    from viommu.mapper import MemoryMapper

__all__ = ["MapperMachine"]

# Few pages, so that random rules meet each other.
PAGES = 8
pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, 3)
protections = st.sampled_from([Access.READ, Access.READ | Access.WRITE, Access.WRITE])


class MapperMachine(RuleBasedStateMachine):
    """Drives a mapper and :class:`~viommu.testing.model.ModelMapper` and compares.

    ``page`` is the granule in bytes, ``base`` and ``gpa`` are where the IOVAs
    and the guest memory used begin; ``exports`` turns the export rules on.

    A :class:`~viommu.mapper.DeferredMapper` is waited for after each call, with
    :meth:`wait_for`, and what it refuses then is removed.
    """

    page: ClassVar[int] = 0x1000
    base: ClassVar[int] = 0
    gpa: ClassVar[int] = 0x100000
    exports: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.mapper = self.make_mapper()
        self.model = ModelMapper(self.page)
        self.fault: Event | None = None
        self.resolution: Event | None = None

    def make_mapper(self) -> MemoryMapper:
        """Return an empty mapper."""
        raise NotImplementedError

    def wait_for(self, event: Event) -> None:
        """Have the host answer until ``event`` is readable: needed for a DeferredMapper."""
        raise NotImplementedError

    def settle(self) -> BackendError | None:
        """Wait until the mapper has settled; return what it refused."""
        if not isinstance(self.mapper, DeferredMapper):
            return None
        event = self.mapper.unsettled()
        if event is not None:
            with event:
                self.wait_for(event)
                assert event.is_set()
            assert self.mapper.unsettled() is None
        return self.mapper.take_refusal()

    def teardown(self) -> None:
        """Let go of everything held, then of the mappings and the session's event."""
        for iova, size in list(self.model.held.elements()):
            self.mapper.release(iova, size)
        self.mapper.reset_domain()
        self.settle()
        if self.fault:
            self.fault.close()

    @initialize(map_first=st.booleans())
    def begin(self, *, map_first: bool) -> None:
        """Begin with a session, so that most runs get to its faults, and often with memory."""
        if self.exports:
            self.start_export_session()
        if map_first:
            for page, prot in ((0, Access.READ | Access.WRITE), (1, Access.READ)):
                self.add_map(page, 1, page, prot)

    @rule(page=pages, length=lengths, frame=st.integers(0, PAGES), prot=protections)
    def add_map(self, page: int, length: int, frame: int, prot: Access) -> None:
        """Map; both agree whether it overlaps."""
        mapping = MappingInfo(
            self.base + page * self.page,
            self.gpa + frame * self.page,
            length * self.page,
            prot,
        )
        added = self.mapper.add_map(mapping) is AddMapResult.OK
        assert added is self.model.add_map(mapping), mapping
        if self.settle() is not None:
            assert added, f"{mapping} overlaps, and was refused as well"
            self._remove(mapping.iova, mapping.size)

    @rule(page=pages, length=st.integers(1, PAGES))
    def remove_map(self, page: int, length: int) -> None:
        """Unmap; both agree whether it splits, and whether a client must let go first."""
        self._remove(self.base + page * self.page, length * self.page)

    def _remove(self, start: int, size: int) -> None:
        held = [
            (iova, count)
            for iova, count in self.model.held.elements()
            if iova < start + size and start < iova + count
        ]
        ok, resolution = self.mapper.remove_map(start, size)
        assert ok is self.model.remove_map(start, size), (start, size)
        assert (resolution is not None) is (ok and bool(held)), (resolution, held)
        self.resolution = resolution or self.resolution
        assert self.settle() is None, f"[{start:#x}, {start + size:#x}) was not removed"

    @rule()
    def reset_domain(self) -> None:
        """Unmap everything."""
        held = bool(self.model.held)
        resolution = self.mapper.reset_domain()
        self.model.reset_domain()
        assert (resolution is not None) is held
        self.resolution = resolution or self.resolution
        assert self.settle() is None, "not everything was removed"

    @precondition(lambda self: self.exports)
    @rule()
    def start_export_session(self) -> None:
        """Start a session, refused exactly while something is held."""
        try:
            self.model.start_export_session()
        except ExportError:
            try:
                self.mapper.start_export_session()
            except ExportError:
                return
            raise AssertionError("a session started while exports are held") from None
        if self.fault:
            self.fault.close()
        self.fault = self.mapper.start_export_session()
        self.resolution = None

    @precondition(lambda self: self.exports)
    @rule(page=pages, skip=st.integers(0, 3), size=st.integers(1, 9), cross=st.booleans())
    def export(self, page: int, skip: int, size: int, *, cross: bool) -> None:
        """Export a few bytes, some of them across a page's end."""
        iova = self.base + page * self.page + (self.page - 4 if cross else 0) + skip
        assert _outcome(self.mapper, iova, size) == _outcome(self.model, iova, size)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Release something that is held."""
        iova, size = data.draw(st.sampled_from(sorted(self.model.held)))
        self.mapper.release(iova, size)
        self.model.release(iova, size)

    @precondition(lambda self: self.exports)
    @rule(page=pages)
    def release_what_is_not_held(self, page: int) -> None:
        """A release that matches no export is refused."""
        iova = self.base + page * self.page
        try:
            self.mapper.release(iova, 10)  # no export above is this long
        except ExportError:
            return
        raise AssertionError(f"released {iova:#x}, which is not held")

    @invariant()
    def events_tell_the_truth(self) -> None:
        """The fault event fired iff the session faulted, resolution iff nothing is held."""
        if self.fault:
            assert self.fault.is_set() is self.model.faulted
        if self.resolution:
            assert self.resolution.is_set() is not bool(self.model.held)

    @invariant()
    def invariants_hold(self) -> None:
        """The mapper's own check passes, where it has one."""
        check = getattr(self.mapper, "_check", None)
        if check:
            check()


def _outcome(
    mapper: MemoryMapper | ModelMapper, iova: int, size: int
) -> list[MemRegion] | tuple[str, int]:
    try:
        return mapper.export(iova, size)
    except TranslationFault as fault:
        return "fault", fault.iova
    except SessionFaulted:
        return "session faulted", 0
    except ExportError:
        return "refused", 0
