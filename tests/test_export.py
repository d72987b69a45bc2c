"""Export sessions: the ledger's states, and regions that release what they hold."""

import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.basic import BasicMemoryMapper
from viommu.errors import (
    Access,
    ExportError,
    GuestMemoryError,
    InternalError,
    NotMappable,
    SessionFaulted,
    TranslationFault,
    UsageError,
)
from viommu.export import (
    TRANSITIONS,
    ExportedRegion,
    ExportLedger,
    Held,
    SessionEvent,
    SessionState,
)
from viommu.mapper import MappingInfo
from viommu.memory.by_message import MessageMemory
from viommu.memory.files import MappedFiles
from viommu.memory.guest import GuestMemory

RW = Access.READ | Access.WRITE
PAGE = mmap.PAGESIZE


def test_the_table_names_every_state_and_only_known_targets() -> None:
    assert set(TRANSITIONS) == set(SessionState)
    assert {t for row in TRANSITIONS.values() for t in row.values()} == set(SessionState) - {
        SessionState.NONE
    }


@pytest.mark.parametrize("state", SessionState)
@pytest.mark.parametrize("event", SessionEvent)
def test_a_transition_that_is_not_in_the_table_is_our_own_bug(
    state: SessionState, event: SessionEvent
) -> None:
    ledger = ExportLedger()
    ledger.state = state
    if event in TRANSITIONS[state]:
        ledger._step(event)
        assert ledger.state is TRANSITIONS[state][event]
    else:
        with pytest.raises(InternalError, match=f"{event.value} while {state.value}"):
            ledger._step(event)
        assert ledger.state is state


def test_what_is_held_can_be_told() -> None:
    ledger = ExportLedger()
    ledger.start()
    for iova, size in ((0x2000, 8), (0x1000, 4), (0x2000, 8)):
        ledger.check_export()
        ledger.add(iova, size)

    assert ledger.held() == [Held(0x1000, 4, 1), Held(0x2000, 8, 2)]
    assert ledger.total == 3


@pytest.mark.parametrize(("iova", "size"), [(0, 4), (0x1000, 8), (0x1004, 4)])
def test_a_release_must_match_an_export_exactly(iova: int, size: int) -> None:
    ledger = ExportLedger()
    ledger.start()
    ledger.add(0x1000, 4)

    with pytest.raises(ExportError, match="is not exported"):
        ledger.release(iova, size)
    assert ledger.total == 1


def test_a_session_that_holds_nothing_can_be_replaced() -> None:
    ledger = ExportLedger()
    first = ledger.start()
    second = ledger.start()

    assert first is not second


@contextmanager
def no_more_fds() -> Iterator[None]:
    """Every number below the limit is taken, by us or by a file that stays as it is."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_file_descriptors_no_session_starts() -> None:
    ledger = ExportLedger()
    with no_more_fds(), pytest.raises(ExportError, match="no event for an export session"):
        ledger.start()

    assert ledger.state is SessionState.NONE
    assert ledger.start().fileno() >= 0


def test_without_file_descriptors_nothing_is_exported() -> None:
    ledger = ExportLedger()
    ledger.start()
    with no_more_fds(), pytest.raises(ExportError, match="no event for an export session"):
        ledger.add(0, 1)

    assert ledger.total == 0
    ledger._check()


def test_revoking_needs_no_file_descriptor() -> None:
    ledger = ExportLedger()
    fault = ledger.start()
    ledger.add(0, 1)
    with no_more_fds():
        resolution = ledger.revoke(0, 1)

    assert fault.is_set()
    assert resolution is not None
    ledger.release(0, 1)
    assert resolution.is_set()


def test_a_session_that_holds_something_can_not() -> None:
    ledger = ExportLedger()
    ledger.start()
    ledger.add(0, 1)

    with pytest.raises(ExportError, match="still holds 1 exports"):
        ledger.start()


def test_exports_are_limited() -> None:
    ledger = ExportLedger(max_exports=1)
    ledger.start()
    ledger.check_export()
    ledger.add(0, 1)

    with pytest.raises(ExportError, match="limit of 1"):
        ledger.check_export()
    ledger.release(0, 1)
    ledger.check_export()


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="0"):
        ExportLedger(max_exports=0)


ranges = st.tuples(st.integers(0, 20), st.integers(1, 20))


@given(st.lists(ranges, max_size=8), ranges)
def test_revoking_faults_exactly_when_something_held_is_touched(
    held: list[tuple[int, int]], revoked: tuple[int, int]
) -> None:
    ledger = ExportLedger()
    fault = ledger.start()
    for iova, size in held:
        ledger.add(iova, size)
    start, end = revoked[0], revoked[0] + revoked[1]
    touched = any(iova < end and start < iova + size for iova, size in held)

    resolution = ledger.revoke(start, end)

    ledger._check()
    assert (resolution is not None) is touched
    assert fault.is_set() is touched
    for iova, size in held:
        ledger.release(iova, size)
        ledger._check()
    assert resolution is None or resolution.is_set()


@pytest.mark.parametrize("damage", ["total", "longest", "resolved", "idle"])
def test_check_finds_damage(damage: str) -> None:
    ledger = ExportLedger()
    ledger.start()
    ledger.add(0, 4)
    match damage:
        case "total":
            ledger._total = 2
        case "longest":
            ledger._longest = 1
        case "resolved":
            ledger._held.clear()
            ledger._total = 0
            ledger.state = SessionState.FAULTED
        case _:
            ledger.state = SessionState.DRAINED

    with pytest.raises(InternalError):
        ledger._check()


class World:
    """Four pages of guest memory at 0x10000; IOVA 0 and 1 map pages 2 and 0, IOVA 2 no memory."""

    def __init__(self) -> None:
        self.files = MappedFiles()
        fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4 * PAGE)
        self.memory = GuestMemory()
        self.memory.map(
            0x10000,
            4 * PAGE,
            readable=True,
            writable=True,
            file=self.files.get(fd, 0, 4 * PAGE, writable=True),
            offset=0,
        )
        os.close(fd)
        self.mapper = BasicMemoryMapper()
        self.mapper.add_map(MappingInfo(0, 0x10000 + 2 * PAGE, PAGE, RW))
        self.mapper.add_map(MappingInfo(PAGE, 0x10000, PAGE, Access.READ))
        self.mapper.add_map(MappingInfo(2 * PAGE, 0x900000, PAGE, RW))
        self.fault = self.mapper.start_export_session()

    def region(self, iova: int, size: int, access: Access) -> ExportedRegion:
        return ExportedRegion(self.mapper, self.memory, iova, size, access)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.memory.close()
    world.fault.close()


def test_data_written_through_a_region_lands_where_it_is_mapped(world: World) -> None:
    with world.region(8, 16, Access.WRITE) as region:
        region.write(b"sixteen bytes...")
        region.write(b"S", offset=0)

    assert world.memory.read(0x10000 + 2 * PAGE + 8, 16) == b"Sixteen bytes..."
    assert world.mapper.exports.total == 0


def test_a_region_may_span_mappings(world: World) -> None:
    world.memory.write(0x10000 + 3 * PAGE - 2, b"ab")
    world.memory.write(0x10000, b"cd")

    with world.region(PAGE - 2, 4, Access.READ) as region:
        assert region.read() == b"abcd"
        assert region.read(1, 2) == b"bc"
        assert [bytes(v) for v in region.views()] == [b"ab", b"cd"]
        assert region.views(2, 0) == []


def test_missing_protection_faults_at_the_first_such_byte_and_leaks_nothing(world: World) -> None:
    with pytest.raises(TranslationFault) as caught:
        world.region(PAGE - 4, 8, RW)

    assert caught.value.iova == PAGE
    assert caught.value.access is RW
    assert world.mapper.exports.total == 0


def test_a_hole_faults_with_the_access_that_was_tried(world: World) -> None:
    with pytest.raises(TranslationFault) as caught:
        world.region(3 * PAGE, 4, Access.WRITE)

    assert caught.value.access is Access.WRITE


def test_missing_protection_before_a_hole_faults_first(world: World) -> None:
    world.mapper.remove_map(2 * PAGE, PAGE)

    with pytest.raises(TranslationFault) as caught:
        world.region(PAGE, 2 * PAGE, Access.WRITE)
    assert caught.value.iova == PAGE

    with pytest.raises(TranslationFault) as caught:
        world.region(PAGE, 2 * PAGE, Access.READ)
    assert caught.value.iova == 2 * PAGE
    assert world.mapper.exports.total == 0


def test_mapped_but_no_memory_is_told_apart_from_a_fault(world: World) -> None:
    with world.region(2 * PAGE, 4, Access.READ) as region, pytest.raises(GuestMemoryError):
        region.read()
    assert world.mapper.exports.total == 0


def test_a_write_that_meets_no_memory_writes_nothing(world: World) -> None:
    world.mapper.add_map(MappingInfo(0x10000, 0x10000, PAGE, RW))
    world.mapper.add_map(MappingInfo(0x10000 + PAGE, 0x900000, PAGE, RW))

    with (
        world.region(0x10000 + PAGE - 2, 4, Access.WRITE) as region,
        pytest.raises(GuestMemoryError),
    ):
        region.write(b"abcd")
    assert world.memory.read(0x10000 + PAGE - 2, 2) == b"\0\0"


def test_a_region_does_only_what_it_was_exported_for(world: World) -> None:
    with world.region(0, 4, Access.READ) as region, pytest.raises(UsageError):
        region.write(b"x")
    with world.region(0, 4, Access.WRITE) as region, pytest.raises(UsageError):
        region.read()


@pytest.mark.parametrize(("offset", "size"), [(0, 5), (4, 1), (-1, 1), (5, 0), (3, -1)])
def test_nothing_outside_the_region_is_reached(world: World, offset: int, size: int) -> None:
    with world.region(0, 4, Access.READ) as region, pytest.raises(UsageError):
        region.read(offset, size)


def test_a_released_region_is_closed_once_and_for_all(world: World) -> None:
    region = world.region(0, 4, Access.READ)
    region.release()
    region.release()

    assert region.released
    with pytest.raises(UsageError, match="released"):
        region.read()


def test_a_faulted_region_stays_readable_until_it_is_released(world: World) -> None:
    world.memory.write(0x10000 + 2 * PAGE, b"data")
    region = world.region(0, 4, Access.READ)

    resolution = world.mapper.remove_map(0, PAGE).resolution

    assert world.fault.is_set()
    assert region.read() == b"data"
    with pytest.raises(SessionFaulted):
        world.region(PAGE, 4, Access.READ)
    region.release()
    assert resolution is not None
    assert resolution.is_set()


class Copied:
    """Two mapped pages, of which the second leads to memory that is reached by messages."""

    def __init__(self) -> None:
        self.behind = bytearray(os.urandom(PAGE))  # at GPA 0x10000
        self.refuses = False
        self.memory = MessageMemory()
        self.memory.port = self
        fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE)
        file = MappedFiles().get(fd, 0, PAGE, writable=True)
        os.close(fd)
        self.memory.map(0, PAGE, readable=True, writable=True, file=file)
        self.memory.map(0x10000, PAGE, readable=True, writable=True, file=None)
        self.mapper = BasicMemoryMapper()
        self.mapper.add_map(MappingInfo(0, 0, PAGE, RW))
        self.mapper.add_map(MappingInfo(PAGE, 0x10000, PAGE, RW))
        self.fault = self.mapper.start_export_session()

    def read(self, gpa: int, size: int) -> bytes:
        self._check(gpa, size)
        return bytes(self.behind[gpa - 0x10000 :][:size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self._check(gpa, len(data))
        self.behind[gpa - 0x10000 : gpa - 0x10000 + len(data)] = data

    def _check(self, gpa: int, size: int) -> None:
        if self.refuses:
            raise GuestMemoryError(gpa, size, "refused")

    def region(self, iova: int, size: int, access: Access) -> ExportedRegion:
        return ExportedRegion(self.mapper, self.memory, iova, size, access)


@pytest.fixture
def copied() -> Iterator[Copied]:
    copied = Copied()
    yield copied
    assert copied.mapper.exports.total == 0
    copied.memory.close()
    copied.fault.close()


def test_views_of_what_has_none_are_copies_that_the_release_writes_back(copied: Copied) -> None:
    behind = bytes(copied.behind)
    region = copied.region(PAGE - 4, 16, Access.WRITE)
    shared, copy = region.views()
    shared[:], copy[:] = b"near", b"far away ..."
    assert copied.memory.read(PAGE - 4, 4) == b"near"
    assert copied.behind == behind
    region.release()
    assert copied.behind == b"far away ..." + behind[12:]
    region.release()


def test_only_what_was_looked_at_is_written_back(copied: Copied) -> None:
    behind = bytes(copied.behind)
    with copied.region(PAGE, PAGE, Access.WRITE) as region:
        region.views(0, 8)[0][:4] = b"data"
        region.views(4, 8)[0][:4] = b"more"
        assert bytes(region.views(0, 12)[0]) == b"datamore" + bytes(4)
    assert copied.behind == b"datamore" + bytes(4) + behind[12:]


def test_copies_for_reading_too_begin_as_the_memory(copied: Copied) -> None:
    behind = bytes(copied.behind)
    with copied.region(PAGE, 64, RW) as region:
        (view,) = region.views(8, 8)
        assert view == behind[8:16]
        view[:2] = b"me"
    assert copied.behind == behind[:8] + b"me" + behind[10:]


def test_copies_for_reading_are_not_written_back(copied: Copied) -> None:
    with copied.region(PAGE, 16, Access.READ) as region:
        (view,) = region.views()
        assert view == copied.behind[:16]
        assert view.readonly
        copied.refuses = True


def test_a_copy_that_can_not_be_written_back_is_an_error_and_released(copied: Copied) -> None:
    region = copied.region(PAGE, 16, Access.WRITE)
    region.views()
    copied.refuses = True
    with pytest.raises(GuestMemoryError, match="refused"):
        region.release()
    assert region.released


def test_copies_can_be_declined(copied: Copied) -> None:
    with copied.region(PAGE - 4, 16, RW) as region:
        with pytest.raises(NotMappable):
            region.views(copies=False)
        assert [bytes(view) for view in region.views(0, 4, copies=False)] == [
            copied.memory.read(PAGE - 4, 4)
        ]


def test_data_is_written_through_wherever_it_goes(copied: Copied) -> None:
    behind = bytes(copied.behind)
    with copied.region(PAGE - 4, 16, Access.WRITE) as region:
        region.write(b"straight", offset=2)
        assert copied.memory.read(PAGE - 2, 2) == b"st"
        assert copied.behind == b"raight" + behind[6:]
