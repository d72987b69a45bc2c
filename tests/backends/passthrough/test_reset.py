from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.backends.passthrough.fake_device import FakeVfioDevice
from viommu.errors import BackendError
from viommu_backends.passthrough.reset import HostReset

if TYPE_CHECKING:
    from tests.backends.passthrough.conftest import Clock
    from viommu.loop import Loop


class Rig:
    def __init__(self, device: FakeVfioDevice, loop: Loop, clock: Clock) -> None:
        self.device = device
        self.done = 0
        self.resetting = HostReset(device, loop, self._count)
        self._loop = loop
        self._clock = clock

    def wait(self, turns: int = 1) -> None:
        for _ in range(turns):
            self._clock.now += 0.1
            self._loop.turn(0)

    def _count(self) -> None:
        self.done += 1

    def counts(self) -> tuple[int, int, int]:
        return self.done, self.resetting.resets, self.resetting.failed


@pytest.fixture
def rig(device: FakeVfioDevice, loop: Loop, clock: Clock) -> Rig:
    return Rig(device, loop, clock)


def test_a_reset_is_done_at_once(rig: Rig) -> None:
    rig.resetting.start()

    assert rig.device.log == ["reset"]
    assert not rig.resetting.pending
    assert rig.counts() == (1, 1, 0)


def test_a_busy_host_is_asked_again_without_waiting(rig: Rig) -> None:
    rig.device.busy = 2

    rig.resetting.start()
    assert rig.resetting.pending
    rig.resetting.start()
    assert rig.counts() == (0, 0, 0)
    rig.wait()
    assert rig.counts() == (0, 0, 0)
    rig.wait()

    assert rig.counts() == (1, 1, 0)
    assert rig.device.log == ["reset"]


def test_a_host_that_stays_busy_is_not_asked_for_ever(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.device.busy = 1000

    rig.resetting.start()
    rig.wait(100)

    assert not rig.resetting.pending
    assert rig.counts() == (1, 0, 1)
    assert rig.device.busy > 900
    assert "was not reset" in caplog.text


def test_giving_up_ends_it(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.device.busy = 1
    rig.resetting.start()

    rig.resetting.give_up("nobody wants it")
    rig.resetting.give_up("nobody wants it")
    rig.wait(3)

    assert "nobody wants it" in caplog.text
    assert rig.counts() == (1, 0, 1)
    assert rig.device.log == []


def test_another_error_ends_it_at_once(rig: Rig) -> None:
    def refuse() -> None:
        raise BackendError(errno.EIO, "reset")

    rig.device.reset = refuse  # type: ignore[method-assign] # what a dead device answers
    rig.resetting.start()

    assert rig.counts() == (1, 0, 1)


def test_a_device_without_a_reset_is_left_as_it_is(
    loop: Loop, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeVfioDevice(can_reset=False)
    rig = Rig(device, loop, clock)

    rig.resetting.start()

    assert rig.counts() == (1, 0, 0)
    assert device.log == []
    assert caplog.text == ""
    device.close()
