"""What ``serve`` and ``run`` share: their options, and a server with its files in a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from viommu.cli.directory import QEMU_ARGUMENTS, VIOT, ServerDirectory
from viommu.cli.exit_codes import CliError, CliUsageError
from viommu.cli.parameters import (
    EndpointArgument,
    parse_endpoint,
    parse_limit,
    parse_page_sizes,
    parsed,
)
from viommu.control import SOCKET_NAME, ControlServer
from viommu.endpoints.opening import has_function
from viommu.endpoints.options import HOLD_OPTIONS, PROCESS_OPTIONS
from viommu.endpoints.registry import endpoint_kinds
from viommu.machine import Machine, MachineOptions
from viommu.vmm import (
    MEMORY_REMEDY,
    Bdf,
    build_viot,
    format_size,
    qemu_arguments,
    socket_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from viommu.endpoints.registry import Option
    from viommu.loop import Loop

__all__ = ["ServeOptions", "Serving", "endpoint_help", "machine_options", "report", "serving"]

_Command = TypeVar("_Command", bound="Callable[..., Any]")


def machine_options(command: _Command) -> _Command:
    """Give a command the options that say what is served; see :meth:`ServeOptions.make`."""
    options = (
        click.option(
            "--iommu",
            metavar="BDF",
            default="00:05.0",
            show_default=True,
            callback=parsed(Bdf.parse),
            help="Where the virtio-iommu is on the guest's PCI bus.",
        ),
        click.option(
            "--endpoint",
            "endpoints",
            metavar="BDF=KIND[,OPTION=VALUE...]",
            multiple=True,
            callback=parsed(parse_endpoint),
            help="A device behind it, as 00:06.0=edu or 00:07.0=blk,path=disk.img,readonly=on; "
            "repeat it for more.",
        ),
        click.option(
            "--boot-bypass",
            is_flag=True,
            help="Unattached endpoints reach all of guest memory, until the guest says otherwise. "
            "Without it they reach nothing.",
        ),
        click.option(
            "--page-sizes",
            metavar="SIZE[,SIZE...]",
            callback=parsed(parse_page_sizes),
            help="The sizes offered, the smallest being the granule, as 4K,2M,1G (the default).",
        ),
        click.option(
            "--aw-bits",
            type=click.IntRange(12, 64),
            default=48,
            show_default=True,
            help="IOVAs have that many bits.",
        ),
        click.option(
            "--limit",
            "limits",
            metavar="NAME=NUMBER",
            multiple=True,
            callback=parsed(parse_limit),
            help="Change a limit of those that are printed at the start, as mappings=65536.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def endpoint_help() -> str:
    """Return the kinds of endpoints and their options, for the end of a command's help."""
    lines = ["\b", "Kinds of endpoints:"]
    for name, kind in endpoint_kinds().items():
        lines.append(f"  {name}: {kind.help}")
        lines += _option_lines(kind.options)
    lines += ["", "\b", "Options of all kinds that are emulated here:"]
    lines += _option_lines(PROCESS_OPTIONS)
    lines += ["", "\b", "Options of those with a process of their own, and of external:"]
    lines += _option_lines(HOLD_OPTIONS)
    return "\n".join(lines)


def _option_lines(options: Mapping[str, Option]) -> list[str]:
    return [f"      {name}=...  {option.help}" for name, option in options.items()]


class ServeOptions(NamedTuple):
    """What to serve, and how much memory QEMU shall share (bytes; ``None``: not said)."""

    machine: MachineOptions
    memory: int | None

    @classmethod
    def make(cls, directory: Path, memory: int | None, chosen: Mapping[str, Any]) -> ServeOptions:
        """Return the options for ``directory`` from the parameters of :func:`machine_options`.

        Raises:
            UsageError: They contradict each other.
            CliUsageError: A limit has no such name.
        """
        absolute = Path(os.path.abspath(directory))  # noqa: PTH100  # resolve() follows links
        endpoints: tuple[EndpointArgument, ...] = chosen["endpoints"]
        machine = MachineOptions(absolute, chosen["iommu"], endpoints)
        limits = dict(chosen["limits"])
        known = vars(machine.config.limits)
        if unknown := sorted(set(limits) - set(known)):
            raise CliUsageError(f"there is no limit {unknown[0]!r}: there are {', '.join(known)}")
        config = dataclasses.replace(
            machine.config,
            input_range=(0, 1 << chosen["aw_bits"]),
            boot_bypass=chosen["boot_bypass"],
            limits=dataclasses.replace(machine.config.limits, **limits),
        )
        if chosen["page_sizes"] is not None:
            config = dataclasses.replace(config, page_size_mask=chosen["page_sizes"])
        return cls(dataclasses.replace(machine, config=config), memory)


class Serving(NamedTuple):
    """A running server: turn its ``loop``."""

    loop: Loop
    options: ServeOptions
    machine: Machine
    qemu_arguments: list[str]


@contextlib.contextmanager
def serving(loop: Loop, options: ServeOptions) -> Iterator[Serving]:
    """Serve on ``loop`` within the block; then remove every socket and file that was made.

    Raises:
        CliError: The directory is in use, or something can't be opened.
        UsageError: The options can't be followed.
    """
    machine_options = options.machine
    path = machine_options.directory
    iommu, endpoints = machine_options.iommu, machine_options.endpoints
    served = [iommu, *(bdf for bdf, text in endpoints if has_function(text))]
    with contextlib.ExitStack() as stack:
        arguments = qemu_arguments(
            {bdf: path / socket_name(bdf) for bdf in served},
            path / VIOT,
            options.memory,
            blocked_at_boot=not machine_options.config.boot_bypass,
        )
        directory = stack.enter_context(ServerDirectory(path))
        try:
            machine = Machine(loop, machine_options)
        except OSError as error:
            raise _cannot_open(error) from error
        stack.callback(machine.close)
        control = ControlServer(loop, path / SOCKET_NAME, machine.snapshot)
        stack.callback(control.close)
        directory.write(VIOT, build_viot(iommu, [bdf for bdf, _ in endpoints]))
        directory.write(QEMU_ARGUMENTS, "".join(f"{line}\n" for line in arguments).encode())
        yield Serving(loop, options, machine, arguments)


def _cannot_open(error: OSError) -> CliError:
    what = f"{error.filename} can't be opened" if error.filename else "the server can't start"
    remedy = (
        "raise the limit with ulimit -n"
        if error.errno in {errno.EMFILE, errno.ENFILE}
        else "check that it exists and who may use it"
    )
    return CliError(f"{what}: {error.strerror}; {remedy}")


def report(server: Serving, *, err: bool = False) -> None:
    """Print everything that was chosen: nothing is silently so."""
    options = server.options
    memory = (
        f"{format_size(options.memory)}, shared by QEMU as a memfd"
        if options.memory is not None
        else f"not said with --mem; give QEMU {MEMORY_REMEDY}"
    )
    directory = options.machine.directory
    lines = [
        ("virtio-iommu", str(options.machine.iommu)),
        *((f"endpoint {bdf}", spec) for bdf, spec in options.machine.endpoints),
        ("memory", memory),
        *server.machine.choices(),
        (
            "directory",
            f"{directory}: {VIOT}, {QEMU_ARGUMENTS}, {SOCKET_NAME}, one socket a function",
        ),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}", err=err)
