from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.passthrough.fake_device import FakeVfioDevice
from viommu.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def device() -> Iterator[FakeVfioDevice]:
    device = FakeVfioDevice()
    yield device
    device.close()


class Clock:
    """The time, which passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    loop = Loop(clock)
    yield loop
    loop.close()
