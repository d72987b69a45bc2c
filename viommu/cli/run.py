"""``viommu run``: a server and a QEMU that ends when its guest does."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from viommu.cli.child import Child, terminal_kept
from viommu.cli.exit_codes import ExitCode
from viommu.cli.parameters import parse_size, parsed
from viommu.cli.serving import ServeOptions, endpoint_help, machine_options, report, serving
from viommu.cli.signals import on_stop_signals
from viommu.loop import Loop
from viommu.vmm import find_qemu, probe_qemu

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["guest_arguments", "run"]

_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_CONSOLE: Final = "console=ttyS0"


@click.command(epilog=endpoint_help())
@click.option("--kernel", metavar="FILE", type=_FILE, required=True, help="The guest's kernel.")
@click.option("--initrd", metavar="FILE", type=_FILE, help="Its initial file system.")
@click.option(
    "--append",
    metavar="TEXT",
    default="",
    help=f"Its command line; {_CONSOLE} is added unless it names a console.",
)
@click.option(
    "--mem",
    "memory",
    metavar="SIZE",
    default="512M",
    show_default=True,
    callback=parsed(parse_size),
    help="Guest memory, shared with the server.",
)
@click.option(
    "--smp", type=click.IntRange(1, 255), default=1, show_default=True, help="Virtual CPUs."
)
@click.option(
    "--accel",
    metavar="NAME",
    default="tcg",
    show_default=True,
    help="QEMU's accelerator; kvm is used only when it is asked for here.",
)
@click.option(
    "--qemu",
    metavar="PROGRAM",
    help="The QEMU to run, or a script that does; default: $VIOMMU_QEMU, then PATH.",
)
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where sockets and files go while it runs; default: a new temporary directory.",
)
@machine_options
@click.argument("qemu_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- QEMU ARGS]")
def run(
    *,
    directory: Path | None,
    memory: int,
    qemu: str | None,
    kernel: Path,
    initrd: Path | None,
    append: str,
    smp: int,
    accel: str,
    qemu_arguments: tuple[str, ...],
    **machine: Any,
) -> int:
    """Serve a virtio-iommu, and run QEMU on it until the guest ends.

    \b
    viommu run --kernel vmlinuz --initrd initrd.img \\
        --endpoint 00:06.0=edu --endpoint 00:07.0=blk,path=disk.img \\
        -- -device virtio-rng-pci

    The guest's serial console is this terminal (Ctrl-A X ends QEMU). QEMU gets no
    default devices. Its exit code is passed on: 0 when the guest shut down, 128
    and the signal's number when a signal ended it.
    """  # noqa: D301  # \b is click's: keep these lines as they are
    binary = probe_qemu(find_qemu(qemu))
    binary.require()
    with (
        tempfile.TemporaryDirectory(prefix="viommu-") as temporary,
        contextlib.closing(Loop()) as loop,
    ):
        program = _Program(loop)
        options = ServeOptions.make(directory or Path(temporary, "run"), memory, machine)
        with on_stop_signals(loop, lambda _: program.stop()), serving(loop, options) as server:
            report(server, err=True)
            click.echo(f"QEMU {binary.version_text}: {binary.path}, accelerator {accel}", err=True)
            code = program.run(
                [
                    str(binary.path),
                    *server.qemu_arguments,
                    *guest_arguments(kernel, initrd, append, smp=smp, accel=accel),
                    *qemu_arguments,
                ]
            )
    if code:
        click.echo(f"viommu: QEMU ended with exit code {code}", err=True)
    return code


def guest_arguments(
    kernel: Path, initrd: Path | None, append: str, *, smp: int, accel: str
) -> list[str]:
    """Return the QEMU arguments for a guest that is not the server's business."""
    if "console=" not in append:
        append = f"{append} {_CONSOLE}".strip()
    arguments = ["-accel", accel, "-smp", str(smp), "-no-user-config", "-nodefaults"]
    arguments += ["-display", "none", "-serial", "mon:stdio"]
    arguments += ["-kernel", str(kernel)]
    if initrd is not None:
        arguments += ["-initrd", str(initrd)]
    return [*arguments, "-append", append]


class _Program:
    """A program that runs as long as the loop does."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._child: Child | None = None
        self._code: int = ExitCode.FAILURE

    def run(self, command: Sequence[str]) -> int:
        """Run ``command`` and the loop until it ends; return its exit code."""
        with terminal_kept():
            self._child = Child(self._loop, command, self._ended)
            try:
                self._loop.run()
            finally:
                self._child.close()
        return self._code

    def stop(self) -> None:
        """Ask the program to end; signals come from the loop, so it has started."""
        if self._child is not None:
            self._child.stop()

    def _ended(self, code: int) -> None:
        self._code = code
        self._loop.stop()
