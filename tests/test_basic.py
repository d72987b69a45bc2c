"""BasicMemoryMapper: the contract of MemoryMapper with crosvm's export semantics."""

import errno
from collections.abc import Iterator

import pytest

from viommu.basic import BasicMemoryMapper
from viommu.errors import (
    Access,
    BackendError,
    ExportError,
    SessionFaulted,
    TranslationFault,
    UsageError,
)
from viommu.mapper import AddMapResult, MappingInfo, MemoryMapper, MemRegion

RW = Access.READ | Access.WRITE
R = Access.READ
PAGE = 0x1000


@pytest.fixture
def mapper() -> Iterator[BasicMemoryMapper]:
    """Two contiguous read-write pages, one read-only page after them, all contiguous in GPA."""
    mapper = BasicMemoryMapper()
    for page, prot in ((0, RW), (1, RW), (2, R)):
        result = mapper.add_map(MappingInfo(page * PAGE, 0x10000 + page * PAGE, PAGE, prot))
        assert result is AddMapResult.OK
    yield mapper
    for iova, size, times in mapper.exports.held():
        for _ in range(times):
            mapper.release(iova, size)
    # A session's fault event is its caller's: here that is the test.
    if mapper.exports._fault:
        mapper.exports._fault.close()


def test_it_satisfies_the_contract(mapper: BasicMemoryMapper) -> None:
    assert isinstance(mapper, MemoryMapper)
    assert mapper.supports_detach()
    assert mapper.get_mask() & PAGE
    assert BasicMemoryMapper(page_sizes=0x10000).get_mask() == 0x10000


def test_ids_are_unique() -> None:
    assert len({BasicMemoryMapper().id() for _ in range(10)}) == 10


def test_a_mapper_without_page_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match="0x0"):
        BasicMemoryMapper(page_sizes=0)


def test_overlap_is_a_result(mapper: BasicMemoryMapper) -> None:
    assert mapper.add_map(MappingInfo(0x800, 0, PAGE, R)) is AddMapResult.OVERLAP_FAILURE
    assert len(mapper.mappings()) == 3


def test_a_mapping_is_found_and_those_of_a_range_are_counted(mapper: BasicMemoryMapper) -> None:
    found = mapper.find(PAGE)

    assert found is not None
    assert found.iova <= PAGE < found.iova + found.size
    assert mapper.find(1 << 40) is None
    assert [mapper.count(0x800, size) for size in (1, 2 * PAGE, 1 << 40)] == [1, 3, 3]


def test_regions_merge_when_contiguous_with_equal_protection(mapper: BasicMemoryMapper) -> None:
    mapper.start_export_session()

    assert mapper.export(0x800, 2 * PAGE) == [
        MemRegion(0x10800, PAGE + 0x800, RW),
        MemRegion(0x12000, 0x800, R),
    ]


def test_regions_that_are_apart_in_guest_memory_do_not_merge(mapper: BasicMemoryMapper) -> None:
    mapper.add_map(MappingInfo(3 * PAGE, 0x20000, PAGE, R))
    mapper.start_export_session()

    assert mapper.export(2 * PAGE, 2 * PAGE) == [
        MemRegion(0x12000, PAGE, R),
        MemRegion(0x20000, PAGE, R),
    ]


def test_a_hole_fails_the_export_and_leaves_nothing_held(mapper: BasicMemoryMapper) -> None:
    mapper.start_export_session()

    with pytest.raises(TranslationFault) as caught:
        mapper.export(2 * PAGE, 2 * PAGE)

    assert caught.value.iova == 3 * PAGE
    assert mapper.exports.total == 0


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_export_is_refused(mapper: BasicMemoryMapper, size: int) -> None:
    mapper.start_export_session()

    with pytest.raises(UsageError, match=f"{size} bytes"):
        mapper.export(0, size)


def test_export_needs_a_session(mapper: BasicMemoryMapper) -> None:
    with pytest.raises(ExportError, match="start_export_session"):
        mapper.export(0, PAGE)


def test_unmapping_what_is_not_exported_disturbs_nobody(mapper: BasicMemoryMapper) -> None:
    fault = mapper.start_export_session()
    mapper.export(0, PAGE)

    assert mapper.remove_map(PAGE, PAGE) == (True, None)
    assert not fault.is_set()
    mapper.export(0, PAGE)


def test_the_eight_steps_of_a_fault(mapper: BasicMemoryMapper) -> None:
    fault = mapper.start_export_session()
    mapper.export(0x10, 0x20)
    mapper.export(0x10, 0x20)

    ok, resolution = mapper.remove_map(0, PAGE)

    assert ok
    assert resolution is not None
    assert fault.is_set()
    assert not resolution.is_set()
    with pytest.raises(SessionFaulted, match="2 exports held"):
        mapper.export(PAGE, 0x10)
    with pytest.raises(SessionFaulted):
        mapper.start_export_session()
    mapper.release(0x10, 0x20)
    assert not resolution.is_set()
    mapper.release(0x10, 0x20)
    assert resolution.is_set()
    second = mapper.start_export_session()
    assert not second.is_set()
    assert mapper.export(PAGE, 0x10) == [MemRegion(0x11000, 0x10, RW)]


def test_a_second_removal_waits_for_the_same_releases(mapper: BasicMemoryMapper) -> None:
    fault = mapper.start_export_session()
    mapper.export(0, 2 * PAGE)

    first = mapper.remove_map(0, PAGE).resolution
    fault.clear()
    second = mapper.remove_map(PAGE, PAGE).resolution

    assert first is second
    assert not fault.is_set()
    assert mapper.exports.faults == 1
    mapper.release(0, 2 * PAGE)


def test_reset_domain_removes_all_and_faults(mapper: BasicMemoryMapper) -> None:
    fault = mapper.start_export_session()
    mapper.export(2 * PAGE, 1)

    resolution = mapper.reset_domain()

    assert mapper.mappings() == []
    assert fault.is_set()
    assert resolution is not None
    mapper.release(2 * PAGE, 1)
    assert resolution.is_set()
    assert mapper.reset_domain() is None


def test_a_removal_that_would_split_removes_nothing_and_faults_nobody(
    mapper: BasicMemoryMapper,
) -> None:
    fault = mapper.start_export_session()
    mapper.export(0, PAGE)

    assert mapper.remove_map(0, PAGE + 1) == (False, None)
    assert len(mapper.mappings()) == 3
    assert not fault.is_set()


def test_removing_gaps_is_no_error(mapper: BasicMemoryMapper) -> None:
    assert mapper.remove_map(0x100000, PAGE) == (True, None)
    assert mapper.remove_map(0, 1 << 64) == (True, None)
    assert mapper.mappings() == []


def test_host_memory_is_refused_with_enotsup(mapper: BasicMemoryMapper) -> None:
    with pytest.raises(BackendError, match="0xdead000") as caught:
        mapper.vfio_dma_map(0, 0xDEAD000, PAGE, RW)
    assert caught.value.errno == errno.ENOTSUP


def test_a_client_that_closed_its_fault_event_hurts_nobody_else(mapper: BasicMemoryMapper) -> None:
    fault = mapper.start_export_session()
    mapper.export(0, PAGE)
    fault.close()

    _, resolution = mapper.remove_map(0, PAGE)
    assert resolution is not None
    mapper.release(0, PAGE)
    assert resolution.is_set()


def test_check_passes_in_every_state(mapper: BasicMemoryMapper) -> None:
    mapper._check()
    mapper.start_export_session()
    mapper.export(0, PAGE)
    mapper._check()
    mapper.remove_map(0, PAGE)
    mapper._check()
    mapper.release(0, PAGE)
    mapper._check()
