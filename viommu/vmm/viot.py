"""The VIOT: build the table for one virtio-iommu, and read any table as Linux would."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import UsageError
from viommu.spec import viot as spec
from viommu.spec._struct import sizeof
from viommu.vmm.bdf import Bdf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    AnyNode: TypeAlias = (
        spec.PciRangeNode | spec.MmioEndpointNode | spec.PciIommuNode | spec.MmioIommuNode
    )

__all__ = ["ViotNode", "ViotTable", "build_viot", "parse_viot"]

_OEM_ID = b"VIOMMU"
_OEM_TABLE_ID = b"VIOMMU"
_COMPILER_ID = b"VIOM"
_CHECKSUM_AT = 9  # TableHeader.checksum
_MAX_NODES = 0xFFFF

_IOMMUS = (spec.PciIommuNode, spec.MmioIommuNode)
_NODES: dict[int, type[AnyNode]] = {
    spec.NodeType.PCI_RANGE: spec.PciRangeNode,
    spec.NodeType.MMIO_ENDPOINT: spec.MmioEndpointNode,
    spec.NodeType.VIRTIO_IOMMU_PCI: spec.PciIommuNode,
    spec.NodeType.VIRTIO_IOMMU_MMIO: spec.MmioIommuNode,
}


class ViotNode(NamedTuple):
    """One node: where it is in the table (bytes from its start) and what it says."""

    offset: int
    type: int
    length: int
    text: str


class ViotTable(NamedTuple):
    """What :func:`parse_viot` found.

    ``endpoints`` maps the BDF of each function behind an IOMMU to its endpoint
    id; ``iommus`` are the PCI addresses of the IOMMUs. ``problems`` says, in the
    order found, what makes a guest ignore all or part of the table.
    """

    nodes: list[ViotNode]
    iommus: list[Bdf]
    endpoints: dict[Bdf, int]
    problems: list[str]


def build_viot(iommu: Bdf, endpoints: Sequence[Bdf]) -> bytes:
    """Return the VIOT that puts ``endpoints`` behind the virtio-iommu at ``iommu``.

    The endpoint id of a function is its BDF number. One node an endpoint, and
    the IOMMU's node first: Linux needs no order, a reader likes one.

    Raises:
        UsageError: There are more endpoints than the table can count.
    """
    if len(endpoints) >= _MAX_NODES:
        raise UsageError(f"{len(endpoints)} endpoints: a VIOT counts its nodes in 16 bits")
    nodes: list[AnyNode] = [
        spec.PciIommuNode(
            header=_node_header(spec.NodeType.VIRTIO_IOMMU_PCI, spec.PciIommuNode),
            bdf=iommu.number,
        )
    ]
    nodes += (
        spec.PciRangeNode(
            header=_node_header(spec.NodeType.PCI_RANGE, spec.PciRangeNode),
            endpoint_start=endpoint.number,
            bdf_start=endpoint.number,
            bdf_end=endpoint.number,
            output_node=spec.NODES_OFFSET,
        )
        for endpoint in endpoints
    )
    body = b"".join(map(bytes, nodes))
    header = spec.TableHeader(
        signature=spec.SIGNATURE,
        length=spec.NODES_OFFSET + len(body),
        revision=spec.REVISION,
        oem_id=_OEM_ID,
        oem_table_id=_OEM_TABLE_ID,
        oem_revision=1,
        asl_compiler_id=_COMPILER_ID,
        asl_compiler_revision=1,
    )
    table = bytearray(
        bytes(spec.ViotHeader(header, node_count=len(nodes), node_offset=spec.NODES_OFFSET)) + body
    )
    table[_CHECKSUM_AT] = -sum(table) & 0xFF
    return bytes(table)


def _node_header(kind: spec.NodeType, node: type[AnyNode]) -> spec.NodeHeader:
    return spec.NodeHeader(type=kind, length=sizeof(node))


def parse_viot(data: bytes) -> ViotTable:
    """Read a table with the rules of Linux's ``drivers/acpi/viot.c``; never raises.

    Linux stops at the first empty, short or overflowing node and keeps what came
    before; it skips types that it doesn't know; where ranges overlap, the last wins.
    """
    result = ViotTable([], [], {}, [])
    problems = result.problems
    if len(data) < sizeof(spec.ViotHeader):
        problems.append(f"the file has {len(data)} bytes, a VIOT header {sizeof(spec.ViotHeader)}")
        return result
    table = spec.ViotHeader.from_buffer_copy(data)
    signature, length = bytes(data[:4]), table.header.length
    if signature != spec.SIGNATURE:
        problems.append(f"the signature is {signature!r}, not {spec.SIGNATURE!r}")
        return result
    if length != len(data):
        problems.append(f"the header says {length} bytes, the file has {len(data)}")
        if not sizeof(spec.ViotHeader) <= length <= len(data):
            return result
    data = data[:length]
    if remainder := sum(data) & 0xFF:
        problems.append(f"the bytes add up to {remainder:#04x} modulo 256, not 0")
    nodes = list(_nodes(data, table, problems))
    iommus = {offset for offset, node in nodes if isinstance(node, _IOMMUS)}
    for offset, node in nodes:
        result.nodes.append(ViotNode(offset, node.header.type, node.header.length, _describe(node)))
        match node:
            case spec.PciIommuNode():
                result.iommus.append(Bdf.from_number(node.bdf))
            case spec.MmioIommuNode():
                pass
            case _ if node.output_node not in iommus:
                problems.append(
                    f"node at {offset}: no IOMMU node at its output_node {node.output_node}"
                )
            case spec.PciRangeNode():
                result.endpoints.update(_functions(node))
            case spec.MmioEndpointNode():
                pass
    for iommu in result.iommus:
        result.endpoints.pop(iommu, None)  # Linux: "not translating ourself"
    return result


def _nodes(
    data: bytes, table: spec.ViotHeader, problems: list[str]
) -> Iterator[tuple[int, AnyNode]]:
    """Yield the nodes, with their offsets, up to where Linux would stop parsing."""
    offset = table.node_offset
    for index in range(table.node_count):
        where = f"node {index} at {offset}"
        if not spec.NODES_OFFSET <= offset <= len(data) - sizeof(spec.NodeHeader):
            problems.append(f"{where}: outside the table, parsing stops")
            return
        node = spec.NodeHeader.from_buffer_copy(data, offset)
        if node.length < sizeof(spec.NodeHeader):
            problems.append(f"{where}: {node.length} bytes long, parsing stops")
            return
        if offset + node.length > len(data):
            problems.append(f"{where}: its {node.length} bytes pass the end, parsing stops")
            return
        kind = _NODES.get(node.type)
        if kind is None:
            problems.append(f"{where}: unknown type {node.type}, skipped")
        elif node.length < sizeof(kind):
            problems.append(
                f"{where}: {node.length} bytes, type {node.type} has {sizeof(kind)}, parsing stops"
            )
            return
        else:
            yield offset, kind.from_buffer_copy(data, offset)
        offset += node.length


def _functions(node: spec.PciRangeNode) -> Iterator[tuple[Bdf, int]]:
    """Yield the functions of a range that are in segment 0, with their endpoint ids."""
    if node.segment_start == 0:
        for bdf in range(node.bdf_start, node.bdf_end + 1):
            yield Bdf.from_number(bdf), bdf - node.bdf_start + node.endpoint_start


def _describe(node: AnyNode) -> str:
    match node:
        case spec.PciRangeNode():
            first, last = Bdf.from_number(node.bdf_start), Bdf.from_number(node.bdf_end)
            functions = str(first) if first == last else f"{first} to {last}"
            return (
                f"PCI range: {functions}, endpoint {node.endpoint_start:#x}, "
                f"behind the node at {node.output_node}"
            )
        case spec.MmioEndpointNode():
            return (
                f"MMIO endpoint: {node.base_address:#x}, endpoint {node.endpoint:#x}, "
                f"behind the node at {node.output_node}"
            )
        case spec.PciIommuNode():
            return f"virtio-iommu, PCI: {node.segment:04x}:{Bdf.from_number(node.bdf)}"
        case spec.MmioIommuNode():
            return f"virtio-iommu, MMIO: {node.base_address:#x}"
