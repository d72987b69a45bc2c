from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from viommu.cli.snapshot_view import view

SNAPSHOT: dict[str, Any] = {
    "version": "1.2.3",
    "pid": 4711,
    "directory": "/run/v",
    "choices": {"page sizes": "0x1000", "polling": "off"},
    "iommu": {
        "bdf": "00:05.0",
        "bypass": False,
        "connected": True,
        "waiting": True,
        "counters": {"requests": 12, "refused": 3},
    },
    "domains": [
        {
            "id": 7,
            "kind": "translating",
            "endpoints": ["48", "56"],
            "mappings": 300,
            "ranges": [[0x10000 * n, 0x1000, 0x800000 + n, "r-"] for n in range(256)],
        },
        {"id": 8, "kind": "bypass", "endpoints": [], "mappings": 0, "ranges": []},
    ],
    "endpoints": [
        {
            "bdf": "00:06.0",
            "id": 48,
            "description": "edu",
            "connected": True,
            "kind": "translating",
            "domain": 7,
            "session": "open",
            "held": [[0x1000, 4096, 1], [0x8000, 100, 2]],
            "counters": {"blocked accesses": 5},
        },
        {
            "bdf": "00:07.0",
            "id": 56,
            "description": "blk,path=disk.img",
            "connected": False,
            "kind": "blocked",
            "domain": None,
            "session": "none",
            "held": [],
            "counters": {"blocked accesses": 0},
        },
    ],
}


def shown(snapshot: dict[str, Any], width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as capture:
        console.print(view(snapshot))
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_what_is_in_other_processes_is_shown() -> None:
    snapshot = copy.deepcopy(SNAPSHOT)
    snapshot["endpoints"][1] |= {
        "process": {"pid": 99},
        "device": {"state": "alive"},
        "exports": {"socket": None, "policy": "kill it after 8 s", "client": None},
    }

    lines = shown(snapshot, 160)

    assert "00:07.0 99 alive shared export session - - a pair" in lines
    assert "00:07.0 - kill it after 8 s a pair" in lines


def test_everything_is_shown() -> None:
    lines = shown(SNAPSHOT)

    assert lines[0] == "viommu 1.2.3, process 4711, /run/v"
    assert "page sizes 0x1000" in lines
    assert "IOMMU 00:05.0 VMM here, bypass off, a request waits for a release" in lines
    assert "12 requests, 3 refused" in lines
    assert "7 translating 300 00:06.0 00:07.0" in lines
    assert "8 bypass 0" in lines
    assert "7 0xf0000 0x80000f 4 KiB r-" in lines
    assert "7 and 284 more" in lines
    assert not any("0x100000" in line for line in lines)
    assert "00:06.0 0x30 here translating 7 open 0x1000 4 KiB edu" in lines
    assert "0x8000 100 bytes x2" in lines
    assert "00:07.0 0x38 away blocked - none - blk,path=disk.img" in lines
    assert "00:06.0 blocked accesses 5" in lines
    assert "00:07.0 blocked accesses 0" in lines


def test_a_device_of_the_host_is_shown_with_its_backend() -> None:
    snapshot = copy.deepcopy(SNAPSHOT)
    snapshot["endpoints"].append(
        {
            "bdf": "00:08.0",
            "id": 64,
            "description": "vfio,host=0000:04:00.0",
            "backend": "VFIO type1",
            "connected": True,
            "kind": "bypass",
            "domain": None,
            "host": {
                "address": "0000:04:00.0",
                "group": 12,
                "gone": None,
                "resettable": True,
                "reset pending": False,
                "BARs": {"0": 0xFE000000, "2": 0x800000000},
                "mapped by": {"0": ["VMM"], "2": ["VMM", "DMA"]},
            },
            "counters": {"resets": 2},
        }
    )

    lines = shown(snapshot)

    assert "00:08.0 0x40 here bypass - - - vfio,host=0000:04:00.0" in lines
    assert "00:08.0 0000:04:00.0 12 0: 0xfe000000 0: VMM yes in use VFIO type1" in lines
    assert "2: 0x800000000 2: VMM, DMA" in lines
    assert "00:08.0 resets 2" in lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reset pending": True}, "pending in use"),
        ({"resettable": False}, "no in use"),
        ({"gone": "unplugged"}, "yes unplugged"),
    ],
)
def test_what_became_of_a_device_of_the_host_is_said(change: dict[str, Any], said: str) -> None:
    host = {
        "address": "0000:04:00.0",
        "group": 12,
        "gone": None,
        "resettable": True,
        "reset pending": False,
        "BARs": {},
        "mapped by": {},
    }
    snapshot = copy.deepcopy(SNAPSHOT)
    snapshot["endpoints"][0] |= {"host": host | change, "backend": "iommufd"}

    assert f"00:06.0 0000:04:00.0 12 - - {said} iommufd" in shown(snapshot)


def test_nothing_mapped() -> None:
    snapshot = copy.deepcopy(SNAPSHOT)
    del snapshot["domains"][0]

    assert "Nothing is mapped." in shown(snapshot)


def test_nothing_to_show_is_said() -> None:
    snapshot = copy.deepcopy(SNAPSHOT)
    snapshot["domains"] = snapshot["endpoints"] = []
    snapshot["iommu"]["waiting"] = False

    lines = shown(snapshot)

    assert "No domain: the guest has attached nothing." in lines
    assert "No endpoint is behind this IOMMU." in lines
    assert "IOMMU 00:05.0 VMM here, bypass off, no request waits" in lines


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_any_terminal_will_do(width: int) -> None:
    assert max(map(len, shown(SNAPSHOT, width))) <= width


@pytest.mark.parametrize("key", SNAPSHOT)
def test_another_shape_raises(key: str) -> None:
    snapshot = copy.deepcopy(SNAPSHOT)
    del snapshot[key]

    with pytest.raises(KeyError):
        view(snapshot)
