"""Endpoints in other processes as tables: who they are, whether they live, what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from viommu.cli.tables import SHOWN, holding, make_table, time_span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

__all__ = ["export_sessions", "remote_devices"]

_STATES = {"alive": "green", "dead": "red"}


def remote_devices(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    """Show the devices that other processes serve to us, if there are any."""
    devices = [(endpoint, endpoint["device"]) for endpoint in endpoints if "device" in endpoint]
    if not devices:
        return Text()
    table = make_table(
        "Devices in other processes", "address", "process", "device", "guest memory", "mappings by",
        "maps", "unanswered", "socket", "since, and why",
        right=("process", "maps", "unanswered"), wrap="since, and why",
    )  # fmt: skip
    for endpoint, device in devices:
        # One that we have started; or whoever serves a socket.
        process = endpoint["process"]["pid"] if "process" in endpoint else device["process"]
        dead = device.get("dead")
        here = dead is None and process is not None
        table.add_row(
            endpoint["bdf"],
            str(process) if here else "-",
            Text(device["state"], style=_STATES.get(device["state"], "yellow")),
            *_told(device),
            device.get("socket", "a pair"),
            "" if dead is None else f"{dead['since']}, {dead['why']}",
        )
    return table


def _told(device: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return what a device has of guest memory, and how it learns of mappings."""
    if "maps" not in device:
        return "shared", "export session", "-", "-"
    memory = "shared" if device["memory"] == "shared" else "by messages"
    return memory, device["protocol"], str(device["maps in all"]), str(device["unanswered"])


def export_sessions(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    """Show the processes that have export sessions, and what they hold; if there may be any."""
    doors = [(endpoint, endpoint["exports"]) for endpoint in endpoints if "exports" in endpoint]
    if not doors:
        return Text()
    table = make_table(
        "Export sessions of other processes", "address", "process", "user", "here for", "session",
        "holds", "for", "waited for", "policy", "socket",
        right=("process", "user", "here for", "for", "waited for"), wrap="socket",
    )  # fmt: skip
    for endpoint, door in doors:
        client = door["client"]
        where = door["policy"], door["socket"] or "a pair"
        if client is None:
            table.add_row(endpoint["bdf"], "-", "", "", "", "", "", "", *where, style="dim")
            continue
        held, waited = client["holds"], client["waited for"]
        lines = [(holding(row[:3]), time_span(row[3])) for row in held[:SHOWN]]
        if more := client["exports"] - sum(times for _, _, times, _ in held[:SHOWN]):
            lines.append((f"and {more} more", ""))
        table.add_row(
            endpoint["bdf"],
            str(client["pid"]),
            str(client["uid"]),
            time_span(client["connected"]),
            "killed" if client["killed"] else client["session"],
            "\n".join(what for what, _ in lines) or "-",
            "\n".join(seconds for _, seconds in lines),
            Text(
                "-" if waited is None else time_span(waited), style="" if waited is None else "red"
            ),
            *where,
        )
    return table
