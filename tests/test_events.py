"""Eventfds."""

import os
import select
from pathlib import Path

from viommu.events import Event


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_an_event_is_readable_once_signalled_until_cleared() -> None:
    with Event() as event:
        assert not readable(event.fileno())
        event.signal()
        event.signal()
        assert readable(event.fileno())
        assert event.is_set()
        assert event.clear()
        assert not event.clear()
        assert not event.is_set()


def test_a_closed_event_has_no_fd_and_closes_twice() -> None:
    event = Event()
    fd = event.fileno()

    event.close()
    event.close()

    assert event.fileno() == -1
    assert not Path(f"/proc/self/fd/{fd}").exists()


def test_events_do_not_leak_into_children() -> None:
    with Event() as event:
        assert not os.get_inheritable(event.fileno())
