"""The VIOT's structures against the layout that Linux reads."""

from __future__ import annotations

import pytest

from viommu.spec import viot
from viommu.spec._struct import Struct, sizeof

# reference: Linux include/acpi/actbl3.h, and actbl.h for the header of every table
LAYOUT: list[tuple[type[Struct], int, dict[str, tuple[int, int]]]] = [
    (
        viot.TableHeader,
        36,
        {
            "signature": (0, 4),
            "length": (4, 4),
            "revision": (8, 1),
            "checksum": (9, 1),
            "oem_id": (10, 6),
            "oem_table_id": (16, 8),
            "oem_revision": (24, 4),
            "asl_compiler_id": (28, 4),
            "asl_compiler_revision": (32, 4),
        },
    ),
    (
        viot.ViotHeader,
        48,
        {"header": (0, 36), "node_count": (36, 2), "node_offset": (38, 2), "reserved": (40, 8)},
    ),
    (viot.NodeHeader, 4, {"type": (0, 1), "reserved": (1, 1), "length": (2, 2)}),
    (
        viot.PciRangeNode,
        24,
        {
            "header": (0, 4),
            "endpoint_start": (4, 4),
            "segment_start": (8, 2),
            "segment_end": (10, 2),
            "bdf_start": (12, 2),
            "bdf_end": (14, 2),
            "output_node": (16, 2),
            "reserved": (18, 6),
        },
    ),
    (
        viot.MmioEndpointNode,
        24,
        {
            "header": (0, 4),
            "endpoint": (4, 4),
            "base_address": (8, 8),
            "output_node": (16, 2),
            "reserved": (18, 6),
        },
    ),
    (viot.PciIommuNode, 16, {"header": (0, 4), "segment": (4, 2), "bdf": (6, 2)}),
    (viot.MmioIommuNode, 16, {"header": (0, 4), "base_address": (8, 8)}),
]


@pytest.mark.parametrize(("kind", "size", "fields"), LAYOUT, ids=lambda value: str(value)[:30])
def test_layout(kind: type[Struct], size: int, fields: dict[str, tuple[int, int]]) -> None:
    assert sizeof(kind) == size
    found = {
        name: (getattr(kind, name).offset, getattr(kind, name).size) for name, *_ in kind._fields_
    }
    assert {name: found[name] for name in fields} == fields


def test_nodes_start_behind_the_header() -> None:
    assert sizeof(viot.ViotHeader) == viot.NODES_OFFSET
