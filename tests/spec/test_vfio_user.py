"""vfio-user's messages against a table, the C header they come from, and their formats."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.spec.c_header import c_constants, c_layout
from viommu.spec import vfio, vfio_host, vfio_user
from viommu.spec._struct import sizeof

if TYPE_CHECKING:
    import struct

    from viommu.spec._struct import Struct

Layout = dict[str, tuple[int, int]]

# Source: QEMU, docs/interop/vfio-user.rst
LAYOUTS: list[tuple[type[Struct], struct.Struct, Layout]] = [
    (
        vfio_user.Header,
        vfio_user.HEADER,
        {"id": (0, 2), "command": (2, 2), "size": (4, 4), "flags": (8, 4), "error": (12, 4)},
    ),
    (vfio_user.Version, vfio_user.VERSION, {"major": (0, 2), "minor": (2, 2)}),
    (
        vfio_user.DmaMap,
        vfio_user.DMA_MAP,
        {
            "argsz": (0, 4),
            "flags": (4, 4),
            "offset": (8, 8),
            "address": (16, 8),
            "size": (24, 8),
        },
    ),
    (
        vfio_user.DmaUnmap,
        vfio_user.DMA_UNMAP,
        {"argsz": (0, 4), "flags": (4, 4), "address": (8, 8), "size": (16, 8)},
    ),
    (
        vfio_user.DeviceInfo,
        vfio_user.DEVICE_INFO,
        {"argsz": (0, 4), "flags": (4, 4), "num_regions": (8, 4), "num_irqs": (12, 4)},
    ),
    (
        vfio_user.RegionIoFds,
        vfio_user.REGION_IO_FDS,
        {"argsz": (0, 4), "flags": (4, 4), "index": (8, 4), "count": (12, 4)},
    ),
    (
        vfio_user.RegionAccess,
        vfio_user.REGION_ACCESS,
        {"offset": (0, 8), "region": (8, 4), "count": (12, 4)},
    ),
    (
        vfio_user.SubRegion,
        vfio_user.SUB_REGION,
        {
            "offset": (0, 8),
            "size": (8, 8),
            "fd_index": (16, 4),
            "type": (20, 4),
            "flags": (24, 4),
            "reserved": (28, 4),
            "data": (32, 8),
        },
    ),
    (
        vfio_user.ShadowSubRegion,
        vfio_user.SHADOW_SUB_REGION,
        {
            "offset": (0, 8),
            "size": (8, 8),
            "fd_index": (16, 4),
            "type": (20, 4),
            "flags": (24, 4),
            "shadow_fd_index": (28, 4),
            "shadow_offset": (32, 8),
            "data": (40, 8),
        },
    ),
    (
        vfio_user.MultiWrite,
        vfio_user.MULTI_WRITE,
        {"offset": (0, 8), "region": (8, 4), "count": (12, 4), "data": (16, 8)},
    ),
    (vfio_host.DeviceFeature, vfio_user.DEVICE_FEATURE, {"argsz": (0, 4), "flags": (4, 4)}),
    (vfio_user.MigData, vfio_user.MIG_DATA, {"argsz": (0, 4), "size": (4, 4)}),
    (vfio_user.DmaAccess, vfio_user.DMA_ACCESS, {"address": (0, 8), "count": (8, 8)}),
    (
        vfio.RegionInfo,
        vfio.REGION_INFO,
        {
            "argsz": (0, 4),
            "flags": (4, 4),
            "index": (8, 4),
            "cap_offset": (12, 4),
            "size": (16, 8),
            "offset": (24, 8),
        },
    ),
    (vfio.CapHeader, vfio.CAP_HEADER, {"id": (0, 2), "version": (2, 2), "next": (4, 4)}),
    (
        vfio.SparseMmap,
        vfio.SPARSE_MMAP,
        {"header": (0, 8), "nr_areas": (8, 4), "reserved": (12, 4)},
    ),
    (vfio.SparseMmapArea, vfio.SPARSE_MMAP_AREA, {"offset": (0, 8), "size": (8, 8)}),
    (
        vfio.IrqInfo,
        vfio.IRQ_INFO,
        {"argsz": (0, 4), "flags": (4, 4), "index": (8, 4), "count": (12, 4)},
    ),
    (
        vfio.IrqSet,
        vfio.IRQ_SET,
        {
            "argsz": (0, 4),
            "flags": (4, 4),
            "index": (8, 4),
            "start": (12, 4),
            "count": (16, 4),
        },
    ),
]

C_TYPES = [
    (vfio.RegionInfo, "struct vfio_region_info"),
    (vfio.CapHeader, "struct vfio_info_cap_header"),
    (vfio.SparseMmap, "struct vfio_region_info_cap_sparse_mmap"),
    (vfio.SparseMmapArea, "struct vfio_region_sparse_mmap_area"),
    (vfio.IrqInfo, "struct vfio_irq_info"),
    (vfio.IrqSet, "struct vfio_irq_set"),
]


def layout_of(kind: type[Struct]) -> Layout:
    return {
        name: (getattr(kind, name).offset, getattr(kind, name).size) for name, *_ in kind._fields_
    }


@pytest.mark.parametrize(("kind", "codec", "fields"), LAYOUTS, ids=lambda v: str(v)[:40])
def test_layout(kind: type[Struct], codec: struct.Struct, fields: Layout) -> None:
    assert layout_of(kind) == fields
    assert sizeof(kind) == codec.size == sum(size for _, size in fields.values())


@pytest.mark.parametrize(("kind", "ctype"), C_TYPES)
def test_what_comes_from_the_kernel_equals_its_header(kind: type[Struct], ctype: str) -> None:
    expected = layout_of(kind)
    assert c_layout("linux/vfio.h", ctype, list(expected)) in (None, expected)


def test_the_device_information_begins_as_the_kernel_s() -> None:
    expected = layout_of(vfio_user.DeviceInfo)
    renamed = {name: expected[name] for name in ("argsz", "flags", "num_regions", "num_irqs")}
    assert c_layout("linux/vfio.h", "struct vfio_device_info", list(renamed)) in (None, renamed)


def test_constants_equal_the_kernel_s_header() -> None:
    names = [
        name
        for name in vfio.__all__
        if isinstance(getattr(vfio, name), int) and not name.endswith("SPARSE_MMAP_VERSION")
    ]
    assert len(names) > 25
    expected = {f"VFIO_{name}": getattr(vfio, name) for name in names}
    # A count of BARs is no constant of the header; they end where the ROM begins.
    expected["VFIO_PCI_ROM_REGION_INDEX"] = expected.pop("VFIO_PCI_NUM_BARS")
    assert c_constants("linux/vfio.h", list(expected)) in (None, expected)


@pytest.mark.parametrize(
    ("kind", "codec"),
    [(kind, codec) for kind, codec, _ in LAYOUTS if kind is not vfio.SparseMmap],
    ids=lambda v: str(v)[:40],
)
def test_decoding_equals_the_structure(kind: type[Struct], codec: struct.Struct) -> None:
    random_bytes = random.Random(codec.size).randbytes(codec.size)
    structure = kind.from_buffer_copy(random_bytes)
    values = tuple(getattr(structure, name) for name, *_ in kind._fields_)
    assert codec.unpack(random_bytes) == values
    assert codec.pack(*values) == random_bytes


def test_sizes_that_peers_rely_on() -> None:
    assert vfio_user.HEADER_SIZE == 16
    assert vfio_user.MAX_MESSAGE == 1024 * 1024 + 32
