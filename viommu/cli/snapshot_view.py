"""A server's snapshot as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from viommu.cli.iova_picture import about
from viommu.cli.process_view import export_sessions, remote_devices
from viommu.cli.tables import SHOWN, holding, make_table
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["view"]

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
        remote_devices(snapshot["endpoints"]),
        export_sessions(snapshot["endpoints"]),
        _host_devices(snapshot["endpoints"]),
        _counters(snapshot["endpoints"]),
    )


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
    table = make_table(
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
    table = make_table(
        "Mappings", "domain", "IOVA", "guest memory", "size", "access",
        right=("domain", "IOVA", "guest memory", "size"),
    )  # fmt: skip
    for domain in domains:
        shown = domain["ranges"][:SHOWN]
        for iova, size, gpa, access in shown:
            table.add_row(str(domain["id"]), f"{iova:#x}", f"{gpa:#x}", about(size), access)
        if more := domain["mappings"] - len(shown):
            table.add_row(str(domain["id"]), f"and {more} more", "", "", "", style="dim")
    return table


def _endpoints(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    if not endpoints:
        return Text("No endpoint is behind this IOMMU.\n", style="dim")
    table = make_table(
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
            "\n".join(holding(held) for held in endpoint.get("held", ())) or "-",
            endpoint["description"],
        )
    return table


def _counters(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    """Show what each endpoint counts; not every kind counts the same."""
    if not endpoints:
        return Text()
    table = make_table("Counters", "address", "counts", wrap="counts")
    for endpoint in endpoints:
        counts = (f"{name} {value}" for name, value in endpoint["counters"].items())
        table.add_row(endpoint["bdf"], ", ".join(counts))
    return table


def _host_devices(endpoints: list[Mapping[str, Any]]) -> Table | Text:
    """Show the endpoints that are devices of the host, if there are any."""
    devices = [(endpoint, endpoint["host"]) for endpoint in endpoints if "host" in endpoint]
    if not devices:
        return Text()
    table = make_table(
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


def _connected(connected: bool | None) -> Text:  # noqa: FBT001  # one word of JSON
    if connected is None:
        return Text("-")  # its device is not served here
    return Text("here", style="green") if connected else Text("away", style="dim")


def _kind(kind: str) -> Text:
    return Text(kind, style=_STYLES.get(kind, ""))
