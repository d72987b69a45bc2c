"""``viommu device``: one endpoint as a device of its own, without an IOMMU."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from viommu.cli.signals import on_stop_signals
from viommu.control import ControlServer
from viommu.endpoints.registry import KINDS
from viommu.endpoints.standalone import StandaloneDevice
from viommu.loop import Loop
from viommu.vmm import MEMORY_REMEDY, device_argument

__all__ = ["device"]


def _kinds() -> str:
    """Return the kinds that can stand alone and their options, for the end of the help."""
    lines = ["\b", "Kinds of devices:"]
    for name, kind in KINDS.items():
        if kind.make is not None:
            lines.append(f"  {name}: {kind.help}")
            lines += (f"      {option}=...  {what.help}" for option, what in kind.options.items())
    return "\n".join(lines)


@click.command(epilog=_kinds())
@click.argument("description", metavar="KIND[,OPTION=VALUE...]")
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    required=True,
    help="Where it listens; removed at the end.",
)
@click.option(
    "--control",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A socket for `viommu inspect PATH`: what its client has mapped; removed at the end.",
)
def device(*, description: str, path: Path, control: Path | None) -> None:
    """Serve one device on a vfio-user socket, to one client after the other.

    \b
    viommu device blk,path=disk.img --socket /tmp/disk.sock
    qemu-system-x86_64 -machine q35,memory-backend=mem -m 512M \\
        -object memory-backend-memfd,id=mem,size=512M,share=on \\
        -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/disk.sock"}}' ...

    There is no IOMMU: the device reaches what its client maps. The same device
    behind one is `viommu serve --endpoint BDF=KIND[,OPTION=VALUE...]`. A KIND of
    your own is `package.module:NAME`. What is served is printed, and `ready` as the
    last line. SIGTERM and SIGINT end it.
    """  # noqa: D301  # \b is click's: keep these lines as they are
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() follows links
    with (
        contextlib.closing(Loop()) as loop,
        on_stop_signals(loop, lambda _: loop.stop()),
        contextlib.closing(StandaloneDevice(loop, description, absolute)) as standalone,
        contextlib.ExitStack() as closing,
    ):
        if control is not None:
            server = ControlServer(loop, control, standalone.snapshot)
            closing.callback(server.close)
        _report(description, absolute, control)
        click.echo("ready")
        sys.stdout.flush()
        loop.run()


def _report(description: str, path: Path, control: Path | None) -> None:
    """Print what is served, and how it is used."""
    lines = [
        ("device", description),
        ("socket", f"{path}, for one vfio-user client at a time"),
        ("DMA", "what the client maps, where it maps it: no IOMMU"),
        ("memory", "shared by file descriptor; or read and written by messages, if the client"),
        ("", "serves them at any time"),
        ("QEMU", f"-device '{device_argument(path)}'"),
        ("", MEMORY_REMEDY),
    ]
    if control is not None:
        lines.append(("state", f"viommu inspect {control}"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")
