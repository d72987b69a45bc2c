"""The state of a stand-alone device as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from viommu.cli.iova_picture import about

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["device_view"]

_SHOWN: Final = 32  # maps


def device_view(snapshot: Mapping[str, Any]) -> Group:
    """Return the tables for what ``StandaloneDevice.snapshot`` returned.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is of another shape.
    """
    head = Text.assemble(
        ("viommu ", "bold"),
        (str(snapshot["version"]), "bold"),
        f", process {snapshot['pid']}, {snapshot['device']} at {snapshot['socket']}",
    )
    client = Text("client: here" if snapshot["connected"] else "client: away")
    return Group(head, client, _maps(snapshot["maps"]), _held(snapshot), _counters(snapshot))


def _maps(maps: list[list[Any]]) -> Table | Text:
    """Show the lowest maps; ``--json`` has all."""
    if not maps:
        return Text("Nothing is mapped.\n", style="dim")
    table = Table(title="Maps of the client", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("address", "size"):
        table.add_column(column, justify="right")
    for column in ("access", "memory"):
        table.add_column(column)
    for address, size, offset, access in maps[:_SHOWN]:
        memory = "by messages" if offset is None else f"shared, from {offset:#x} of a file"
        table.add_row(f"{address:#x}", about(size), access, memory)
    if len(maps) > _SHOWN:
        table.add_row(f"and {len(maps) - _SHOWN} more", "", "", "", style="dim")
    return table


def _held(snapshot: Mapping[str, Any]) -> Text:
    held = [f"{address:#x} {about(size)}" for address, size, _ in snapshot["held"]]
    return Text(f"The device holds {', '.join(held) or 'nothing'}.\n")


def _counters(snapshot: Mapping[str, Any]) -> Text:
    return Text(", ".join(f"{name} {value}" for name, value in snapshot["counters"].items()))
