"""The ``viommu`` command: its subcommands, loaded when they are called, and its errors."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from viommu._version import __version__
from viommu.cli.exit_codes import EXIT_CODES, ExitCode, HostLacksError, cli_error
from viommu.errors import InternalError, ViommuError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS: Final = {
    "demo": "Show what a virtio-iommu does, without a virtual machine.",
    "serve": "Serve a virtio-iommu and endpoints behind it to a virtual machine.",
    "run": "Serve, and run QEMU with the right arguments until the guest ends.",
    "device": "Serve one device, without an IOMMU, to any vfio-user client.",
    "inspect": "Show domains, endpoints, mappings and counters of a running server.",
    "viot": "Build or read the ACPI table that tells a guest what is behind the IOMMU.",
    "doctor": "Say what this host can do, and what is missing.",
}
"""Each subcommand, in the order of the help, with its summary; ``viommu.cli.NAME`` has it."""

_EPILOG: Final = "\b\nExit codes:\n" + "\n".join(
    f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()
)
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)


class Commands(click.Group):
    """Imports a subcommand when it is called, and turns every error into one sentence.

    ``viommu doctor`` must run where a package that ``viommu serve`` needs is missing.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of :data:`COMMANDS`."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        try:
            module = importlib.import_module(f"viommu.cli.{cmd_name}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "viommu":
                raise
            raise HostLacksError(
                f"the Python package {error.name!r} is not installed: "
                "install viommu again with pip; `viommu doctor` says what else is missing"
            ) from error
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101  # our own table
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands without importing any."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: FBT001, FBT002  # click's signature
        **extra: Any,
    ) -> Any:
        """Run, and end the process with one of :data:`~viommu.cli.exit_codes.EXIT_CODES`."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = ExitCode.USAGE
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "viommu"
            code = _complain(
                f"{error.format_message().rstrip('.')} (see `{command} --help`)", error
            )
        except click.ClickException as error:
            code = _complain(error.format_message(), error)
        except ViommuError as error:
            if isinstance(error, InternalError):
                raise
            code = _complain(str(error), cli_error(error))
        except click.Abort:
            code = ExitCode.INTERRUPTED
        except BrokenPipeError:
            # Our reader, say `head`, has seen enough. Nothing may be flushed to it at exit.
            sys.stdout = sys.stderr
            code = ExitCode.FAILURE
        sys.exit(code or ExitCode.OK)


def _complain(message: str, error: click.ClickException) -> int:
    click.echo(f"viommu: {message}", err=True)
    return error.exit_code


@click.group(
    cls=Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="viommu", message="%(prog)s %(version)s")
@click.option("-v", "--verbose", count=True, help="Log what happens; twice: everything.")
def cli(verbose: int) -> None:
    """A virtio-iommu in a process of its own, for a virtual machine on QEMU.

    Start with `viommu demo`; then `viommu serve --help` has a command line to copy.
    """
    logging.basicConfig(
        level=_LEVELS[min(verbose, len(_LEVELS) - 1)],
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )


def main() -> NoReturn:
    """Run the command line of this process; the console script's entry point."""
    try:
        cli.main(prog_name="viommu")
    except Exception:  # noqa: BLE001  # the last line of defence: say that it is our fault
        traceback.print_exc()
        click.echo(
            "viommu: this is a bug: please report it with the lines above and "
            f"`viommu doctor` (version {__version__})",
            err=True,
        )
        sys.exit(ExitCode.BUG)
    raise InternalError("click returned from a standalone command")


if __name__ == "__main__":
    main()
