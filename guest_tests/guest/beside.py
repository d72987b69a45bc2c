"""Two devices at the same time, each on a CPU of its own: one is waited for, the other works."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from guest_tests.guest.edu import FINISH, Edu
from guest_tests.guest.vfio import Container, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["held_unmap"]

_PAGE = 4096
_IOVA = 0x100000
# The CPU that waits has its interrupts off, and the first one keeps the time.
_WAITS, _WORKS = 1, 0


def held_unmap(bdf: str, other: str, milliseconds: int) -> dict[str, Any]:
    """Unmap memory while a device holds it for ``milliseconds``, and let another one do DMA.

    Returns how long the guest's unmap took (seconds), the device's times (nanoseconds of its
    clock), whether its data had arrived, and when the transfers of the other one ended, in
    seconds from the beginning of the unmap.

    Raises:
        AssertionError: A transfer of either went wrong.
    """
    memory = Memory(_PAGE)
    with Container(bdf) as container, _busy(other) as ended:
        device = Edu(container.devices[bdf])
        container.map(_IOVA, memory)
        memory[0:64] = data = os.urandom(64)
        assert device.read(_IOVA, 64) == "ok"
        memory[0:64] = bytes(64)
        device.hold(milliseconds, FINISH)
        with _on_cpu(_WAITS):
            device.start_write(_IOVA, 64)
            before = time.monotonic()
            assert container.unmap(_IOVA, _PAGE) == _PAGE
            after = time.monotonic()
        arrived = memory[0:64] == data
        assert device.wait() == "ok"
        return {
            "seconds": after - before,
            "arrived": arrived,
            "times": device.times(),
            "others": [when - before for when in ended],
        }


@contextlib.contextmanager
def _busy(bdf: str) -> Iterator[list[float]]:
    """Let a device copy memory all the time; gives when each transfer has ended."""
    ended: list[float] = []
    failures: list[BaseException] = []
    started, stop = threading.Event(), threading.Event()

    def copy() -> None:
        try:
            memory = Memory(_PAGE)
            with Container(bdf) as container, _on_cpu(_WORKS):
                device = Edu(container.devices[bdf])
                container.map(_IOVA, memory)
                while not stop.is_set():
                    memory[0:8] = data = len(ended).to_bytes(8, "little")
                    assert device.read(_IOVA, 8) == "ok"
                    assert device.write(_IOVA + 8, 8) == "ok"
                    assert memory[8:16] == data
                    ended.append(time.monotonic())
                    started.set()
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            failures.append(error)
            started.set()

    copier = threading.Thread(target=copy)
    copier.start()
    try:
        started.wait()
        yield ended
    finally:
        stop.set()
        copier.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _on_cpu(number: int) -> Iterator[None]:
    """Stay on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
