from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import GuestMemoryError, PeerError, UsageError
from viommu.testing.guest_ram import PAGE, DirectDma, DmaBuffer, GuestRam, PageAllocator


def test_pages_are_rounded_up_and_reused() -> None:
    pages = PageAllocator(PAGE, 4 * PAGE)
    assert [pages.allocate(1), pages.allocate(PAGE + 1)] == [PAGE, 2 * PAGE]
    with pytest.raises(UsageError, match="no 1 bytes are free"):
        pages.allocate(1)
    pages.free(PAGE)
    with pytest.raises(UsageError, match="no 4097 bytes"):
        pages.allocate(PAGE + 1)
    pages.free(2 * PAGE)
    assert pages.allocate(3 * PAGE) == PAGE


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_run_is_refused(size: int) -> None:
    with pytest.raises(UsageError):
        PageAllocator(0, PAGE).allocate(size)


@pytest.mark.parametrize("bounds", [(0, 0), (1, PAGE), (0, PAGE + 1), (PAGE, 0)])
def test_bounds_are_pages(bounds: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="are no pages"):
        PageAllocator(*bounds)


def test_freeing_what_is_not_taken_is_refused() -> None:
    pages = PageAllocator(0, 2 * PAGE)
    address = pages.allocate(PAGE)
    pages.free(address)
    with pytest.raises(UsageError, match="was not allocated"):
        pages.free(address)


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=40))
def test_runs_never_overlap_and_all_comes_back(steps: list[tuple[bool, int]]) -> None:
    count = 16
    pages = PageAllocator(0, count * PAGE)
    held: dict[int, int] = {}
    for take, number in steps:
        if take:
            try:
                address = pages.allocate(number * PAGE)
            except UsageError:
                continue
            held[address] = number
        elif held:
            address = sorted(held)[number % len(held)]
            pages.free(address)
            del held[address]
        taken = [at // PAGE + i for at, length in held.items() for i in range(length)]
        assert len(set(taken)) == len(taken)
        assert all(0 <= page < count for page in taken)
    for address in held:
        pages.free(address)
    assert pages.allocate(count * PAGE) == 0


def test_memory_is_where_the_guest_has_it() -> None:
    with GuestRam(4 * PAGE, base=0x10_0000) as ram:
        ram.memory.write(0x10_0000, b"first")
        assert ram.memory.read(0x10_0000, 5) == b"first"
        assert ram.pages.allocate(PAGE) == 0x10_0000
        with pytest.raises(GuestMemoryError):
            ram.memory.read(0, 1)
    ram.close()


def test_direct_buffers_have_one_address() -> None:
    with GuestRam(4 * PAGE) as ram:
        dma = DirectDma(ram)
        buffer = dma.allocate(100)
        assert buffer == DmaBuffer(0, 0, 100)
        dma.memory.write(buffer.address, b"x")
        assert ram.memory.read(buffer.gpa, 1) == b"x"
        dma.free(buffer)
        assert dma.allocate(1).gpa == 0


def test_memory_that_cannot_be_leaves_nothing_open() -> None:
    with pytest.raises(PeerError):
        GuestRam(PAGE, base=2**64)
