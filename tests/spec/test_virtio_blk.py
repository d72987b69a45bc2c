from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.spec.c_header import c_layout
from viommu.spec import virtio_blk as spec
from viommu.spec._struct import sizeof

if TYPE_CHECKING:
    import struct

    from viommu.spec._struct import Struct

STRUCTURES = [
    (spec.Config, "struct virtio_blk_config", 72),
    (spec.RequestHeader, "struct virtio_blk_outhdr", 16),
    (spec.Segment, "struct virtio_blk_discard_write_zeroes", 16),
]

OFFSETS = {
    "capacity": (0, 8),
    "size_max": (8, 4),
    "seg_max": (12, 4),
    "geometry": (16, 4),
    "blk_size": (20, 4),
    "physical_block_exp": (24, 1),
    "alignment_offset": (25, 1),
    "min_io_size": (26, 2),
    "opt_io_size": (28, 4),
    "wce": (32, 1),
    "unused": (33, 1),
    "num_queues": (34, 2),
    "max_discard_sectors": (36, 4),
    "max_discard_seg": (40, 4),
    "discard_sector_alignment": (44, 4),
    "max_write_zeroes_sectors": (48, 4),
    "max_write_zeroes_seg": (52, 4),
    "write_zeroes_may_unmap": (56, 1),
    "unused1": (57, 3),
    "max_secure_erase_sectors": (60, 4),
    "max_secure_erase_seg": (64, 4),
    "secure_erase_sector_alignment": (68, 4),
}


def layout(kind: type[Struct]) -> dict[str, tuple[int, int]]:
    return {
        name: (getattr(kind, name).offset, getattr(kind, name).size) for name, *_ in kind._fields_
    }


def test_the_configuration_is_laid_out_as_in_the_standard() -> None:
    assert layout(spec.Config) == OFFSETS


@pytest.mark.parametrize(("kind", "ctype", "size"), STRUCTURES)
def test_structures_equal_the_c_header(kind: type[Struct], ctype: str, size: int) -> None:
    assert sizeof(kind) == size
    expected = layout(kind)
    actual = c_layout("linux/virtio_blk.h", ctype, list(expected))
    assert actual in (None, expected)


@pytest.mark.parametrize(
    ("codec", "kind", "names", "values"),
    [
        (spec.HEADER, spec.RequestHeader, ("type", "sector"), (13, 2**64 - 2)),
        (
            spec.SEGMENT,
            spec.Segment,
            ("sector", "num_sectors", "flags"),
            (2**63 + 5, 2**32 - 7, 1 << 31),
        ),
    ],
)
def test_the_request_path_decodes_what_ctypes_does(
    codec: struct.Struct, kind: type[Struct], names: tuple[str, ...], values: tuple[int, ...]
) -> None:
    structure = kind(**dict(zip(names, values, strict=True)))
    assert codec.size == sizeof(kind)
    assert codec.unpack(bytes(structure)) == values
