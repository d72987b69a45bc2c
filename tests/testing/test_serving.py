from __future__ import annotations

import threading

import pytest

from viommu.errors import UsageError
from viommu.loop import Loop
from viommu.testing.serving import LoopThread


def fail() -> None:
    raise LookupError("in the loop")


def test_calls_run_in_the_loop_s_thread() -> None:
    with LoopThread() as thread:
        assert thread.call(threading.get_ident) != threading.get_ident()
        assert thread.call(lambda: 7) == 7


def test_an_error_of_a_call_is_raised_and_ends_nothing() -> None:
    with LoopThread() as thread:
        with pytest.raises(LookupError):
            thread.call(fail)
        assert thread.call(lambda: 1) == 1


def test_an_error_of_the_loop_is_raised_at_the_end() -> None:
    with pytest.raises(LookupError), LoopThread() as thread:
        thread.call(lambda: thread.loop.call_soon(fail))


def test_an_error_of_the_loop_is_raised_by_the_next_call() -> None:
    with LoopThread() as thread:
        thread.call(lambda: thread.loop.call_soon(fail))
        thread._thread.join()
        with pytest.raises(LookupError):
            thread.call(lambda: None)


def test_a_loop_that_was_stopped_is_told() -> None:
    with LoopThread() as thread:
        thread.call(thread.loop.stop)
        thread._thread.join()
        with pytest.raises(UsageError):
            thread.call(lambda: None)


def test_a_given_loop_stays_open() -> None:
    loop = Loop()
    with LoopThread(loop):
        pass
    loop.call_soon(lambda: None)
    loop.turn(0)
    loop.close()
