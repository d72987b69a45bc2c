from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viommu.errors import GuestMemoryError, PeerError
from viommu.memory import GuestMemory, MappedFile, MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def file(files: MappedFiles, memfd: Callable[..., int]) -> Iterator[MappedFile]:
    held = files.get(memfd(), 0, 16 * PAGE, writable=True)
    yield held
    held.close()
    assert len(files) == 0, "a region kept its file"


@pytest.fixture
def memory(file: MappedFile) -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory._check()
    memory.close()


def add(
    memory: GuestMemory,
    gpa: int,
    size: int,
    file: MappedFile | None,
    offset: int = 0,
    *,
    readable: bool = True,
    writable: bool = True,
) -> None:
    """Map with a use of ``file`` of its own, as a server does."""
    if file is not None:
        file._uses += 1
    try:
        memory.map(gpa, size, readable=readable, writable=writable, file=file, offset=offset)
    except PeerError:
        if file is not None:
            file.close()
        raise


def test_the_region_at_an_address_is_found(memory: GuestMemory, file: MappedFile) -> None:
    assert memory.region_at(0) is None
    add(memory, PAGE, PAGE, file)
    memory.map(2 * PAGE, PAGE, readable=True, writable=False, file=None)
    assert memory.region_at(PAGE - 1) is None
    assert memory.region_at(PAGE) == memory.region_at(2 * PAGE - 1) == memory.regions()[0]
    assert memory.region_at(2 * PAGE) == memory.regions()[1]
    assert memory.region_at(3 * PAGE) is None


def test_read_and_write(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0x10000, 4 * PAGE, file, PAGE)
    memory.write(0x10004, b"hello")
    assert memory.read(0x10004, 5) == b"hello"
    assert file.view[PAGE + 4 : PAGE + 9].tobytes() == b"hello"
    assert memory.read(0x10000, 0) == b""
    assert memory.read(0x10000, 4 * PAGE)[4:9] == b"hello"


def test_a_read_is_a_copy(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file)
    data = memory.read(0, 4)
    memory.write(0, b"\xff" * 4)
    assert data == bytes(4)


@pytest.mark.parametrize("data", [b"abcd", bytearray(b"abcd"), memoryview(b"abcd").cast("I")])
def test_any_buffer_can_be_written(
    memory: GuestMemory, file: MappedFile, data: bytes | memoryview
) -> None:
    add(memory, 0, PAGE, file)
    for _ in range(2):  # found anew, then where the last one was
        memory.write(8, data)
        assert memory.read(8, 4) == b"abcd"
        memory.write(8, bytes(4))


def test_accesses_span_regions(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file, 8 * PAGE)
    add(memory, PAGE, PAGE, file, 2 * PAGE)
    add(memory, 2 * PAGE, PAGE, file, 5 * PAGE)
    data = bytes(range(256)) * 24
    memory.write(PAGE - 100, data[: PAGE + 200])
    assert memory.read(PAGE - 100, PAGE + 200) == data[: PAGE + 200]
    assert file.view[9 * PAGE - 100 : 9 * PAGE] == data[:100]
    assert file.view[5 * PAGE : 5 * PAGE + 100] == data[PAGE + 100 : PAGE + 200]
    assert [len(v) for v in memory.views(PAGE - 100, PAGE + 200, write=True)] == [100, PAGE, 100]


def test_regions_that_follow_one_another_in_the_file_are_one_view(
    memory: GuestMemory, file: MappedFile
) -> None:
    add(memory, 0, PAGE, file, 0)
    add(memory, PAGE, PAGE, file, PAGE)
    add(memory, 2 * PAGE, PAGE, file, 3 * PAGE)
    assert [len(v) for v in memory.views(0, 3 * PAGE, write=False)] == [2 * PAGE, PAGE]


def test_views_are_the_memory_itself(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, PAGE, PAGE, file)
    (view,) = memory.views(PAGE + 4, 8, write=True)
    assert view.format == "B"
    view.cast("H")[0] = 0x1234
    assert memory.read(PAGE + 4, 2) == b"\x34\x12"
    assert memory.views(PAGE, 0, write=True) == []


def test_views_for_reading_are_read_only(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file, 0)
    add(memory, PAGE, PAGE, file, 4 * PAGE)
    for view in [*memory.views(0, 4, write=False), *memory.views(0, 2 * PAGE, write=False)]:
        assert view.readonly


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0, 1),
        (PAGE - 1, 1),
        (PAGE - 1, 2),
        (3 * PAGE, 1),
        (3 * PAGE - 1, 2),
        (2 * PAGE, TOP),
        (TOP - 1, 1),
        (TOP - 1, 2),
        (TOP, 1),
        (-1, 1),
        (-1, PAGE + 2),
        (PAGE, -1),
    ],
)
def test_what_is_not_memory_is_refused(
    memory: GuestMemory, file: MappedFile, gpa: int, size: int
) -> None:
    add(memory, PAGE, 2 * PAGE, file)
    for _ in range(2):
        with pytest.raises(GuestMemoryError):
            memory.read(gpa, size)
        with pytest.raises(GuestMemoryError):
            memory.views(gpa, size, write=True)
        if 0 < size < TOP:
            with pytest.raises(GuestMemoryError):
                memory.write(gpa, bytes(size))
        memory.read(PAGE, 1)  # from now on the region is found at once


def test_the_last_byte_of_the_address_space_is_memory(
    memory: GuestMemory, file: MappedFile
) -> None:
    add(memory, TOP - PAGE, PAGE, file)
    memory.write(TOP - 1, b"!")
    assert memory.read(TOP - 1, 1) == b"!"
    with pytest.raises(GuestMemoryError):
        memory.read(TOP - 1, 2)


def test_a_write_is_all_or_nothing(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file)
    add(memory, PAGE, PAGE, file, PAGE, writable=False)
    with pytest.raises(GuestMemoryError, match="not writable"):
        memory.write(PAGE - 4, b"12345678")
    with pytest.raises(GuestMemoryError, match="no memory at 0x2000"):
        memory.read(PAGE, PAGE + 1)
    assert memory.read(PAGE - 4, 8) == bytes(8)


def test_permissions_are_enforced(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file, writable=False)
    add(memory, PAGE, PAGE, file, readable=False)
    assert memory.read(0, 4) == bytes(4)
    memory.write(PAGE, b"1234")
    for _ in range(2):
        with pytest.raises(GuestMemoryError, match="not writable"):
            memory.write(0, b"1")
        with pytest.raises(GuestMemoryError, match="not readable"):
            memory.read(PAGE, 1)
        with pytest.raises(GuestMemoryError, match="not writable"):
            memory.views(0, 1, write=True)


def test_memory_without_a_file_says_so(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, None)
    add(memory, PAGE, PAGE, file)
    assert [region.shared for region in memory.regions()] == [False, True]
    with pytest.raises(GuestMemoryError, match="without a file descriptor"):
        memory.read(8, 8)
    with pytest.raises(GuestMemoryError, match="without a file descriptor"):
        memory.write(PAGE - 1, b"ab")


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (PAGE, 4 * PAGE),
        (0, 2 * PAGE),
        (2 * PAGE, PAGE),
        (PAGE, PAGE),
        (4 * PAGE, 8 * PAGE),
        (0, 8 * PAGE),
        (5 * PAGE - 1, 1),
        (0, 0),
        (0, -1),
        (-PAGE, PAGE),
        (TOP - PAGE, PAGE + 1),
        (TOP, PAGE),
    ],
)
def test_a_region_that_cannot_be_is_refused(
    memory: GuestMemory, file: MappedFile, gpa: int, size: int
) -> None:
    add(memory, PAGE, 4 * PAGE, file)
    generation = memory.generation
    with pytest.raises(PeerError) as caught:
        add(memory, gpa, size, None)
    assert caught.value.errno == errno.EINVAL
    assert memory.generation == generation
    assert [(r.gpa, r.size) for r in memory.regions()] == [(PAGE, 4 * PAGE)]


def test_a_region_beyond_its_file_is_refused(memory: GuestMemory, file: MappedFile) -> None:
    for offset in (13 * PAGE, -1, TOP):
        with pytest.raises(PeerError, match="end of the file"):
            add(memory, 0, 4 * PAGE, file, offset)


def test_neighbours_are_no_overlap(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, PAGE, PAGE, file)
    add(memory, 2 * PAGE, PAGE, file)
    add(memory, 0, PAGE, file)
    assert [r.gpa for r in memory.regions()] == [0, PAGE, 2 * PAGE]


def test_the_same_region_twice_is_one(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file)
    generation = memory.generation
    add(memory, 0, PAGE, file)
    assert memory.generation == generation
    for difference in (
        {"writable": False},
        {"readable": False},
        {"offset": PAGE},
    ):
        with pytest.raises(PeerError, match="overlaps"):
            add(memory, 0, PAGE, file, **difference)
    with pytest.raises(PeerError, match="overlaps"):
        add(memory, 0, PAGE, None)
    memory.unmap(0, PAGE)
    assert memory.regions() == []


@pytest.mark.parametrize(
    ("gpa", "size"), [(0, PAGE), (PAGE, PAGE), (2 * PAGE, PAGE), (0, 4 * PAGE), (PAGE, 0)]
)
def test_unmapping_takes_exactly_a_region(
    memory: GuestMemory, file: MappedFile, gpa: int, size: int
) -> None:
    add(memory, PAGE, 2 * PAGE, file)
    with pytest.raises(PeerError) as caught:
        memory.unmap(gpa, size)
    assert caught.value.errno == errno.ENOENT
    assert len(memory.regions()) == 1


def test_unmapped_memory_is_gone(memory: GuestMemory, file: MappedFile) -> None:
    add(memory, 0, PAGE, file)
    memory.read(0, 1)
    memory.unmap(0, PAGE)
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)


def test_the_generation_tells_of_every_change(memory: GuestMemory, file: MappedFile) -> None:
    seen = {memory.generation}
    add(memory, 0, PAGE, file)
    seen.add(memory.generation)
    add(memory, PAGE, PAGE, None)
    seen.add(memory.generation)
    memory.unmap(0, PAGE)
    seen.add(memory.generation)
    memory.unmap_all()
    seen.add(memory.generation)
    assert len(seen) == 5
    memory.unmap_all()
    assert memory.generation in seen


def test_the_number_of_regions_is_limited(file: MappedFile) -> None:
    memory = GuestMemory(max_regions=2)
    add(memory, 0, PAGE, file)
    add(memory, PAGE, PAGE, file)
    add(memory, PAGE, PAGE, file)
    with pytest.raises(PeerError, match="more than 2") as caught:
        add(memory, 2 * PAGE, PAGE, file)
    assert caught.value.errno == errno.EINVAL
    memory.close()


def test_a_file_that_grows_stays_one_memory(files: MappedFiles, memfd: Callable[..., int]) -> None:
    memory = GuestMemory()
    fd = memfd(PAGE)
    memory.map(0, PAGE, readable=True, writable=True, file=files.get(fd, 0, PAGE, writable=True))
    os.ftruncate(fd, 2 * PAGE)
    grown = files.get(fd, PAGE, PAGE, writable=True)
    memory.map(PAGE, PAGE, readable=True, writable=True, file=grown, offset=PAGE)
    memory.write(PAGE - 2, b"abcd")
    assert os.pread(fd, 4, PAGE - 2) == b"abcd"
    memory.close()
    assert len(files) == 0


SLOT = 16
SLOTS = 8
steps = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.integers(0, SLOTS - 1), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("unmap"), st.integers(0, SLOTS - 1), st.integers(1, 3), st.none()),
        st.tuples(
            st.just("write"), st.integers(0, SLOT * SLOTS), st.integers(0, 3 * SLOT), st.none()
        ),
        st.tuples(
            st.just("read"), st.integers(0, SLOT * SLOTS), st.integers(0, 3 * SLOT), st.none()
        ),
    ),
    max_size=40,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_memory_equals_a_dictionary_of_bytes(
    file: MappedFile, steps: list[tuple[str, int, int, bool | None]]
) -> None:
    """Regions of an arbitrary history against a byte-by-byte model."""
    memory = GuestMemory()
    model: dict[int, tuple[int, bool]] = {}  # GPA -> (offset in the file, writable)
    stored = bytearray(file.size)
    file.view[:] = stored
    regions: set[tuple[int, int]] = set()
    for number, (step, first, count, writable) in enumerate(steps):
        if step == "map":
            gpa, size, offset = first * SLOT, count * SLOT, (SLOTS - first) * SLOT
            wanted = range(gpa, gpa + size)
            known = (gpa, size) in regions and model[gpa] == (offset, writable)
            if not known and any(a in model for a in wanted):
                with pytest.raises(PeerError):
                    add(memory, gpa, size, file, offset, writable=bool(writable))
                continue
            add(memory, gpa, size, file, offset, writable=bool(writable))
            regions.add((gpa, size))
            model |= {a: (offset + a - gpa, bool(writable)) for a in wanted}
        elif step == "unmap":
            gpa, size = first * SLOT, count * SLOT
            if (gpa, size) not in regions:
                with pytest.raises(PeerError):
                    memory.unmap(gpa, size)
                continue
            memory.unmap(gpa, size)
            regions.remove((gpa, size))
            for address in range(gpa, gpa + size):
                del model[address]
        elif step == "write":
            data = bytes([number + 1]) * count
            if all(model.get(a, (0, False))[1] for a in range(first, first + count)):
                memory.write(first, data)
                for address in range(first, first + count):
                    stored[model[address][0]] = number + 1
            else:
                with pytest.raises(GuestMemoryError):
                    memory.write(first, data)
        elif all(a in model for a in range(first, first + count)):
            expected = bytes(stored[model[a][0]] for a in range(first, first + count))
            assert memory.read(first, count) == expected
            assert b"".join(memory.views(first, count, write=False)) == expected
        else:
            with pytest.raises(GuestMemoryError):
                memory.read(first, count)
        assert file.view == stored
        memory._check()
    memory.close()


def test_whoever_watches_is_called_for_every_change() -> None:
    memory = GuestMemory()
    seen: list[int] = []

    def look() -> None:
        seen.append(memory.generation)

    memory.watch(look)
    memory.map(0, 0x1000, readable=True, writable=True, file=None)
    memory.map(0, 0x1000, readable=True, writable=True, file=None)  # it is there
    memory.map(0x1000, 0x1000, readable=True, writable=True, file=None)
    memory.unmap(0, 0x1000)
    memory.unmap_all()
    memory.unmap_all()
    memory.unwatch(look)
    memory.map(0, 0x1000, readable=True, writable=True, file=None)

    assert seen == [1, 2, 3, 4]
