from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

from viommu_backends import memlock
from viommu_backends.memlock import LOCKED, PINNED, over_the_limit

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmLck:\t       8 kB\nVmPin:\t      12 kB\n")
    monkeypatch.setattr(memlock, "_STATUS", status)
    return status


@pytest.mark.parametrize(("counter", "count"), [(LOCKED, 8192), (PINNED, 12288), ("VmX", 0)])
@pytest.mark.parametrize("limit", [65536, resource.RLIM_INFINITY])
def test_the_numbers_that_matter(
    status: Path, monkeypatch: pytest.MonkeyPatch, counter: str, count: int, limit: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))

    said = "65536" if limit == 65536 else "none"
    assert over_the_limit(4096, counter) == (
        f"4096 more bytes would be locked, {count} are, and the limit is {said} (ulimit -l)"
    )


def test_the_kernel_has_both_counters() -> None:
    names = [line.partition(":")[0] for line in memlock._STATUS.read_text().splitlines()]

    assert {LOCKED, PINNED} <= set(names)
