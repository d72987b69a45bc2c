"""The loop: readers, writers, timers, order."""

import os
import socket
from collections.abc import Iterator

import pytest

from viommu.errors import UsageError
from viommu.events import Event
from viommu.loop import Loop


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop(Clock())
    yield loop
    loop.close()


def test_a_reader_is_called_until_it_consumes(loop: Loop) -> None:
    calls: list[int] = []
    with Event() as event:
        loop.on_readable(event, lambda: calls.append(1))
        loop.turn(0)
        event.signal()
        loop.turn(0)
        loop.turn(0)
        event.clear()
        loop.turn(0)
        loop.forget(event)

    assert calls == [1, 1]


def test_reading_and_writing_are_watched_apart(loop: Loop) -> None:
    seen: list[str] = []
    left, right = socket.socketpair()
    with left, right:
        loop.on_readable(left, lambda: seen.append("read"))
        loop.on_writable(left, lambda: seen.append("write"))
        loop.turn(0)
        assert seen == ["write"]
        loop.on_writable(left, None)
        right.send(b"x")
        loop.turn(0)
        assert seen == ["write", "read"]
        loop.on_readable(left, None)
        loop.turn(0)
        assert seen == ["write", "read"]


def test_a_peer_that_goes_is_noticed_without_reading(loop: Loop) -> None:
    seen: list[str] = []

    def gone() -> None:
        seen.append("gone")
        loop.on_hang_up(left, None)

    left, right = socket.socketpair()
    with left:
        loop.on_hang_up(left, gone)
        right.send(b"unread")
        loop.turn(0)
        assert seen == []
        right.close()
        loop.turn(0)
        loop.turn(0)
        assert seen == ["gone"]
        loop.on_readable(left, lambda: seen.append("read"))
        loop.turn(0)
        assert seen == ["gone", "read"]
        loop.forget(left)


def test_a_peer_that_says_no_more_is_no_reason_to_write(loop: Loop) -> None:
    seen: list[str] = []
    left, right = socket.socketpair()
    left.setblocking(False)
    with left, right:
        while True:
            try:
                left.send(bytes(1 << 16))
            except BlockingIOError:
                break
        loop.on_writable(left, lambda: seen.append("write"))
        loop.on_hang_up(left, lambda: seen.append("gone"))
        right.shutdown(socket.SHUT_WR)
        loop.turn(0)
        assert seen == ["gone"]
        loop.forget(left)


def test_a_callback_may_forget_another_of_the_same_turn(loop: Loop) -> None:
    seen: list[str] = []
    first, second = Event(), Event()

    def forget(mine: str, other: Event) -> None:
        seen.append(mine)
        loop.forget(other)

    loop.on_readable(first, lambda: forget("first", second))
    loop.on_readable(second, lambda: forget("second", first))
    first.signal()
    second.signal()
    loop.turn(0)

    assert len(seen) == 1
    first.close()
    second.close()


def test_what_a_poll_said_of_an_fd_does_not_hold_for_the_next_one_with_its_number(
    loop: Loop,
) -> None:
    woken: list[str] = []
    first, second, third = Event(), Event(), None

    def replace(mine: Event, other: Event) -> None:
        nonlocal third
        mine.clear()
        number = other.fileno()
        loop.forget(other)
        other.close()
        third = Event()
        assert third.fileno() == number
        loop.on_readable(third, lambda: woken.append("third"))

    loop.on_readable(first, lambda: replace(first, second))
    loop.on_readable(second, lambda: replace(second, first))
    first.signal()
    second.signal()
    loop.turn(0)
    assert isinstance(third, Event)
    assert woken == []

    third.signal()
    loop.turn(0)
    assert woken == ["third"]
    for event in (first, second, third):
        event.close()


def test_who_was_kept_waiting_by_the_turn_before_is_known() -> None:
    clock = Clock()
    loop = Loop(clock)
    since: list[float] = []

    def busy() -> None:
        slow.clear()
        clock.now += 6
        waiting.signal()

    with Event() as slow, Event() as waiting:
        loop.on_readable(slow, busy)
        loop.on_readable(waiting, lambda: since.append(loop.ready_since))
        slow.signal()
        loop.turn(0)
        assert since == []
        loop.turn(0)
        loop.turn(0)
        loop.forget(slow)
        loop.forget(waiting)
    loop.close()

    assert since == [100.0, 106.0]


def test_what_a_poll_had_to_wait_for_has_not_been_waiting() -> None:
    # Made; then the poll begins, has ended, and timers are looked at.
    times = iter([100.0, 101.0, 150.0, 150.0])
    loop = Loop(lambda: next(times))
    loop.turn(0)
    loop.close()

    assert loop.ready_since == 150.0


def test_timers_fire_in_order_and_not_before_their_time() -> None:
    clock = Clock()
    loop = Loop(clock)
    seen: list[str] = []
    loop.call_later(2, lambda: seen.append("late"))
    loop.call_later(1, lambda: seen.append("early"))
    cancelled = loop.call_later(1, lambda: seen.append("never"))
    cancelled.cancel()
    loop.turn(0)
    assert seen == []
    clock.now += 1
    loop.turn(0)
    assert seen == ["early"]
    clock.now += 1
    loop.turn(0)
    assert seen == ["early", "late"]
    loop.close()


def test_soon_runs_in_the_next_turn_even_when_asked_for_by_a_soon(loop: Loop) -> None:
    seen: list[str] = []

    def first() -> None:
        seen.append("first")
        loop.call_soon(lambda: seen.append("second"))

    loop.call_soon(first)
    loop.turn()
    assert seen == ["first"]
    loop.turn()
    assert seen == ["first", "second"]


def test_stop_ends_run(loop: Loop) -> None:
    loop.call_soon(loop.stop)
    loop.run()


def test_a_closed_source_is_refused(loop: Loop) -> None:
    event = Event()
    event.close()

    with pytest.raises(UsageError, match="-1"):
        loop.on_readable(event, lambda: None)


def test_forgetting_after_the_owner_closed_the_fd_is_harmless(loop: Loop) -> None:
    event = Event()
    fd = os.dup(event.fileno())
    loop.on_readable(fd, lambda: None)
    os.close(fd)

    loop.forget(fd)
    event.close()


def test_an_exception_of_a_callback_is_not_swallowed(loop: Loop) -> None:
    def broken() -> None:
        raise RuntimeError("ours")

    loop.call_soon(broken)
    with pytest.raises(RuntimeError, match="ours"):
        loop.turn()
