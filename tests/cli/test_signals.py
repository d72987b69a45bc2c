from __future__ import annotations

import os
import signal

import pytest

from viommu.cli.signals import on_stop_signals
from viommu.loop import Loop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_event_of_the_loop(number: signal.Signals) -> None:
    loop = Loop()
    seen: list[int] = []

    def stop(signal_number: int) -> None:
        seen.append(signal_number)
        loop.stop()

    before = signal.getsignal(number)
    with on_stop_signals(loop, stop):
        os.kill(os.getpid(), number)
        assert seen == []
        loop.run()
    loop.close()

    assert seen == [number]
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_wake_and_do_nothing() -> None:
    loop = Loop()
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with on_stop_signals(loop, seen.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        loop.turn(0)
    loop.close()
    signal.signal(signal.SIGUSR1, before)

    assert seen == []
