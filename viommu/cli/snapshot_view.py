"""A server's snapshot as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from viommu.cli.iova_picture import about
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import JustifyMethod

__all__ = ["view"]

_SHOWN = 16  # mappings of a domain
_STYLES = {"blocked": "red", "bypass": "yellow", "translating": "green"}


def view(snapshot: Mapping[str, Any]) -> Group:
    """Return the tables for what :meth:`viommu.machine.Machine.snapshot` returned.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is of another shape.
    """
    head = Text.assemble(
        ("viommu ", "bold"),
        (str(snapshot["version"]), "bold"),
        f", process {snapshot['pid']}, {snapshot['directory']}",
    )
    return Group(
        head,
        _choices(snapshot["choices"]),
        _iommu(snapshot["iommu"]),
        _domains(snapshot["domains"]),
        _endpoints(snapshot["endpoints"]),
        _export_sessions(snapshot["endpoints"]),
        _host_devices(snapshot["endpoints"]),
        _counters(snapshot["endpoints"]),
    )


def _table(title: str, *columns: str, right: tuple[str, ...] = (), wrap: str = "") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column != wrap)
    return table


def _choices(choices: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in choices.items():
        grid.add_row(Text(name, style="dim"), Text(value))
    return grid


def _iommu(iommu: Mapping[str, Any]) -> Text:
    waiting = iommu["waiting"]
    counters = ", ".join(f"{value} {name}" for name, value in iommu["counters"].items())
    return Text.assemble(
        ("\nIOMMU ", "bold"),
        (str(iommu["bdf"]), "bold"),
        "  VMM ",
        _connected(iommu["connected"]),
        f", bypass {'on' if iommu['bypass'] else 'off'}, ",
        ("a request waits for a release", "magenta") if waiting else "no request waits",
        f"\n{counters}\n",
    )


def _domains(domains: list[Mapping[str, Any]]) -> Group | Text:
    if not domains:
        return Text("No domain: the guest has attached nothing.\n", style="dim")
    table = _table(
        "Domains", "id", "kind", "mappings", "endpoints", right=("id", "mappings"), wrap="endpoints"
    )
    for domain in domains:
        table.add_row(
            str(domain["id"]),
            _kind(domain["kind"]),
            str(domain["mappings"]),
            " ".join(str(Bdf.from_number(int(number))) for number in domain["endpoints"]),
        )
    return Group(table, _mappings(domains))


def _mappings(domains: list[Mapping[str, Any]]) -> Table | Text:
    """Show the lowest mappings of each domain; ``--json`` has more."""
    if not any(domain["mappings"] for domain in domains):
        return Text("Nothing is mapped.\n", style="dim")
    table = _table(
        "Mappings", "domain", "IOVA", "guest memory", "size", "access",
        right=("domain", "IOVA", "guest memory", "size"),
    )  # fmt: skip
    for domain in domains:
        shown = domain["ranges"][:_SHOWN]
        for iova, size, gpa, access in shown:
            table.add_row(str(domain["id"]), f"{iova:#x}", f"{gpa:#x}", about(size), access)
        if more := domain["mappings"] - len(shown):
            table.add_row(str(domain["id"]), f"and {more} more", "", "", "", style="dim")
    return table


def _endpoints(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    if not endpoints:
        return Text("No endpoint is behind this IOMMU.\n", style="dim")
    table = _table(
        "Endpoints", "address", "id", "VMM", "state", "domain", "session", "holds", "what",
        right=("domain",), wrap="what",
    )  # fmt: skip
    for endpoint in endpoints:
        domain = endpoint["domain"]
        table.add_row(
            endpoint["bdf"],
            f"{endpoint['id']:#x}",
            _connected(endpoint["connected"]),
            _kind(endpoint["kind"]),
            "-" if domain is None else str(domain),
            endpoint.get("session", "-"),
            "\n".join(_held(held) for held in endpoint.get("held", ())) or "-",
            endpoint["description"],
        )
    return table


def _export_sessions(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    """Show the processes that have export sessions, and what they hold; if there may be any."""
    doors = [(endpoint, endpoint["exports"]) for endpoint in endpoints if "exports" in endpoint]
    if not doors:
        return Text()
    table = _table(
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
        lines = [(_held(row[:3]), _seconds(row[3])) for row in held[:_SHOWN]]
        if more := client["exports"] - sum(times for _, _, times, _ in held[:_SHOWN]):
            lines.append((f"and {more} more", ""))
        table.add_row(
            endpoint["bdf"],
            str(client["pid"]),
            str(client["uid"]),
            _seconds(client["connected"]),
            "killed" if client["killed"] else client["session"],
            "\n".join(what for what, _ in lines) or "-",
            "\n".join(seconds for _, seconds in lines),
            Text(
                "-" if waited is None else _seconds(waited), style="" if waited is None else "red"
            ),
            *where,
        )
    return table


def _seconds(seconds: float) -> str:
    """Write a time as one reads it: ``0.25 s``, ``12 s``, ``3 min``, ``5 h``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _counters(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    if not endpoints:
        return Text()
    # Not every kind of endpoint counts the same.
    names = list(dict.fromkeys(name for endpoint in endpoints for name in endpoint["counters"]))
    table = _table("Counters", "address", *names, right=tuple(names))
    for endpoint in endpoints:
        table.add_row(endpoint["bdf"], *(str(endpoint["counters"].get(n, "-")) for n in names))
    return table


def _host_devices(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    """Show the endpoints that are devices of the host, if there are any."""
    devices = [(endpoint, endpoint["host"]) for endpoint in endpoints if "host" in endpoint]
    if not devices:
        return Text()
    table = _table(
        "Devices of the host", "address", "host", "group", "BARs", "mapped by", "reset", "state",
        "backend", right=("group",), wrap="backend",
    )  # fmt: skip
    for endpoint, host in devices:
        reset = "pending" if host["reset pending"] else "yes" if host["resettable"] else "no"
        table.add_row(
            endpoint["bdf"],
            host["address"],
            str(host["group"]),
            "\n".join(f"{bar}: {address:#x}" for bar, address in host["BARs"].items()) or "-",
            "\n".join(f"{bar}: {', '.join(who)}" for bar, who in host["mapped by"].items()) or "-",
            reset,
            host["gone"] or "in use",
            endpoint["backend"],
        )
    return table


def _held(held: list[int]) -> str:
    iova, size, count = held
    times = f" x{count}" if count > 1 else ""
    return f"{iova:#x} {about(size)}{times}"


def _connected(connected: bool | None) -> Text:  # noqa: FBT001  # one word of JSON
    if connected is None:
        return Text("-")  # its device is not served here
    return Text("here", style="green") if connected else Text("away", style="dim")


def _kind(kind: str) -> Text:
    return Text(kind, style=_STYLES.get(kind, ""))
