"""DMA from one device to another: BARs are guest memory, as long as they are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.layout import EDU, SHARED_MEMORY, SHARED_MEMORY_SIZE, TEST_DEVICE
from guest_tests.l1.pages import PAGE
from guest_tests.l1.word_writer import WORD
from viommu.domain import IDENTITY
from viommu.errors import Access, BackendError
from viommu.mapper import AddMapResult, MappingInfo

if TYPE_CHECKING:
    from guest_tests.l1.bench import Bench
    from guest_tests.l1.function import Function
    from viommu.memory.region import Region
    from viommu_backends.iommufd import IommufdMapper
    from viommu_backends.vfio_type1 import Type1Mapper

RAM = 0x100000000
BAR = 0x200000000  # where the guest has put it
ELSEWHERE = 0x280000000
IOVA = 0x40000000
RW = Access.READ | Access.WRITE


@pytest.fixture
def memory(bench: Bench) -> Function:
    """BAR 2 of the shared memory device, which has a mapper of its own."""
    bench.mapper(SHARED_MEMORY)
    function = bench.function(SHARED_MEMORY, bar=2)
    function.enable(master=False)
    function.bytes[:] = bytes(SHARED_MEMORY_SIZE)
    return function


@pytest.fixture
def bar(bench: Bench, memory: Function) -> Region:
    """The same BAR as a region of guest memory, which it is while it decodes."""
    region = bench.add_bar(BAR, SHARED_MEMORY, 2)
    bench.regions.enable(region)
    return region


def map_bar(mapper: Type1Mapper | IommufdMapper, gpa: int = BAR) -> None:
    mapping = MappingInfo(IOVA, gpa, SHARED_MEMORY_SIZE, RW)
    assert mapper.add_map(mapping) is AddMapResult.OK


def test_a_device_reads_and_writes_the_memory_of_another(
    bench: Bench, memory: Function, bar: Region
) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(EDU)
    edu = bench.edu(EDU)
    map_bar(mapper)
    assert mapper.add_map(MappingInfo(0, RAM, PAGE, RW)) is AddMapResult.OK
    ram.bytes[:4] = b"peer"

    edu.read(0, 4)
    edu.write(IOVA + 0x12345, 4)
    assert bytes(memory.bytes[0x12345:0x12349]) == b"peer"

    memory.bytes[SHARED_MEMORY_SIZE - 5 :] = b"again"
    edu.read(IOVA + SHARED_MEMORY_SIZE - 5, 5)
    edu.write(64, 5)
    assert ram.bytes[64:69] == b"again"


def test_part_of_a_bar(bench: Bench, memory: Function, bar: Region) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    assert mapper.add_map(MappingInfo(IOVA, BAR + 3 * PAGE, PAGE, RW)) is AddMapResult.OK

    assert writer.write(IOVA + 8)
    assert not writer.write(IOVA + PAGE)

    assert bytes(memory.bytes[3 * PAGE + 8 : 3 * PAGE + 12]) == WORD
    assert mapper.remove_map(IOVA, PAGE).ok
    assert not writer.write(IOVA + 8)


def test_bypass_reaches_bars(bench: Bench, memory: Function, bar: Region) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    assert mapper.add_map(IDENTITY) is AddMapResult.OK

    assert writer.write(BAR + 16)

    assert bytes(memory.bytes[16:20]) == WORD


def test_a_bar_that_moves(bench: Bench, memory: Function, bar: Region) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    map_bar(mapper)
    assert writer.write(IOVA)

    bench.remove(bar)
    assert not writer.write(IOVA)

    moved = bench.add_bar(ELSEWHERE, SHARED_MEMORY, 2)
    bench.regions.enable(moved)
    assert not writer.write(IOVA)  # the guest has mapped where it was
    assert mapper.remove_map(IOVA, SHARED_MEMORY_SIZE).ok
    map_bar(mapper, ELSEWHERE)
    assert writer.write(IOVA + 64)
    assert bytes(memory.bytes[64:68]) == WORD


def test_a_bar_that_is_switched_off_and_on(bench: Bench, memory: Function, bar: Region) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    map_bar(mapper)

    for position in (0, 128):
        assert writer.write(IOVA + position)
        assert bytes(memory.bytes[position : position + 4]) == WORD

        # What is mapped goes first: type1 would go on translating to a BAR that isn't there.
        bench.regions.disable(bar)
        memory.enable(memory=False, master=False)
        assert not writer.write(IOVA)
        memory.enable(master=False)
        bench.regions.enable(bar)


def test_a_bar_that_does_not_decode_is_left_out_until_it_does(
    bench: Bench, memory: Function
) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    map_bar(mapper)
    bar = bench.add_bar(BAR, SHARED_MEMORY, 2)
    memory.enable(memory=False, master=False)

    bench.regions.enable(bar)  # tolerated: nobody may ever reach for it
    assert not writer.write(IOVA)

    bench.regions.disable(bar)
    memory.enable(master=False)
    bench.regions.enable(bar)
    assert writer.write(IOVA)


def test_a_guest_that_maps_what_does_not_decode_is_told(
    bench: Bench, memory: Function, bar: Region
) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    memory.enable(memory=False, master=False)

    with pytest.raises(BackendError):
        map_bar(mapper)

    memory.enable(master=False)
    map_bar(mapper)
    assert bench.word_writer(TEST_DEVICE).write(IOVA)
