"""``viommu inspect``: the state of a running server."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live

from viommu._version import __version__
from viommu.cli.console import make_console
from viommu.cli.device_view import device_view
from viommu.cli.exit_codes import CliError
from viommu.cli.snapshot_view import view
from viommu.control import SOCKET_NAME, ControlClient
from viommu.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

__all__ = ["inspect"]


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "as_json", is_flag=True, help="JSON instead of tables; one line a look.")
@click.option("--watch", is_flag=True, help="Look again and again until interrupted.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(0.05, 3600),
    default=1.0,
    show_default=True,
    help="How long to wait between two looks of --watch.",
)
def inspect(path: Path, interval: float, *, as_json: bool, watch: bool) -> None:
    """Show domains, endpoints, mappings, exports and counters of the server in DIR.

    DIR may also be the control socket of a `viommu device`: shows what its client
    has mapped. Looking changes nothing and never waits for the guest. Exit code 1
    when no server answers there.
    """
    with _connect(path) as client, contextlib.suppress(KeyboardInterrupt):
        looks = _looks(client, interval if watch else None)
        if as_json:
            for snapshot in looks:
                click.echo(json.dumps(snapshot, separators=(",", ":") if watch else None))
            return
        console = make_console()
        if not watch:
            console.print(_render(next(looks)))
        elif not console.is_terminal:
            for snapshot in looks:
                console.print(_render(snapshot))
        else:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for snapshot in looks:
                    live.update(_render(snapshot), refresh=True)


def _connect(path: Path) -> ControlClient:
    directory = path.is_dir()
    try:
        return ControlClient(path / SOCKET_NAME if directory else path)
    except OSError as error:
        remedy = f"serve --dir {path}" if directory else f"device ... --control {path}"
        raise CliError(
            f"no server answers {'in' if directory else 'at'} {path} ({error.strerror}): "
            f"start one with `viommu {remedy}`"
        ) from error


def _looks(client: ControlClient, interval: float | None) -> Iterator[dict[str, Any]]:
    """Yield snapshots, one or without end; a server that ends is an error."""
    for number in itertools.count():
        if number:
            time.sleep(interval or 0)
        try:
            yield client.snapshot()
        except PeerError as error:
            raise CliError(str(error)) from error
        if interval is None:
            return


def _render(snapshot: dict[str, Any]) -> RenderableType:
    try:
        return device_view(snapshot) if "device" in snapshot else view(snapshot)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CliError(
            f"the server is viommu {snapshot.get('version', 'of another version')} and this is "
            f"{__version__}: use the same one, or --json"
        ) from error
