"""A fault is seen at the other end, and nothing done there reaches or blocks ours."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from typing import TYPE_CHECKING

import pytest

from viommu.errors import ExportError, UsageError
from viommu.ipc.fault_line import FaultEvent, FaultLine

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def line() -> Iterator[FaultLine]:
    line = FaultLine()
    yield line
    line.close()


@pytest.fixture
def event(line: FaultLine) -> Iterator[FaultEvent]:
    event = FaultEvent(line.take_other_end())
    yield event
    event.close()
    event.close()
    assert event.fileno() == -1


def test_a_signal_is_seen_until_it_is_cleared(line: FaultLine, event: FaultEvent) -> None:
    assert not event.is_set()
    assert not event.clear()
    line.signal()
    assert event.is_set()
    assert event.is_set()
    assert event.clear()
    assert not event.is_set()


def test_it_reads_like_an_eventfd(line: FaultLine, event: FaultEvent) -> None:
    line.signal()

    assert int.from_bytes(os.read(event.fileno(), 8), "little") == 1


def test_the_end_of_the_server_is_a_fault_too(line: FaultLine, event: FaultEvent) -> None:
    line.close()

    assert event.is_set()
    assert event.clear()
    assert event.is_set()


def test_only_the_server_signals_it(event: FaultEvent) -> None:
    with pytest.raises(UsageError):
        event.signal()
    with pytest.raises(BrokenPipeError):
        os.write(event.fileno(), bytes(8))
    assert not event.is_set()


def test_a_client_that_fills_it_blocks_nobody(line: FaultLine, event: FaultEvent) -> None:
    """O_NONBLOCK of our end is not the client's to clear."""
    flags = fcntl.fcntl(event.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(event.fileno(), fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    for _ in range(10_000):
        line.signal()

    assert event.is_set()


def test_a_client_that_closes_it_has_itself_to_blame(line: FaultLine) -> None:
    os.close(line.take_other_end())
    line.signal()


def test_an_end_that_was_never_taken_is_closed() -> None:
    line = FaultLine()
    line.close()
    line.close()


def test_without_file_descriptors_there_is_none() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(ExportError, match="no event"):
            FaultLine()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
