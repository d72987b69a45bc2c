"""Guest memory as another process gets to know it."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import PAGE, RAM, make_memory
from viommu.errors import Access, ExportError
from viommu.ipc import memory_table
from viommu.ipc.memory_table import MemoryListing, memory_page
from viommu.ipc.protocol import FILE_NONE, MAX_FDS, SPANS_A_PACKET, Span, decode_spans
from viommu.memory import GuestMemory, MappedFiles
from viommu.vfio_user.connection import close_fds

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def there() -> Iterator[GuestMemory]:
    """The server's memory: two files."""
    memory = make_memory(MappedFiles(), 0, 0x1000_0000)
    yield memory
    memory.close()


@pytest.fixture
def here() -> Iterator[GuestMemory]:
    """The client's."""
    memory = GuestMemory()
    yield memory
    memory.close()


def copy(there: GuestMemory, here: GuestMemory, files: MappedFiles) -> int:
    """Make ``here`` what ``there`` is; return how many pages that took."""
    pages = 0
    with MemoryListing() as listing:
        left = 1
        while left:
            body, sent = memory_page(there, len(listing))
            fds = list(sent)
            spans, generation, left = decode_spans(body, len(fds))
            assert generation == there.generation
            listing.add(spans, fds)
            assert not fds
            pages += 1
        listing.apply(here, files)
    return pages


def layout(memory: GuestMemory) -> list[tuple[int, int, bool, bool, bool, int]]:
    return [(r.gpa, r.size, r.readable, r.writable, r.shared, r.offset) for r in memory.regions()]


def test_both_see_the_same_memory(there: GuestMemory, here: GuestMemory) -> None:
    assert copy(there, here, MappedFiles()) == 1

    assert layout(here) == layout(there)
    there.write(0x1000_0000, b"there")
    here.write(0, b"here")
    assert here.read(0x1000_0000, 5) == b"there"
    assert there.read(0, 4) == b"here"


def test_a_file_is_sent_once_however_many_regions_are_in_it() -> None:
    files = MappedFiles()
    there, here = GuestMemory(), GuestMemory()
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8 * PAGE)
    for number in range(8):
        file = files.get(fd, 0, 8 * PAGE, writable=True)
        readable, writable = number % 4 != 3, number % 2 == 0
        at = number * PAGE
        there.map(2 * at, PAGE, readable=readable, writable=writable, file=file, offset=at)
    os.close(fd)
    _, fds = memory_page(there, 0)
    assert len(fds) == 1
    close_fds(list(fds))

    ours = MappedFiles()
    copy(there, here, ours)
    assert layout(here) == layout(there)
    assert len(ours) == 1
    there.close()
    here.close()
    assert len(ours) == 0


def test_memory_that_is_not_shared_is_told_of(there: GuestMemory, here: GuestMemory) -> None:
    there.map(0x2000_0000, PAGE, readable=True, writable=False, file=None)
    copy(there, here, MappedFiles())

    assert layout(here)[-1] == (0x2000_0000, PAGE, True, False, False, 0)


def test_more_files_than_a_packet_takes_come_in_pages() -> None:
    count = 2 * MAX_FDS + 1
    there = make_memory(MappedFiles(), *(number * RAM for number in range(count)))
    here = GuestMemory()
    assert copy(there, here, MappedFiles()) == 3

    assert layout(here) == layout(there)
    there.close()
    here.close()


def test_more_regions_than_a_packet_takes_come_in_pages() -> None:
    there, here = GuestMemory(), GuestMemory()
    for number in range(SPANS_A_PACKET + 1):
        there.map(number * PAGE, PAGE, readable=True, writable=True, file=None)
    assert copy(there, here, MappedFiles()) == 2

    assert layout(here) == layout(there)


def test_a_page_behind_the_end_is_empty(there: GuestMemory) -> None:
    body, fds = memory_page(there, 1 << 31)

    assert decode_spans(body, 0) == ([], there.generation, 0)
    assert fds == ()


def test_only_what_has_changed_is_mapped_again(there: GuestMemory, here: GuestMemory) -> None:
    ours = MappedFiles()
    copy(there, here, ours)
    before = {region.gpa: region.file for region in here.regions()}
    generation = here.generation
    copy(there, here, ours)
    assert here.generation == generation

    there.unmap(0, RAM)
    there.map(0x3000_0000, PAGE, readable=True, writable=True, file=None)
    copy(there, here, ours)
    assert layout(here) == layout(there)
    assert here.generation > generation
    assert here.regions()[0].file is before[0x1000_0000]
    assert len(ours) == 1


def test_a_list_that_begins_again_forgets_the_first_pages(here: GuestMemory) -> None:
    with MemoryListing() as listing:
        listing.add([Span(0, PAGE, 0, FILE_NONE, Access.READ)], [])
        assert len(listing) == 1
        listing.clear()
        assert len(listing) == 0
        listing.apply(here, MappedFiles())
    assert here.regions() == []


def test_what_can_not_be_mapped_is_refused(here: GuestMemory) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)
    with MemoryListing() as listing:
        access = Access.READ
        listing.add([Span(0, 2 * PAGE, 0, 0, access)], [fd])
        with pytest.raises(ExportError, match="can't be mapped"):
            listing.apply(here, MappedFiles())
    assert here.regions() == []


def test_regions_that_overlap_are_refused(here: GuestMemory) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4 * PAGE)
    files = MappedFiles()
    access = Access.READ
    with MemoryListing() as listing:
        listing.add([Span(0, 2 * PAGE, 0, 0, access), Span(PAGE, PAGE, 0, 0, access)], [fd])
        with pytest.raises(ExportError, match="overlaps"):
            listing.apply(here, files)
    here.close()
    assert len(files) == 0


def test_a_client_maps_no_number_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_table, "_MAX_FILES", 2)
    fds = [os.memfd_create(str(number)) for number in range(3)]
    with MemoryListing() as listing, pytest.raises(ExportError, match="more than 2 files"):
        listing.add([], fds)
    assert len(fds) == 1
    close_fds(fds)


def test_without_file_descriptors_nothing_is_sent(there: GuestMemory) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))  # one, and two are needed
    try:
        with pytest.raises(ExportError, match="no file descriptor"):
            memory_page(there, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(free)
