"""The exit codes of the ``viommu`` command, and the errors that carry one."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, ClassVar, Final

import click

from viommu.errors import UsageError
from viommu.vmm import UnsuitableQemuError

if TYPE_CHECKING:
    from viommu.errors import ViommuError

__all__ = [
    "EXIT_CODES",
    "CliError",
    "CliUsageError",
    "ExitCode",
    "HostLacksError",
    "cli_error",
]


class ExitCode(enum.IntEnum):
    """What the process returns; :data:`EXIT_CODES` says when."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    HOST = 3
    BUG = 70
    INTERRUPTED = 130


EXIT_CODES: Final[dict[ExitCode, str]] = {
    ExitCode.OK: "it worked; a server was told to end and ended cleanly",
    ExitCode.FAILURE: "it failed, and says in one sentence why and what to do",
    ExitCode.USAGE: "the command line can't be followed",
    ExitCode.HOST: "this host lacks something (no suitable QEMU, a missing package)",
    ExitCode.BUG: "a bug in viommu: please report the traceback",
    ExitCode.INTERRUPTED: "interrupted",
}
"""Every exit code and its meaning. ``viommu run`` passes QEMU's own code on when it is not 0."""


class CliError(click.ClickException):
    """An expected failure: one sentence with the cause and the remedy."""

    exit_code: ClassVar[int] = ExitCode.FAILURE


class CliUsageError(CliError):
    """The command line is understood and can't be followed."""

    exit_code: ClassVar[int] = ExitCode.USAGE


class HostLacksError(CliError):
    """This host lacks what the command needs."""

    exit_code: ClassVar[int] = ExitCode.HOST


def cli_error(error: ViommuError) -> CliError:
    """Return ``error`` of the library as the command line reports it."""
    match error:
        case UsageError():
            return CliUsageError(str(error))
        case UnsuitableQemuError():
            return HostLacksError(str(error))
        case _:
            return CliError(str(error))
