from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from viommu.ipc.hold import HoldPolicy, HoldWatch, Measure
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.loop = Loop(clock=lambda: self.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.loop.turn(0)


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.loop.close()


def test_each_limit_that_passes_is_told_of_until_the_client_lets_go(clock: Clock) -> None:
    told: list[float] = []
    watch = HoldWatch(clock.loop, HoldPolicy(2.0), told.append)
    clock.advance(10)
    waited = [watch.waited]

    watch.start()
    clock.advance(1.5)
    watch.start()  # the first reason counts
    waited.append(watch.waited)
    clock.advance(0.5)
    clock.advance(2)
    waited.append(watch.waited)
    watch.stop()
    watch.stop()
    clock.advance(10)
    waited.append(watch.waited)

    assert waited == [None, 1.5, 4.0, None]
    assert told == [2.0, 4.0]


def test_what_is_told_of_may_stop_it(clock: Clock) -> None:
    watch = HoldWatch(clock.loop, HoldPolicy(2.0), lambda _: watch.stop())
    watch.start()
    clock.advance(2)
    clock.advance(2)
    assert watch.waited is None


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (HoldPolicy(), "wait on, and log it every 8 s"),
        (HoldPolicy(0.5, Measure.KILL), "kill it after 0.5 s"),
    ],
)
def test_a_policy_can_be_said(policy: HoldPolicy, words: str) -> None:
    assert str(policy) == words
