"""iommufd's numbers and structures against a table and the C header."""

from __future__ import annotations

import struct

import pytest

from tests.spec.c_header import c_constants, c_layout
from viommu.spec import iommufd as spec

IOMMUFD_H = "linux/iommufd.h"


def words(*names: str, at: int = 0) -> dict[str, tuple[int, int]]:
    """Return fields of four bytes that follow each other."""
    return {name: (at + 4 * number, 4) for number, name in enumerate(names)}


def double_words(*names: str, at: int) -> dict[str, tuple[int, int]]:
    """Return fields of eight bytes that follow each other."""
    return {name: (at + 8 * number, 8) for number, name in enumerate(names)}


def layout_of(codec: struct.Struct, fields: list[str], at: int = 0) -> dict[str, tuple[int, int]]:
    """Return where a format has its fields: there is no space between them."""
    found = {}
    for name, letter in zip(fields, codec.format.removeprefix("<"), strict=True):
        found[name] = (at, struct.calcsize(f"<{letter}"))
        at += found[name][1]
    return found


# the format, its C name, fields as the kernel has them
LAYOUTS: list[tuple[struct.Struct, str, dict[str, tuple[int, int]]]] = [
    (spec.DESTROY, "iommu_destroy", words("size", "id")),
    (spec.IOAS_ALLOC, "iommu_ioas_alloc", words("size", "flags", "out_ioas_id")),
    (
        spec.IOAS_COPY,
        "iommu_ioas_copy",
        words("size", "flags", "dst_ioas_id", "src_ioas_id")
        | double_words("length", "dst_iova", "src_iova", at=16),
    ),
    (
        spec.IOAS_IOVA_RANGES,
        "iommu_ioas_iova_ranges",
        words("size", "ioas_id", "num_iovas", "__reserved")
        | double_words("allowed_iovas", "out_iova_alignment", at=16),
    ),
    (spec.IOVA_RANGE, "iommu_iova_range", double_words("start", "last", at=0)),
    (
        spec.IOAS_MAP,
        "iommu_ioas_map",
        words("size", "flags", "ioas_id", "__reserved")
        | double_words("user_va", "length", "iova", at=16),
    ),
    (
        spec.IOAS_MAP_FILE,
        "iommu_ioas_map_file",
        words("size", "flags", "ioas_id", "fd") | double_words("start", "length", "iova", at=16),
    ),
    (
        spec.IOAS_UNMAP,
        "iommu_ioas_unmap",
        words("size", "ioas_id") | double_words("iova", "length", at=8),
    ),
    (
        spec.HWPT_ALLOC,
        "iommu_hwpt_alloc",
        words(
            *("size", "flags", "dev_id", "pt_id", "out_hwpt_id", "__reserved"),
            *("data_type", "data_len"),
        )
        | double_words("data_uptr", at=32)
        | words("fault_id", "__reserved2", at=40),
    ),
    (
        spec.VIOMMU_ALLOC,
        "iommu_viommu_alloc",
        words(
            *("size", "flags", "type", "dev_id", "hwpt_id", "out_viommu_id"),
            *("data_len", "__reserved"),
        )
        | double_words("data_uptr", at=32),
    ),
    (
        spec.VDEVICE_ALLOC,
        "iommu_vdevice_alloc",
        words("size", "viommu_id", "dev_id", "out_vdevice_id") | double_words("virt_id", at=16),
    ),
    (
        spec.VEVENTQ_ALLOC,
        "iommu_veventq_alloc",
        words(
            *("size", "flags", "viommu_id", "type", "veventq_depth", "out_veventq_id"),
            *("out_veventq_fd", "__reserved"),
        ),
    ),
    (spec.VEVENT_HEADER, "iommufd_vevent_header", words("flags", "sequence")),
    (
        spec.HW_QUEUE_ALLOC,
        "iommu_hw_queue_alloc",
        words("size", "flags", "viommu_id", "type", "index", "out_hw_queue_id")
        | double_words("nesting_parent_iova", "length", at=24),
    ),
]
NAMES = [row[1] for row in LAYOUTS]


@pytest.mark.parametrize(("codec", "_name", "fields"), LAYOUTS, ids=NAMES)
def test_layout(codec: struct.Struct, _name: str, fields: dict[str, tuple[int, int]]) -> None:
    assert layout_of(codec, list(fields)) == fields


@pytest.mark.parametrize(("codec", "name", "fields"), LAYOUTS, ids=NAMES)
def test_layout_of_the_c_header(
    codec: struct.Struct, name: str, fields: dict[str, tuple[int, int]]
) -> None:
    found = c_layout(IOMMUFD_H, f"struct {name}", list(fields))
    if found is None:
        pytest.skip("no C compiler, or kernel headers that don't have it")
    assert found == fields
    size = f"sizeof(struct {name})"
    assert c_constants(IOMMUFD_H, [size]) == {size: codec.size}


CONSTANTS = {
    "IOMMU_DESTROY": spec.Ioctl.DESTROY,
    "IOMMU_IOAS_ALLOC": spec.Ioctl.IOAS_ALLOC,
    "IOMMU_IOAS_ALLOW_IOVAS": spec.Ioctl.IOAS_ALLOW_IOVAS,
    "IOMMU_IOAS_COPY": spec.Ioctl.IOAS_COPY,
    "IOMMU_IOAS_IOVA_RANGES": spec.Ioctl.IOAS_IOVA_RANGES,
    "IOMMU_IOAS_MAP": spec.Ioctl.IOAS_MAP,
    "IOMMU_IOAS_UNMAP": spec.Ioctl.IOAS_UNMAP,
    "IOMMU_OPTION": spec.Ioctl.OPTION,
    "IOMMU_HWPT_ALLOC": spec.Ioctl.HWPT_ALLOC,
    "IOMMU_GET_HW_INFO": spec.Ioctl.GET_HW_INFO,
    "IOMMU_IOAS_MAP_FILE": spec.Ioctl.IOAS_MAP_FILE,
    "IOMMU_VIOMMU_ALLOC": spec.Ioctl.VIOMMU_ALLOC,
    "IOMMU_VDEVICE_ALLOC": spec.Ioctl.VDEVICE_ALLOC,
    "IOMMU_VEVENTQ_ALLOC": spec.Ioctl.VEVENTQ_ALLOC,
    "IOMMU_HW_QUEUE_ALLOC": spec.Ioctl.HW_QUEUE_ALLOC,
    "IOMMU_IOAS_MAP_FIXED_IOVA": spec.IOAS_MAP_FIXED_IOVA,
    "IOMMU_IOAS_MAP_WRITEABLE": spec.IOAS_MAP_WRITEABLE,
    "IOMMU_IOAS_MAP_READABLE": spec.IOAS_MAP_READABLE,
    "IOMMU_HWPT_ALLOC_NEST_PARENT": spec.HWPT_FLAG_NEST_PARENT,
    "IOMMU_VIOMMU_TYPE_ARM_SMMUV3": spec.ViommuType.ARM_SMMUV3,
    "IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV": spec.ViommuType.TEGRA241_CMDQV,
    "IOMMU_VEVENTQ_TYPE_ARM_SMMUV3": spec.VeventqType.ARM_SMMUV3,
    "IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV": spec.VeventqType.TEGRA241_CMDQV,
    "IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV": spec.HwQueueType.TEGRA241_CMDQV,
    "IOMMU_VEVENTQ_FLAG_LOST_EVENTS": spec.VEVENTQ_FLAG_LOST_EVENTS,
}


def test_constants_of_the_c_header() -> None:
    try:
        found = c_constants(IOMMUFD_H, list(CONSTANTS))
    except AssertionError:  # it is there, but knows fewer
        found = None
    if found is None:
        pytest.skip("no C compiler, or kernel headers before Linux 6.17")
    assert found == CONSTANTS


def test_the_numbers_of_the_ioctls() -> None:
    assert {ioctl.name: ioctl.value for ioctl in spec.Ioctl} == {
        "DESTROY": 0x3B80,
        "IOAS_ALLOC": 0x3B81,
        "IOAS_ALLOW_IOVAS": 0x3B82,
        "IOAS_COPY": 0x3B83,
        "IOAS_IOVA_RANGES": 0x3B84,
        "IOAS_MAP": 0x3B85,
        "IOAS_UNMAP": 0x3B86,
        "OPTION": 0x3B87,
        "HWPT_ALLOC": 0x3B89,
        "GET_HW_INFO": 0x3B8A,
        "IOAS_MAP_FILE": 0x3B8F,
        "VIOMMU_ALLOC": 0x3B90,
        "VDEVICE_ALLOC": 0x3B91,
        "VEVENTQ_ALLOC": 0x3B93,
        "HW_QUEUE_ALLOC": 0x3B94,
    }


def test_every_structure_and_every_number_is_in_the_tables() -> None:
    listed = {id(codec) for codec, *_ in LAYOUTS}
    structures = [value for value in vars(spec).values() if isinstance(value, struct.Struct)]

    assert {id(codec) for codec in structures} == listed
    enumerated = {*spec.Ioctl, *spec.ViommuType, *spec.VeventqType, *spec.HwQueueType}
    assert {value for value in CONSTANTS.values() if not isinstance(value, spec.Ioctl)} >= {
        int(value) for value in enumerated if not isinstance(value, spec.Ioctl)
    }
    assert set(spec.Ioctl) <= set(CONSTANTS.values())
