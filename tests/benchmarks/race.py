"""Different ways to do the same thing, timed in turns and compared with the first of them.

A time alone means nothing on a shared machine. What happens to one of them in turns happens
to all, so their ratio does mean something.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["race"]


def race(
    benchmark: BenchmarkFixture,
    note: Callable[[str, object], None],
    ways: Mapping[str, Callable[[], object]],
) -> None:
    """Take each way once in each round; ``note`` (pytest's record_property) the medians."""
    times: dict[str, list[float]] = {name: [] for name in ways}

    def turn() -> None:
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)

    turn()  # the first time has more to do
    for taken in times.values():
        taken.clear()
    benchmark(turn)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        note(name, f"{median * 1e6:,.0f} us, {median / first:.2f} of the first")
