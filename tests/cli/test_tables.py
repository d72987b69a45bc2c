from __future__ import annotations

import io

import pytest
from rich.console import Console

from viommu.cli.tables import holding, make_table, time_span


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.254, "0.25 s"),
        (9.99, "9.99 s"),
        (40.4, "40 s"),
        (119.0, "119 s"),
        (600.0, "10 min"),
        (7300.0, "2 h"),
    ],
)
def test_times_are_written_as_one_reads_them(seconds: float, text: str) -> None:
    assert time_span(seconds) == text


def test_what_is_held_is_written_once() -> None:
    assert holding([0x1000, 4096, 1]) == "0x1000 4 KiB"
    assert holding([0x8000, 100, 2]) == "0x8000 100 bytes x2"


def test_only_one_column_is_broken() -> None:
    table = make_table("Title", "number", "text", right=("number",), wrap="text")
    table.add_row("7", "one two three four five six")
    console = Console(file=io.StringIO(), width=24)
    with console.capture() as capture:
        console.print(table)
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert lines[0] == "Title"
    assert "7 one two three" in lines
