"""The memory mappers of real devices: DMA goes where the mappings say, and nowhere else."""

from __future__ import annotations

import errno
import os
import re
import time
from typing import TYPE_CHECKING

import pytest

from guest_tests.guest import system
from guest_tests.l1.layout import (
    APERTURE_BITS,
    EDU,
    GROUPED_EDU,
    MACHINES,
    MSI_WINDOW,
    OTHER_GROUPED_EDU,
    TEST_DEVICE,
)
from guest_tests.l1.pages import PAGE
from guest_tests.l1.word_writer import WORD
from viommu.domain import IDENTITY
from viommu.errors import Access, BackendError
from viommu.mapper import AddMapResult, MappingInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_tests.l1.bench import Bench
    from viommu.mapper import MemoryMapper

RAM = 0x100000000  # where guest memory is
IOVA = 0x40000000
R, W = Access.READ, Access.WRITE
RW = R | W

LOG_SECONDS = 15.0  # the kernel prints ten faults in five seconds


def add(mapper: MemoryMapper, iova: int, gpa: int, pages: int = 1, prot: Access = RW) -> None:
    assert mapper.add_map(MappingInfo(iova, gpa, pages * PAGE, prot)) is AddMapResult.OK


def remove(mapper: MemoryMapper, iova: int, pages: int = 1) -> bool:
    ok, resolution = mapper.remove_map(iova, pages * PAGE)
    assert resolution is None
    return ok


def assert_logged(bdf: str, kind: Access, iova: int, attempt: Callable[[int, int], str]) -> None:
    """Check that the kernel's log has a fault of ``attempt`` to move a word."""
    pattern = (
        rf"DMAR: \[DMA {'Write' if kind is W else 'Read'} .*\] "
        rf"Request device \[(0000:)?{re.escape(bdf)}\] fault addr {iova & ~(PAGE - 1):#x} "
    )
    deadline = time.monotonic() + LOG_SECONDS
    while True:
        position = system.log_position()
        attempt(iova, 4)
        try:
            system.wait_for_log(pattern, after=position, timeout=0.5)
        except TimeoutError:
            if time.monotonic() > deadline:
                raise
        else:
            return


def test_dma_lands_where_the_mappings_say(bench: Bench) -> None:
    ram = bench.add_ram(RAM, 4 * PAGE)
    mapper = bench.mapper(EDU)
    edu = bench.edu(EDU)
    # Neighbours in IOVA are not in memory.
    for page, target in enumerate((2, 0, 3, 1)):
        add(mapper, IOVA + page * PAGE, RAM + target * PAGE)
    ram.bytes[:] = before = os.urandom(4 * PAGE)

    edu.read(IOVA + PAGE - 100, 200)
    edu.write(IOVA + 3 * PAGE - 50, 200)

    moved = before[3 * PAGE - 100 : 3 * PAGE] + before[:100]
    expected = bytearray(before)
    expected[4 * PAGE - 50 : 4 * PAGE] = moved[:50]
    expected[PAGE : PAGE + 150] = moved[50:]
    assert ram.bytes[:] == bytes(expected)


@pytest.mark.parametrize("end", [MSI_WINDOW[0], 1 << APERTURE_BITS])
def test_the_last_page_before_what_cannot_be_mapped(bench: Bench, end: int) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, end - PAGE, RAM)

    assert writer.write(end - 4)
    assert ram.bytes[-4:] == WORD

    assert remove(mapper, end - PAGE)
    assert not writer.write(end - 4)


def test_nothing_is_reached_before_the_first_mapping(bench: Bench) -> None:
    bench.add_ram(RAM, PAGE)
    bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)

    for address in (0, PAGE, RAM, IOVA):
        assert not writer.write(address)


def test_an_unmap_blocks(bench: Bench) -> None:
    ram = bench.add_ram(RAM, 2 * PAGE)
    mapper = bench.mapper(EDU)
    edu = bench.edu(EDU)
    add(mapper, IOVA, RAM)
    add(mapper, IOVA + PAGE, RAM + PAGE)
    ram.bytes[:6] = b"secret"

    assert remove(mapper, IOVA)
    edu.read(IOVA, 6)
    edu.write(IOVA + PAGE, 6)  # its neighbour is still there
    edu.write(IOVA, 6)

    assert ram.bytes[:6] == b"secret"
    assert ram.bytes[PAGE : PAGE + 6] != b"secret"


def test_what_is_blocked_is_in_the_kernels_log(bench: Bench) -> None:
    bench.add_ram(RAM, 2 * PAGE)
    mapper = bench.mapper(EDU)
    edu = bench.edu(EDU)
    add(mapper, IOVA, RAM, pages=2, prot=R)
    assert_logged(EDU, W, IOVA + PAGE + 8, edu.write)

    assert remove(mapper, IOVA, 2)
    assert_logged(EDU, R, IOVA, edu.read)

    mapper.reset_domain()
    assert_logged(EDU, W, IOVA + PAGE, edu.write)


def test_leaving_the_domain_blocks(bench: Bench) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM)
    assert writer.write(IOVA)

    assert mapper.reset_domain() is None
    assert not writer.write(IOVA + 8)
    assert ram.bytes[8:16] == bytes(8)

    add(mapper, IOVA, RAM)
    assert writer.write(IOVA + 8)
    assert ram.bytes[8:12] == WORD


def test_a_read_only_mapping_blocks_writes(bench: Bench) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(EDU)
    edu = bench.edu(EDU)
    add(mapper, IOVA, RAM, prot=R)
    add(mapper, IOVA + PAGE, RAM)
    ram.bytes[:8] = b"readonly"

    edu.read(IOVA, 8)
    edu.write(IOVA + 64, 8)
    edu.write(IOVA + PAGE + 8, 8)

    assert ram.bytes[8:16] == b"readonly"
    assert ram.bytes[64:72] == bytes(8)


def test_a_write_only_mapping_can_be_written(bench: Bench) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM, prot=W)

    assert writer.write(IOVA)
    assert ram.bytes[:4] == WORD


def test_a_write_only_mapping_can_be_read_only_where_the_kernel_lets_it(
    bench: Bench, machine: str
) -> None:
    ram = bench.add_ram(RAM, 2 * PAGE)
    mapper = bench.mapper(EDU)
    edu = bench.edu(EDU)
    ram.bytes[:6] = b"secret"
    add(mapper, IOVA, RAM, prot=W)
    add(mapper, IOVA + PAGE, RAM + PAGE)
    edu.read(IOVA + PAGE, 6)  # zeros: what it keeps when the next one is blocked

    edu.read(IOVA, 6)
    edu.write(IOVA + PAGE, 6)

    found = ram.bytes[PAGE : PAGE + 6]
    assert found == (bytes(6) if MACHINES[machine].write_only else b"secret")


def test_memory_that_is_read_only_is_so_whatever_the_guest_maps(bench: Bench) -> None:
    rom = bench.add_ram(RAM, PAGE, writable=False)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM, prot=RW)

    assert not writer.write(IOVA)
    assert rom.bytes[:4] == bytes(4)


def test_memory_may_come_after_the_mapping_and_go_before_it(bench: Bench) -> None:
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM, pages=2)
    assert not writer.write(IOVA)

    first = bench.add_ram(RAM + PAGE, PAGE)
    assert not writer.write(IOVA)
    assert writer.write(IOVA + PAGE)
    assert first.bytes[:4] == WORD

    bench.remove(first.region)
    assert not writer.write(IOVA + PAGE)

    second = bench.add_ram(RAM, 2 * PAGE)
    assert writer.write(IOVA + PAGE + 4)
    assert second.bytes[PAGE + 4 : PAGE + 8] == WORD
    assert first.bytes[4:8] == bytes(4)
    assert remove(mapper, IOVA, 2)
    assert not writer.write(IOVA)


def test_a_write_across_the_end_of_a_mapping_faults(bench: Bench) -> None:
    ram = bench.add_ram(RAM, 2 * PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM)

    assert not writer.write(IOVA + PAGE - 4, 8)
    assert ram.bytes[PAGE:] == bytes(PAGE)


def test_bypass_reaches_all_of_memory_and_only_that(bench: Bench) -> None:
    low = bench.add_ram(0, 2 * PAGE)
    high = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    assert mapper.add_map(IDENTITY) is AddMapResult.OK

    for ram, gpa in ((low, PAGE + 8), (high, RAM + 8)):
        assert writer.write(gpa)
        assert ram.bytes[gpa % RAM : gpa % RAM + 4] == WORD
    assert not writer.write(2 * PAGE)
    later = bench.add_ram(2 * RAM, PAGE)
    assert writer.write(2 * RAM)
    assert later.bytes[:4] == WORD

    assert mapper.reset_domain() is None
    assert not writer.write(PAGE)


@pytest.mark.parametrize(
    "iova",
    [
        MSI_WINDOW[0],
        MSI_WINDOW[0] - PAGE,
        MSI_WINDOW[1] - PAGE,
        (1 << APERTURE_BITS) - PAGE,
        1 << APERTURE_BITS,
        (1 << 64) - 2 * PAGE,
    ],
    ids=hex,
)
def test_what_the_host_refuses_changes_nothing(bench: Bench, iova: int) -> None:
    ram = bench.add_ram(RAM, 2 * PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM)

    with pytest.raises(BackendError) as raised:
        mapper.add_map(MappingInfo(iova, RAM, 2 * PAGE, RW))

    assert raised.value.errno == errno.EINVAL
    assert f"[{iova:#x}, {iova + 2 * PAGE:#x})" in str(raised.value)
    assert writer.write(IOVA + 8)
    assert ram.bytes[8:12] == WORD
    assert remove(mapper, iova, 2)  # nothing is there
    assert remove(mapper, IOVA)


def test_an_unmap_that_would_split_changes_nothing(bench: Bench) -> None:
    bench.add_ram(RAM, 4 * PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM)
    add(mapper, IOVA + PAGE, RAM + PAGE, pages=3)

    assert not remove(mapper, IOVA, 2)
    assert not remove(mapper, IOVA + 2 * PAGE, 8)

    assert all(writer.write(IOVA + page * PAGE) for page in range(4))
    assert remove(mapper, IOVA - PAGE, 16)
    assert not any(writer.write(IOVA + page * PAGE) for page in range(4))


def test_another_device_shares_the_space_or_has_its_own(bench: Bench, backend: str) -> None:
    ram = bench.add_ram(RAM, 2 * PAGE)
    mapper, other = bench.mapper(EDU), bench.mapper(TEST_DEVICE)
    edu, writer = bench.edu(EDU), bench.word_writer(TEST_DEVICE)
    add(mapper, IOVA, RAM)

    joined = other.join(mapper)

    assert joined is (backend == "iommufd")
    assert (other.id() == mapper.id()) is joined
    assert writer.write(IOVA) is joined
    if not joined:
        add(other, IOVA, RAM)
        assert writer.write(IOVA)
    edu.read(IOVA, 4)
    edu.write(IOVA + 64, 4)
    assert ram.bytes[64:68] == WORD

    # What one maps the other has if they share, and keeps when the first leaves.
    add(mapper, IOVA + PAGE, RAM + PAGE)
    assert writer.write(IOVA + PAGE) is joined
    mapper.reset_domain()
    edu.write(IOVA + 128, 4)
    assert ram.bytes[128:132] == bytes(4)
    assert writer.write(IOVA + 256)
    assert ram.bytes[256:260] == WORD
    other.reset_domain()
    assert not writer.write(IOVA)


@pytest.mark.bridges
def test_functions_of_one_group_move_together(bench: Bench) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(GROUPED_EDU, OTHER_GROUPED_EDU)
    edus = [bench.edu(bdf) for bdf in (GROUPED_EDU, OTHER_GROUPED_EDU)]
    add(mapper, IOVA, RAM)
    ram.bytes[:8] = b"together"

    edus[0].read(IOVA, 8)
    edus[0].write(IOVA + 64, 8)
    edus[1].read(IOVA + 64, 8)
    edus[1].write(IOVA + 128, 8)
    assert ram.bytes[128:136] == b"together"

    mapper.reset_domain()
    ram.bytes[:8] = b"far away"
    for edu in edus:
        edu.write(IOVA, 8)
    assert ram.bytes[:8] == b"far away"


def test_page_sizes(bench: Bench) -> None:
    mapper = bench.mapper(EDU)

    assert mapper.get_mask() & PAGE
    assert not mapper.get_mask() & (PAGE - 1)
    assert mapper.supports_detach()
