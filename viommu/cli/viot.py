"""``viommu viot``: the ACPI table alone."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from viommu.cli.console import make_console
from viommu.cli.exit_codes import CliError, ExitCode
from viommu.cli.parameters import parsed
from viommu.vmm import Bdf, build_viot, check_topology, parse_viot

__all__ = ["viot"]

_LARGEST = 1 << 16  # output_node is a 16-bit offset


@click.command(no_args_is_help=True)
@click.option(
    "--iommu",
    metavar="BDF",
    callback=parsed(Bdf.parse),
    help="Build a table: where the virtio-iommu is, as 00:05.0.",
)
@click.option(
    "--endpoint",
    "endpoints",
    metavar="BDF",
    multiple=True,
    callback=parsed(Bdf.parse),
    help="A function behind it; repeat it for more.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table there; without it, the table is shown.",
)
@click.option(
    "--show",
    "shown",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Show a table as Linux reads it, such as /sys/firmware/acpi/tables/VIOT.",
)
def viot(
    iommu: Bdf | None, endpoints: tuple[Bdf, ...], output: Path | None, shown: Path | None
) -> int:
    """Build or read the ACPI VIOT: which PCI functions are behind which virtio-iommu.

    \b
    viommu viot --iommu 00:05.0 --endpoint 00:06.0 -o viot.aml
    qemu-system-x86_64 -acpitable file=viot.aml ...
    viommu viot --show /sys/firmware/acpi/tables/VIOT

    Exit code 1 when a guest would ignore all or part of the table shown.
    """  # noqa: D301  # \b is click's: keep these lines as they are
    if (iommu is None) == (shown is None) or (shown and (endpoints or output)):
        raise click.UsageError("give either --iommu (with --endpoint, -o) or --show")
    if iommu is not None:
        check_topology(iommu, endpoints)
        data = build_viot(iommu, endpoints)
    else:
        assert shown is not None  # noqa: S101  # checked above
        data = _read(shown)
    if output is not None:
        try:
            output.write_bytes(data)
        except OSError as error:
            raise CliError(f"{output} can't be written: {error.strerror}") from error
        return ExitCode.OK
    return _show(data)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise CliError(f"{path} can't be read: {error.strerror}") from error
    if len(data) > _LARGEST:
        raise CliError(f"{path} has more than {_LARGEST} bytes: that is no VIOT")
    return data


def _show(data: bytes) -> int:
    table = parse_viot(data)
    console = make_console()
    console.print(f"VIOT, {len(data)} bytes, {len(table.nodes)} nodes")
    nodes = Table("offset", "type", "length", "node", box=None, pad_edge=False)
    for node in table.nodes:
        nodes.add_row(str(node.offset), str(node.type), str(node.length), node.text)
    console.print(nodes)
    for bdf, endpoint in sorted(table.endpoints.items()):
        console.print(f"{bdf} is endpoint {endpoint:#x}")
    for problem in table.problems:
        console.print(f"problem: {problem}", style="bold red")
    return ExitCode.FAILURE if table.problems else ExitCode.OK
