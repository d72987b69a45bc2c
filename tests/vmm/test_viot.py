"""The VIOT against a table written out by hand, and the reader against Linux's rules."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from viommu.errors import UsageError
from viommu.vmm.bdf import Bdf
from viommu.vmm.viot import build_viot, parse_viot

IOMMU = Bdf(0, 5, 0)
EDU = Bdf(0, 6, 0)
BLK = Bdf(0, 7, 0)


def pci_range(first: int, last: int, endpoint: int, output: int = 48, segment: int = 0) -> bytes:
    return struct.pack("<BBHIHHHHH6x", 1, 0, 24, endpoint, segment, segment, first, last, output)


def pci_iommu(bdf: int, segment: int = 0) -> bytes:
    return struct.pack("<BBHHH8x", 3, 0, 16, segment, bdf)


def table(*nodes: bytes, count: int | None = None, offset: int = 48, length: int = 0) -> bytes:
    body = b"".join(nodes)
    data = bytearray(
        struct.pack(
            "<4sIBB6s8sI4sIHH8x",
            b"VIOT",
            length or 48 + len(body),
            0,
            0,
            b"VIOMMU",
            b"VIOMMU",
            1,
            b"VIOM",
            1,
            len(nodes) if count is None else count,
            offset,
        )
        + body
    )
    data[9] = (256 - sum(data) % 256) % 256
    return bytes(data)


def test_bytes_of_the_table() -> None:
    expected = table(pci_iommu(0x28), pci_range(0x30, 0x30, 0x30), pci_range(0x38, 0x38, 0x38))

    assert build_viot(IOMMU, [EDU, BLK]) == expected
    assert len(expected) == 48 + 16 + 24 + 24
    assert sum(expected) % 256 == 0


def test_no_endpoint_is_a_table_too() -> None:
    assert build_viot(IOMMU, []) == table(pci_iommu(0x28))


def test_more_endpoints_than_can_be_counted() -> None:
    with pytest.raises(UsageError, match="65535 endpoints"):
        build_viot(IOMMU, [EDU] * 65535)


def test_what_is_built_is_read_back() -> None:
    found = parse_viot(build_viot(IOMMU, [EDU, BLK]))

    assert found.problems == []
    assert found.iommus == [IOMMU]
    assert found.endpoints == {EDU: 0x30, BLK: 0x38}
    assert [(node.offset, node.type, node.length) for node in found.nodes] == [
        (48, 3, 16),
        (64, 1, 24),
        (88, 1, 24),
    ]


@given(
    st.lists(st.integers(0, 0xFF), unique=True, min_size=1, max_size=40).map(
        lambda numbers: [Bdf.from_number(number) for number in numbers]
    )
)
def test_every_endpoint_gets_its_number(functions: list[Bdf]) -> None:
    iommu, *endpoints = functions

    found = parse_viot(build_viot(iommu, endpoints))

    assert found.problems == []
    assert found.endpoints == {endpoint: endpoint.number for endpoint in endpoints}


def test_a_range_counts_from_its_start_and_leaves_the_iommu_out() -> None:
    """QEMU's own table: one range for the bus, the IOMMU's node in front."""
    found = parse_viot(table(pci_iommu(0x28), pci_range(0x20, 0x30, 0x100)))

    assert found.endpoints[Bdf(0, 4, 0)] == 0x100
    assert found.endpoints[EDU] == 0x110
    assert IOMMU not in found.endpoints
    assert len(found.endpoints) == 0x10


def test_the_last_of_overlapping_ranges_wins() -> None:
    found = parse_viot(
        table(pci_iommu(0x28), pci_range(0x30, 0x30, 1), pci_range(0x30, 0x30, 2)),
    )

    assert found.endpoints == {EDU: 2}


def test_other_nodes_are_described() -> None:
    mmio_iommu = struct.pack("<BBH4xQ", 4, 0, 16, 0xFEDC0000)
    mmio_endpoint = struct.pack("<BBHIQH6x", 2, 0, 24, 7, 0xD0000000, 48)

    found = parse_viot(table(mmio_iommu, mmio_endpoint))

    assert found.problems == []
    assert [node.text for node in found.nodes] == [
        "virtio-iommu, MMIO: 0xfedc0000",
        "MMIO endpoint: 0xd0000000, endpoint 0x7, behind the node at 48",
    ]
    assert found.endpoints == {}


EDU_NODE = pci_range(0x30, 0x30, 0x30)


@pytest.mark.parametrize(
    ("data", "message", "endpoints"),
    [
        (b"VIOT", "the file has 4 bytes", {}),
        (b"APIC" + build_viot(IOMMU, [EDU])[4:], "signature is b'APIC'", {}),
        (build_viot(IOMMU, [EDU])[:-1], "the header says 88 bytes, the file has 87", {}),
        (build_viot(IOMMU, [EDU]) + b"\0", "the header says 88 bytes, the file has 89", {EDU: 48}),
        (table(length=47), "the header says 47 bytes", {}),
        (
            table(pci_iommu(0x28), EDU_NODE[:-1] + b"\1", count=1)[:-1] + b"\2",
            "add up to 0x01",
            {},
        ),
        (
            table(pci_iommu(0x28), EDU_NODE, b"\1\0\0\0" + bytes(20)),
            "node 2 at 88: 0 bytes long, parsing stops",
            {EDU: 48},
        ),
        (
            table(pci_iommu(0x28), EDU_NODE, b"\1\0\xff\0" + bytes(20)),
            "node 2 at 88: its 255 bytes pass the end",
            {EDU: 48},
        ),
        (
            table(pci_iommu(0x28), EDU_NODE, b"\1\0\x14\0" + bytes(16)),
            "node 2 at 88: 20 bytes, type 1 has 24, parsing stops",
            {EDU: 48},
        ),
        (
            table(pci_iommu(0x28), b"\x09\0\x08\0" + bytes(4), EDU_NODE),
            "node 1 at 64: unknown type 9, skipped",
            {EDU: 48},
        ),
        (
            table(pci_iommu(0x28), EDU_NODE, count=3),
            "node 2 at 88: outside the table",
            {EDU: 48},
        ),
        (table(pci_iommu(0x28), EDU_NODE, offset=40), "node 0 at 40: outside the table", {}),
        (
            table(pci_iommu(0x28), pci_range(0x30, 0x30, 48, output=64)),
            "node at 64: no IOMMU node at its output_node 64",
            {},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_linux_would_ignore(data: bytes, message: str, endpoints: dict[Bdf, int]) -> None:
    found = parse_viot(data)

    assert any(message in problem for problem in found.problems), found.problems
    assert found.endpoints == endpoints


def test_functions_of_other_segments_are_not_ours() -> None:
    found = parse_viot(table(pci_iommu(0x28), pci_range(0x30, 0x30, 0x30, segment=1)))

    assert found.endpoints == {}


@given(st.binary(max_size=200) | st.binary(max_size=150).map(lambda body: table(body, count=9)))
@example(b"")
def test_no_bytes_raise(data: bytes) -> None:
    found = parse_viot(data)

    assert found.nodes or found.problems or data[:4] == b"VIOT"
