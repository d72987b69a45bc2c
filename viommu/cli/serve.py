"""``viommu serve``: a server for a VMM that somebody else starts."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from viommu.cli.parameters import parse_size, parsed
from viommu.cli.serving import ServeOptions, endpoint_help, machine_options, report, serving
from viommu.cli.signals import on_stop_signals
from viommu.loop import Loop

__all__ = ["serve"]


@click.command(epilog=endpoint_help())
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where sockets and files go; made when it isn't there.",
)
@click.option(
    "--mem",
    "memory",
    metavar="SIZE",
    callback=parsed(parse_size),
    help="Put guest memory of this size into DIR/qemu.args, shared with the server, as 512M.",
)
@machine_options
def serve(*, directory: Path, memory: int | None, **machine: Any) -> None:
    """Serve a virtio-iommu and the endpoints behind it, each on a socket in DIR.

    \b
    viommu serve --dir /tmp/v --mem 512M --iommu 00:05.0 \\
        --endpoint 00:06.0=edu --endpoint 00:07.0=blk,path=disk.img
    mapfile -t args < /tmp/v/qemu.args
    qemu-system-x86_64 "${args[@]}" -kernel vmlinuz -initrd initrd.img \\
        -append console=ttyS0 -nographic

    DIR/qemu.args has one argument a line. What was chosen is printed, and `ready`
    as the last line once QEMU can be started. SIGTERM and SIGINT end the server
    and remove what it made; QEMU may come, go and come again before that.
    """  # noqa: D301  # \b is click's: keep these lines as they are
    options = ServeOptions.make(directory, memory, machine)
    with (
        contextlib.closing(Loop()) as loop,
        on_stop_signals(loop, lambda _: loop.stop()),
        serving(loop, options) as server,
    ):
        report(server)
        click.echo("ready")
        sys.stdout.flush()
        loop.run()
