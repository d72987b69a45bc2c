"""The memory mappers of real devices: DMA goes where the mappings say, and nowhere else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guest_tests.l1.layout import EDU
from viommu.errors import Access
from viommu.mapper import AddMapResult, MappingInfo

if TYPE_CHECKING:
    from guest_tests.l1.bench import Bench
    from viommu.mapper import MemoryMapper

PAGE = 4096
RAM = 0x100000000  # where guest memory is
IOVA = 0x40000000
R, RW = Access.READ, Access.READ | Access.WRITE


def add(mapper: MemoryMapper, iova: int, gpa: int, pages: int = 1, prot: Access = RW) -> None:
    assert mapper.add_map(MappingInfo(iova, gpa, pages * PAGE, prot)) is AddMapResult.OK


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
