"""More mappings than a host may take: the guest is told, and nothing is lost."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.layout import TEST_DEVICE
from guest_tests.l1.pages import PAGE
from guest_tests.l1.word_writer import WORD
from viommu.errors import Access, BackendError, status_of
from viommu.mapper import AddMapResult, MappingInfo
from viommu.spec.virtio_iommu import Status

if TYPE_CHECKING:
    from guest_tests.l1.bench import Bench

pytestmark = pytest.mark.slow

RAM = 0x100000000
IOVA = 0x40000000
TYPE1_LIMIT = 65535  # dma_entry_limit, unless someone has changed it
ENOUGH = 70_000


def mapping(number: int) -> MappingInfo:
    return MappingInfo(IOVA + number * PAGE, RAM, PAGE, Access.READ | Access.WRITE)


def test_many_mappings(bench: Bench, backend: str) -> None:
    ram = bench.add_ram(RAM, PAGE)
    mapper = bench.mapper(TEST_DEVICE)
    writer = bench.word_writer(TEST_DEVICE)
    count = TYPE1_LIMIT if backend == "type1" else ENOUGH
    for number in range(count):
        assert mapper.add_map(mapping(number)) is AddMapResult.OK

    if backend == "type1":
        with pytest.raises(BackendError, match="0 mappings are left of dma_entry_limit") as raised:
            mapper.add_map(mapping(count))
        assert raised.value.errno == errno.ENOSPC
        assert status_of(raised.value) == Status.NOMEM
        assert not writer.write(IOVA + count * PAGE)

    for number in (0, 1, count // 2, count - 1):
        ram.bytes[:4] = bytes(4)
        assert writer.write(IOVA + number * PAGE)
        assert ram.bytes[:4] == WORD
    assert mapper.remove_map(IOVA + PAGE, PAGE).ok
    assert not writer.write(IOVA + PAGE)
    assert mapper.add_map(mapping(count)) is AddMapResult.OK
    assert writer.write(IOVA + count * PAGE)
    assert mapper.remove_map(IOVA, (count + 1) * PAGE).ok
    assert not writer.write(IOVA)
