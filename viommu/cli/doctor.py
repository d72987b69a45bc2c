"""``viommu doctor``: what this host can do, and what is missing."""

from __future__ import annotations

import json
from typing import Final

import click

from viommu.cli.exit_codes import ExitCode
from viommu.cli.host_checks import Check, Outcome, examine_host

__all__ = ["doctor"]

_COLORS: Final = {Outcome.OK: "green", Outcome.MISSING: "red", Outcome.ABSENT: "yellow"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option(
    "--qemu", metavar="PROGRAM", help="The QEMU to examine; default: $VIOMMU_QEMU, then PATH."
)
def doctor(qemu: str | None, *, as_json: bool) -> int:
    """Say what this host can do, what is missing and how to get it.

    A line is `ok`, `missing` (something that demo, serve or run needs) or
    `absent` (nothing that they need). Exit code 0: demo, serve and run all work
    here; 3: a line says `missing`.
    """
    checks = examine_host(qemu)
    lacking = any(check.outcome is Outcome.MISSING for check in checks)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "ready": not lacking,
                    "checks": [check._asdict() for check in checks],
                },
                indent=2,
            )
        )
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            _show(check, width)
    return ExitCode.HOST if lacking else ExitCode.OK


def _show(check: Check, width: int) -> None:
    # No rich here: this command says whether rich is installed.
    word = click.style(f"{check.outcome.value:<7}", fg=_COLORS[check.outcome])
    click.echo(f"{word}  {check.name:<{width}}  {check.found}")
    if check.remedy:
        click.echo(f"{'':<7}  {'':<{width}}  -> {check.remedy}")
