"""The kernel's VFIO numbers and structures against a table and the C header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.spec.c_header import c_constants, c_layout
from viommu.spec import vfio_host as spec
from viommu.spec._struct import Struct, sizeof

if TYPE_CHECKING:
    import struct

VFIO_H = "linux/vfio.h"

# structure, its C name, fields as the kernel has them, the format that decodes it
TABLE: list[tuple[type[Struct], str, dict[str, tuple[int, int]], struct.Struct | None]] = [
    (
        spec.GroupStatus,
        "struct vfio_group_status",
        {"argsz": (0, 4), "flags": (4, 4)},
        spec.GROUP_STATUS,
    ),
    (
        spec.DeviceInfo,
        "struct vfio_device_info",
        {
            "argsz": (0, 4),
            "flags": (4, 4),
            "num_regions": (8, 4),
            "num_irqs": (12, 4),
            "cap_offset": (16, 4),
            "pad": (20, 4),
        },
        spec.DEVICE_INFO,
    ),
    (
        spec.Type1Info,
        "struct vfio_iommu_type1_info",
        {
            "argsz": (0, 4),
            "flags": (4, 4),
            "iova_pgsizes": (8, 8),
            "cap_offset": (16, 4),
            "pad": (20, 4),
        },
        spec.TYPE1_INFO,
    ),
    (
        spec.IovaRange,
        "struct vfio_iova_range",
        {"start": (0, 8), "end": (8, 8)},
        spec.IOVA_RANGE,
    ),
    (
        spec.Type1DmaMap,
        "struct vfio_iommu_type1_dma_map",
        {"argsz": (0, 4), "flags": (4, 4), "vaddr": (8, 8), "iova": (16, 8), "size": (24, 8)},
        spec.DMA_MAP,
    ),
    (
        spec.Type1DmaUnmap,
        "struct vfio_iommu_type1_dma_unmap",
        {"argsz": (0, 4), "flags": (4, 4), "iova": (8, 8), "size": (16, 8)},
        spec.DMA_UNMAP,
    ),
    (
        spec.BindIommufd,
        "struct vfio_device_bind_iommufd",
        {"argsz": (0, 4), "flags": (4, 4), "iommufd": (8, 4), "out_devid": (12, 4)},
        spec.BIND_IOMMUFD,
    ),
    (
        spec.AttachIommufdPt,
        "struct vfio_device_attach_iommufd_pt",
        {"argsz": (0, 4), "flags": (4, 4), "pt_id": (8, 4)},
        spec.ATTACH_IOMMUFD_PT,
    ),
    (
        spec.DetachIommufdPt,
        "struct vfio_device_detach_iommufd_pt",
        {"argsz": (0, 4), "flags": (4, 4)},
        spec.DETACH_IOMMUFD_PT,
    ),
    (
        spec.DeviceFeature,
        "struct vfio_device_feature",
        {"argsz": (0, 4), "flags": (4, 4)},
        None,
    ),
    (
        spec.DeviceFeatureDmaBuf,
        "struct vfio_device_feature_dma_buf",
        {"region_index": (0, 4), "open_flags": (4, 4), "flags": (8, 4), "nr_ranges": (12, 4)},
        None,
    ),
]
IDS = [row[1].removeprefix("struct ") for row in TABLE]

# Fields and structures that old kernel headers lack.
NEWER = {"pad"}
NEWER_TYPES = {spec.BindIommufd, spec.AttachIommufdPt, spec.DetachIommufdPt}
NEWER_TYPES |= {spec.DeviceFeatureDmaBuf}


@pytest.mark.parametrize(("kind", "_name", "fields", "codec"), TABLE, ids=IDS)
def test_layout(
    kind: type[Struct],
    _name: str,
    fields: dict[str, tuple[int, int]],
    codec: struct.Struct | None,
) -> None:
    declared: Any = kind
    got = {
        name: (getattr(declared, name).offset, getattr(declared, name).size)
        for name, _ in declared._fields_
    }
    assert got == fields
    assert codec is None or codec.size == sizeof(kind)


@pytest.mark.parametrize(("kind", "_name", "fields", "codec"), TABLE, ids=IDS)
def test_the_format_decodes_every_field(
    kind: type[Struct],
    _name: str,
    fields: dict[str, tuple[int, int]],
    codec: struct.Struct | None,
) -> None:
    if codec is None:
        return
    raw = bytes(range(sizeof(kind)))
    decoded = kind.from_buffer_copy(raw)

    assert codec.unpack(raw) == tuple(getattr(decoded, name) for name in fields)


@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [row[:3] for row in TABLE if row[0] not in NEWER_TYPES],
    ids=[name for row, name in zip(TABLE, IDS, strict=True) if row[0] not in NEWER_TYPES],
)
def test_layout_of_the_c_header(
    kind: type[Struct], name: str, fields: dict[str, tuple[int, int]]
) -> None:
    found = c_layout(VFIO_H, name, [field for field in fields if field not in NEWER])
    if found is None:
        pytest.skip("no C compiler, or no kernel headers")
    assert found == {name: where for name, where in fields.items() if name not in NEWER}


CONSTANTS = {
    "VFIO_API_VERSION": spec.API_VERSION,
    "VFIO_GET_API_VERSION": spec.Ioctl.GET_API_VERSION,
    "VFIO_CHECK_EXTENSION": spec.Ioctl.CHECK_EXTENSION,
    "VFIO_SET_IOMMU": spec.Ioctl.SET_IOMMU,
    "VFIO_GROUP_GET_STATUS": spec.Ioctl.GROUP_GET_STATUS,
    "VFIO_GROUP_SET_CONTAINER": spec.Ioctl.GROUP_SET_CONTAINER,
    "VFIO_GROUP_UNSET_CONTAINER": spec.Ioctl.GROUP_UNSET_CONTAINER,
    "VFIO_GROUP_GET_DEVICE_FD": spec.Ioctl.GROUP_GET_DEVICE_FD,
    "VFIO_DEVICE_GET_INFO": spec.Ioctl.DEVICE_GET_INFO,
    "VFIO_DEVICE_GET_REGION_INFO": spec.Ioctl.DEVICE_GET_REGION_INFO,
    "VFIO_DEVICE_GET_IRQ_INFO": spec.Ioctl.DEVICE_GET_IRQ_INFO,
    "VFIO_DEVICE_SET_IRQS": spec.Ioctl.DEVICE_SET_IRQS,
    "VFIO_DEVICE_RESET": spec.Ioctl.DEVICE_RESET,
    "VFIO_DEVICE_FEATURE": spec.Ioctl.DEVICE_FEATURE,
    "VFIO_IOMMU_GET_INFO": spec.Ioctl.IOMMU_GET_INFO,
    "VFIO_IOMMU_MAP_DMA": spec.Ioctl.IOMMU_MAP_DMA,
    "VFIO_IOMMU_UNMAP_DMA": spec.Ioctl.IOMMU_UNMAP_DMA,
    "VFIO_TYPE1_IOMMU": spec.Extension.TYPE1,
    "VFIO_TYPE1v2_IOMMU": spec.Extension.TYPE1V2,
    "VFIO_DMA_CC_IOMMU": spec.Extension.DMA_CC,
    "VFIO_NOIOMMU_IOMMU": spec.Extension.NOIOMMU,
    "VFIO_UNMAP_ALL": spec.Extension.UNMAP_ALL,
    "VFIO_GROUP_FLAGS_VIABLE": spec.GROUP_FLAGS_VIABLE,
    "VFIO_GROUP_FLAGS_CONTAINER_SET": spec.GROUP_FLAGS_CONTAINER_SET,
    "VFIO_IOMMU_INFO_PGSIZES": spec.TYPE1_INFO_PGSIZES,
    "VFIO_IOMMU_INFO_CAPS": spec.TYPE1_INFO_CAPS,
    "VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE": spec.CAP_IOVA_RANGE,
    "VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION": spec.CAP_MIGRATION,
    "VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL": spec.CAP_DMA_AVAIL,
    "VFIO_DMA_MAP_FLAG_READ": spec.DMA_MAP_FLAG_READ,
    "VFIO_DMA_MAP_FLAG_WRITE": spec.DMA_MAP_FLAG_WRITE,
    "VFIO_DMA_UNMAP_FLAG_ALL": spec.DMA_UNMAP_FLAG_ALL,
    "VFIO_DEVICE_FEATURE_GET": spec.DEVICE_FEATURE_GET,
    "VFIO_DEVICE_FEATURE_SET": spec.DEVICE_FEATURE_SET,
    "VFIO_DEVICE_FEATURE_PROBE": spec.DEVICE_FEATURE_PROBE,
    "sizeof(struct vfio_iommu_type1_info_cap_iova_range)": spec.IOVA_RANGES.size,
    "sizeof(struct vfio_iommu_type1_info_dma_avail)": spec.DMA_AVAIL.size,
}


def test_constants_of_the_c_header() -> None:
    found = c_constants(VFIO_H, list(CONSTANTS))
    if found is None:
        pytest.skip("no C compiler, or no kernel headers")
    assert found == CONSTANTS


def test_numbers_that_old_headers_lack() -> None:
    numbers = (
        spec.Ioctl.DEVICE_BIND_IOMMUFD,
        spec.Ioctl.DEVICE_ATTACH_IOMMUFD_PT,
        spec.Ioctl.DEVICE_DETACH_IOMMUFD_PT,
    )
    assert numbers == (0x3B76, 0x3B77, 0x3B78)
    assert spec.DMA_BUF.size == 8 + 16 + 16


def test_every_structure_is_in_the_table() -> None:
    listed = {row[0] for row in TABLE}
    for value in vars(spec).values():
        if isinstance(value, type) and issubclass(value, Struct) and value is not Struct:
            assert value in listed
