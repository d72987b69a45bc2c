"""The iommufd commands against a table of numbers, offsets and flags, written out by hand.

Source: libvfio-user pull request 833, commit 304407498bfd, ``include/vfio-user.h``: no
header that is installed anywhere has them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from viommu.spec import vfio_user_iommufd as spec
from viommu.spec._struct import sizeof
from viommu.spec.vfio_user import Command

if TYPE_CHECKING:
    import struct

    from viommu.spec._struct import Struct

# Structure, format, bytes, name@offset+size of every field.
LAYOUTS: list[tuple[type[Struct], struct.Struct, int, str]] = [
    (spec.AllocIoas, spec.ALLOC_IOAS, 16, "argsz@0+4 flags@4+4 out_ioas_id@8+4 reserved@12+4"),
    (spec.DestroyIoas, spec.DESTROY_IOAS, 16, "argsz@0+4 flags@4+4 ioas_id@8+4 reserved@12+4"),
    (
        spec.IoasMap,
        spec.IOAS_MAP,
        48,
        (
            "argsz@0+4 flags@4+4 ioas_id@8+4 reserved@12+4"
            " user_va@16+8 length@24+8 iova@32+8 offset@40+8"
        ),
    ),
    (
        spec.IoasUnmap,
        spec.IOAS_UNMAP,
        32,
        "argsz@0+4 flags@4+4 ioas_id@8+4 reserved@12+4 iova@16+8 length@24+8",
    ),
    (
        spec.IoasCopy,
        spec.IOAS_COPY,
        40,
        (
            "argsz@0+4 flags@4+4 src_ioas_id@8+4 dst_ioas_id@12+4"
            " src_iova@16+8 dst_iova@24+8 length@32+8"
        ),
    ),
    (spec.Bind, spec.BIND, 16, "argsz@0+4 flags@4+4 iommufd@8+4 out_devid@12+4"),
    (spec.AttachPt, spec.ATTACH_PT, 16, "argsz@0+4 flags@4+4 pt_id@8+4 pasid@12+4"),
    (spec.DetachPt, spec.DETACH_PT, 16, "argsz@0+4 flags@4+4 pasid@8+4 reserved@12+4"),
]
NAMES = [kind.__name__ for kind, *_ in LAYOUTS]


@pytest.mark.parametrize(("kind", "codec", "size", "fields"), LAYOUTS, ids=NAMES)
def test_layout(kind: type[Struct], codec: struct.Struct, size: int, fields: str) -> None:
    found = [
        f"{name}@{getattr(kind, name).offset}+{getattr(kind, name).size}"
        for name, *_ in kind._fields_
    ]

    assert found == fields.split()
    assert sizeof(kind) == codec.size == size


@pytest.mark.parametrize(
    ("kind", "codec"), [(kind, codec) for kind, codec, *_ in LAYOUTS], ids=NAMES
)
def test_decoding_equals_the_structure(kind: type[Struct], codec: struct.Struct) -> None:
    random_bytes = random.Random(codec.size).randbytes(codec.size)
    structure = kind.from_buffer_copy(random_bytes)
    values = tuple(getattr(structure, name) for name, *_ in kind._fields_)

    assert codec.unpack(random_bytes) == values
    assert codec.pack(*values) == random_bytes


def test_commands_follow_those_of_the_base_protocol() -> None:
    numbers = {command.name: command.value for command in spec.IommufdCommand}

    assert numbers == {
        "ALLOC_IOAS": 19,
        "DESTROY_IOAS": 20,
        "IOAS_MAP": 21,
        "IOAS_UNMAP": 22,
        "IOAS_COPY": 23,
        "BIND": 24,
        "ATTACH_PT": 25,
        "DETACH_PT": 26,
    }
    assert min(spec.IommufdCommand) == max(Command) + 1


def test_flags() -> None:
    assert (spec.MAP_F_WRITEABLE, spec.MAP_F_READABLE) == (1, 2)
    assert (spec.IOAS_UNMAP_F_ALL, spec.ATTACH_PT_F_PASID, spec.DETACH_PT_F_PASID) == (1, 1, 1)


def test_the_flag_of_our_own_is_none_of_upstream_s() -> None:
    assert spec.MAP_F_FIXED_IOVA == 1 << 31
    assert not spec.MAP_F_FIXED_IOVA & (spec.MAP_F_WRITEABLE | spec.MAP_F_READABLE)
