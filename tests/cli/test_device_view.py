from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from viommu.cli.device_view import device_view

SNAPSHOT: dict[str, Any] = {
    "version": "1.2.3",
    "pid": 4711,
    "device": "blk,path=disk.img",
    "socket": "/run/disk.sock",
    "connected": True,
    "maps": [[0x10000, 0x1000, 0x200000, "rw"], [0x20000, 0x200000, None, "r-"]],
    "held": [[0x10000, 512, 1]],
    "counters": {"clients": 3, "blocked accesses": 2},
}


def render(**changes: Any) -> str:
    output = io.StringIO()
    console = Console(file=output, width=100, color_system=None)
    console.print(device_view(SNAPSHOT | changes))
    return output.getvalue()


def row(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [start])


def test_the_maps_are_shown_with_where_the_memory_is() -> None:
    text = render()
    assert row(text, "0x10000") == (
        ["0x10000", "4", "KiB", "rw", "shared,", "from", "0x200000", "of", "a", "file"]
    )
    assert row(text, "0x20000") == ["0x20000", "2", "MiB", "r-", "by", "messages"]


def test_who_it_is_and_what_it_holds() -> None:
    text = render()
    for shown in ("1.2.3", "4711", "blk,path=disk.img", "/run/disk.sock", "client: here"):
        assert shown in text
    assert "The device holds 0x10000 512 bytes." in text
    assert "clients 3, blocked accesses 2" in text


def test_nothing_to_show() -> None:
    text = render(connected=False, maps=[], held=[])
    for shown in ("client: away", "Nothing is mapped", "holds nothing"):
        assert shown in text


def test_many_maps_are_cut() -> None:
    text = render(maps=[[0x1000 * page, 0x1000, None, "rw"] for page in range(40)])
    assert "0x1f000" in text
    assert "0x20000" not in text
    assert "and 8 more" in text


@pytest.mark.parametrize("missing", SNAPSHOT)
def test_a_snapshot_of_another_shape_is_refused(missing: str) -> None:
    with pytest.raises(KeyError):
        device_view({name: value for name, value in SNAPSHOT.items() if name != missing})
