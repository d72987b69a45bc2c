from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from viommu.errors import BackendError
from viommu.memory import fixed_mapping
from viommu.memory.backing import PrivateBacking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = fixed_mapping.page_size()
SIZE = 64 * PAGE


class Area(NamedTuple):
    """A line of /proc/self/maps, its addresses relative to the reservation."""

    start: int
    end: int
    protection: str
    offset: int


@pytest.fixture
def base() -> Iterator[int]:
    base = fixed_mapping.reserve(SIZE, 1 << 21)
    yield base
    fixed_mapping.release(base, SIZE)


def areas(base: int) -> list[Area]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, protection, offset, *_ = line.split()
        start, end = (int(address, 16) - base for address in span.split("-"))
        if 0 <= start < SIZE:
            found.append(Area(start, end, protection, int(offset, 16)))
    return found


def flags(address: int) -> set[str]:
    """The flags of the mapping that holds an address; "dc": not for children, "dd": not dumped."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "VmFlags:":
            return set(rest.split())
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("size", [0, -1, 3, 4095])
def test_a_page_size_that_cant_be_is_refused(size: int) -> None:
    with pytest.raises(BackendError, match=str(size)):
        fixed_mapping.checked_page_size(size)


@pytest.mark.parametrize("size", [4096, 16384, 65536])
def test_page_sizes_of_real_hosts_are_fine(size: int) -> None:
    assert fixed_mapping.checked_page_size(size) == size


def test_a_reservation_is_aligned_exact_and_out_of_reach(base: int) -> None:
    assert base % (1 << 21) == 0
    assert areas(base) == [Area(0, SIZE, "---p", 0)]
    assert {"dc", "dd", "nr"} <= flags(base)


def test_what_cant_be_reserved_is_an_error() -> None:
    with pytest.raises(BackendError) as caught:
        fixed_mapping.reserve(1 << 60, PAGE)
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize(("writable", "protection"), [(True, "rw-s"), (False, "r--s")])
def test_a_file_is_placed_where_it_should_be(
    base: int, memfd: Callable[..., int], writable: bool, protection: str
) -> None:
    fd = memfd()
    os.pwrite(fd, b"data", 3 * PAGE)

    fixed_mapping.place_file(base + 8 * PAGE, 2 * PAGE, fd, 3 * PAGE, writable=writable)

    assert ctypes.string_at(base + 8 * PAGE, 4) == b"data"
    assert areas(base) == [
        Area(0, 8 * PAGE, "---p", 0),
        Area(8 * PAGE, 10 * PAGE, protection, 3 * PAGE),
        Area(10 * PAGE, SIZE, "---p", 0),
    ]
    assert {"dc", "dd"} <= flags(base + 8 * PAGE)


@pytest.mark.parametrize(("writable", "protection"), [(True, "rw-s"), (False, "r--s")])
def test_memory_is_placed_a_second_time(base: int, writable: bool, protection: str) -> None:
    with PrivateBacking(4 * PAGE) as memory:
        fixed_mapping.place_memory(base, PAGE, memory.address + 2 * PAGE, writable=writable)
        memory.view[2 * PAGE : 2 * PAGE + 4] = b"both"
        assert ctypes.string_at(base, 4) == b"both"
        assert areas(base)[0] == Area(0, PAGE, protection, 2 * PAGE)
        assert {"dc", "dd"} <= flags(base)
    assert ctypes.string_at(base, 4) == b"both"


def test_what_is_vacated_is_reserved_as_before(base: int, memfd: Callable[..., int]) -> None:
    before = flags(base)
    fixed_mapping.place_file(base + PAGE, PAGE, memfd(), 0, writable=True)

    fixed_mapping.vacate(base + PAGE, PAGE)

    assert areas(base) == [Area(0, SIZE, "---p", 0)]
    assert flags(base + PAGE) == before


def test_a_failure_leaves_the_reservation_and_nothing_aside(
    base: int, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    mapped = Path("/proc/self/maps").read_text()

    with pytest.raises(BackendError, match="mmap") as caught:
        fixed_mapping.place_file(base, PAGE, reading, 0, writable=True)
    assert caught.value.errno == errno.EACCES
    with pytest.raises(BackendError, match="mremap"):
        fixed_mapping.place_memory(base, PAGE, base, writable=True)  # reserved, not shared
    # Not on a page: refused by the very last step, the move to its place.
    with pytest.raises(BackendError, match="mremap"):
        fixed_mapping.place_file(base + 1, PAGE, fd, 0, writable=True)
    with PrivateBacking(PAGE) as memory, pytest.raises(BackendError, match="mremap"):
        fixed_mapping.place_memory(base + 1, PAGE, memory.address, writable=True)
    with pytest.raises(BackendError, match="mmap"):
        fixed_mapping.vacate(base + 1, PAGE)
    os.close(reading)

    assert areas(base) == [Area(0, SIZE, "---p", 0)]
    assert Path("/proc/self/maps").read_text().count("memfd:test") == mapped.count("memfd:test")
