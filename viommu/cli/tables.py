"""What the tables of `viommu inspect` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from viommu.cli.iova_picture import about

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import JustifyMethod

__all__ = ["SHOWN", "holding", "make_table", "time_span"]

#: Lines about one endpoint or domain; ``--json`` has more.
SHOWN = 16


def make_table(title: str, *columns: str, right: tuple[str, ...] = (), wrap: str = "") -> Table:
    """Return an empty table; columns are aligned to the left, and only ``wrap`` has line breaks."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column != wrap)
    return table


def holding(held: Sequence[int]) -> str:
    """Write a range that is exported: IOVA, size, and how often."""
    iova, size, count = held
    times = f" x{count}" if count > 1 else ""
    return f"{iova:#x} {about(size)}{times}"


def time_span(seconds: float) -> str:
    """Write a time as one reads it: ``0.25 s``, ``12 s``, ``3 min``, ``5 h``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
