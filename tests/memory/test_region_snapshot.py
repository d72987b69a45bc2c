from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.memory.recording import PAGE, RecordingTarget, pages
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import DmaNeeds, MemoryKind
from viommu.memory.incident import IncompleteError
from viommu.memory.regions import RegionManager

if TYPE_CHECKING:
    from collections.abc import Callable


def test_everything_can_be_seen(memfd: Callable[..., int]) -> None:
    manager = RegionManager(reservation=16 * PAGE, report=lambda incident: None)
    assert manager.snapshot() == {
        "regions": [], "targets": [], "lingering": [], "addresses": None, "incidents": {},
    }  # fmt: skip
    ram = manager.add_region("ram", pages(0, 4))
    bar = manager.add_region("bar", pages(0, 1), MemoryKind.DEVICE)
    file = FileBacking(memfd())
    manager.add_mapping(ram, pages(1, 2), file, PAGE, writable=False)
    manager.add_mapping(bar, pages(0), PrivateBacking(PAGE))
    target = RecordingTarget("type1", DmaNeeds.HOST_VA)
    registration = manager.register(target, "type1", DmaNeeds.HOST_VA)
    manager.enable(ram)
    manager.enable(bar)
    name = f"file {file.key.device:x}:{file.key.inode}"

    assert manager.snapshot() == {
        "regions": [
            {
                "name": "ram", "start": 0, "end": 4 * PAGE, "kind": "ram", "priority": 255,
                "enabled": True, "writable": True, "active": True,
                "shadowed by": None, "failure": None,
                "mappings": [
                    {"start": PAGE, "end": 3 * PAGE, "backing": name, "file offset": PAGE,
                     "writable": False},
                ],
            },
            {
                "name": "bar", "start": 0, "end": PAGE, "kind": "device", "priority": 0,
                "enabled": True, "writable": True, "active": False,
                "shadowed by": "ram", "failure": None,
                "mappings": [
                    {"start": 0, "end": PAGE, "backing": "private memory", "file offset": 0,
                     "writable": True},
                ],
            },
        ],
        "targets": [
            {
                "name": "type1", "needs": ["HOST_VA"], "registered": True,
                "device memory not mapped": 0, "unmaps refused": 0,
                "held": [
                    {"region": "ram", "start": PAGE, "end": 3 * PAGE, "writable": False,
                     "has host address": True, "stuck": None},
                ],
            },
        ],
        "lingering": [],
        "addresses": {"reserved": 16 * PAGE, "mapped": 2 * PAGE, "targets": 1},
        "incidents": {},
    }  # fmt: skip

    target.refuse = {1}
    with pytest.raises(IncompleteError):
        registration.release()
    with pytest.raises(IncompleteError):
        manager.disable(ram)

    seen = json.loads(json.dumps(manager.snapshot()))
    assert seen["lingering"] == [
        {"region": "ram", "start": PAGE, "end": 3 * PAGE, "writable": False,
         "has host address": True},
    ]  # fmt: skip
    assert seen["incidents"] == {"not unmapped": 2}
    (books,) = seen["targets"]
    assert (books["registered"], books["unmaps refused"]) == (False, 2)
    assert "type1 refuses [0x1000, 0x3000)" in books["held"][0]["stuck"]

    target.refuse.clear()
    manager.retry()
    for region in manager.regions():
        manager.remove_region(region)
    assert file.uses == 0


def test_why_a_region_is_not_active_can_be_seen(memfd: Callable[..., int]) -> None:
    manager = RegionManager(report=lambda incident: None)
    low = manager.add_region("low", pages(0), priority=0)
    high = manager.add_region("high", pages(0), priority=1)
    manager.add_mapping(low, pages(0), FileBacking(memfd()))
    target = RecordingTarget("target")
    manager.register(target, "target")
    manager.enable(low)
    manager.enable(high)
    target.reject = {0}
    with pytest.raises(IncompleteError, match="region can't be active"):
        manager.disable(high)

    seen = json.loads(json.dumps(manager.snapshot()))

    _, region = seen["regions"]
    assert (region["active"], region["shadowed by"]) == (False, None)
    assert "target rejects" in region["failure"]
    assert seen["incidents"] == {"region can't be active": 1}
    manager.remove_region(low)
