"""iommufd's numbers and sizes: old headers have no iommufd.h, so this is a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from viommu.spec import iommufd as spec

if TYPE_CHECKING:
    import struct

SIZES = [
    (spec.DESTROY, 8, "iommu_destroy"),
    (spec.IOAS_ALLOC, 12, "iommu_ioas_alloc"),
    (spec.IOAS_COPY, 40, "iommu_ioas_copy"),
    (spec.IOAS_IOVA_RANGES, 32, "iommu_ioas_iova_ranges"),
    (spec.IOVA_RANGE, 16, "iommu_iova_range"),
    (spec.IOAS_MAP, 40, "iommu_ioas_map"),
    (spec.IOAS_MAP_FILE, 40, "iommu_ioas_map_file"),
    (spec.IOAS_UNMAP, 24, "iommu_ioas_unmap"),
    (spec.HWPT_ALLOC, 48, "iommu_hwpt_alloc"),
    (spec.VIOMMU_ALLOC, 40, "iommu_viommu_alloc"),
    (spec.VDEVICE_ALLOC, 24, "iommu_vdevice_alloc"),
    (spec.VEVENTQ_ALLOC, 32, "iommu_veventq_alloc"),
    (spec.HW_QUEUE_ALLOC, 40, "iommu_hw_queue_alloc"),
    (spec.VIOMMU_SELFTEST, 24, ""),
]


@pytest.mark.parametrize(("codec", "size", "name"), SIZES, ids=[row[2] for row in SIZES])
def test_size(codec: struct.Struct, size: int, name: str) -> None:
    assert codec.size == size, name


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (spec.Ioctl.DESTROY, 0x3B80),
        (spec.Ioctl.IOAS_ALLOC, 0x3B81),
        (spec.Ioctl.IOAS_ALLOW_IOVAS, 0x3B82),
        (spec.Ioctl.IOAS_COPY, 0x3B83),
        (spec.Ioctl.IOAS_IOVA_RANGES, 0x3B84),
        (spec.Ioctl.IOAS_MAP, 0x3B85),
        (spec.Ioctl.IOAS_UNMAP, 0x3B86),
        (spec.Ioctl.OPTION, 0x3B87),
        (spec.Ioctl.HWPT_ALLOC, 0x3B89),
        (spec.Ioctl.GET_HW_INFO, 0x3B8A),
        (spec.Ioctl.IOAS_MAP_FILE, 0x3B8F),
        (spec.Ioctl.VIOMMU_ALLOC, 0x3B90),
        (spec.Ioctl.VDEVICE_ALLOC, 0x3B91),
        (spec.Ioctl.VEVENTQ_ALLOC, 0x3B93),
        (spec.Ioctl.HW_QUEUE_ALLOC, 0x3B94),
        (spec.Ioctl.TEST_CMD, 0x3BA0),
    ],
)
def test_number(number: int, value: int) -> None:
    assert number == value
