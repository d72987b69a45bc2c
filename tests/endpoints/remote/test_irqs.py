"""Eventfds go through to the device, whatever it can do with them."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.remote.scripted import EVENTFD, INTX, MSI, MSIX, REQ, Shape
from viommu.errors import PeerError
from viommu.spec import vfio
from viommu.spec.vfio_user import Command
from viommu.vfio_user import IrqInfo
from viommu.vfio_user.protocol import Capabilities

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.endpoints.remote.conftest import Rig

ASSIGN = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
DISABLE = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER
MASK = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_MASK
UNMASK = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_UNMASK
RESAMPLE = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_UNMASK


def tell(rig: Rig, flags: int, index: int, start: int, count: int, *, fds: int = 0) -> list[int]:
    """What the VMM says; return the eventfds, as it has them itself."""
    assert rig.lines is not None
    mine = [rig.eventfd() for _ in range(fds)]
    theirs = [os.dup(fd) for fd in mine]
    rig.lines.set_irqs(vfio.IRQ_SET.pack(20, flags, index, start, count), theirs)
    for fd in theirs:
        os.close(fd)
    rig.turn()
    return mine


def told(rig: Rig) -> list[tuple[int, ...]]:
    return [entry[1:] for entry in rig.stage.device.writes() if entry[0] == "irqs"]


def count_eventfds() -> int:
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory itself
            count += "eventfd" in str(path.readlink())
    return count


@pytest.fixture
def resizable(make: Callable[..., Rig]) -> Rig:
    shape = Shape()
    shape.capabilities = Capabilities(3)
    shape.irqs[MSIX] = IrqInfo(8, EVENTFD)
    rig = make(shape).start()
    rig.connect()
    return rig


def test_the_device_signals_the_vmm_itself(resizable: Rig) -> None:
    first, second = tell(resizable, ASSIGN, MSIX, 2, 2, fds=2)

    os.eventfd_write(resizable.stage.device.eventfds[MSIX, 3], 5)

    assert os.eventfd_read(second) == 5
    with pytest.raises(BlockingIOError):
        os.eventfd_read(first)


def test_no_more_at_a_time_than_the_device_takes(resizable: Rig) -> None:
    tell(resizable, ASSIGN, MSIX, 0, 7, fds=7)

    assert told(resizable) == [
        (ASSIGN, MSIX, 0, 3, 3),
        (ASSIGN, MSIX, 3, 3, 3),
        (ASSIGN, MSIX, 6, 1, 1),
    ]


def test_vectors_come_and_go_one_by_one(resizable: Rig) -> None:
    tell(resizable, ASSIGN, MSIX, 0, 1)
    tell(resizable, ASSIGN, MSIX, 0, 1, fds=1)
    tell(resizable, ASSIGN, MSIX, 5, 1, fds=1)
    tell(resizable, DISABLE, MSIX, 0, 0)
    tell(resizable, DISABLE, MSIX, 0, 0)

    assert told(resizable) == [
        (ASSIGN, MSIX, 0, 1, 0),
        (ASSIGN, MSIX, 0, 1, 1),
        (ASSIGN, MSIX, 5, 1, 1),
        (DISABLE, MSIX, 0, 0, 0),
    ]
    assert resizable.stage.device.eventfds == {}


def test_a_device_that_can_not_add_a_vector_gets_all_of_them(rig: Rig) -> None:
    rig.connect()
    tell(rig, ASSIGN, MSIX, 1, 1, fds=1)
    tell(rig, ASSIGN, MSIX, 1, 1, fds=1)
    tell(rig, ASSIGN, MSIX, 4, 1, fds=1)

    assert told(rig) == [
        (ASSIGN, MSIX, 1, 1, 1),
        (ASSIGN, MSIX, 1, 1, 1),
        (DISABLE, MSIX, 0, 0, 0),
        (ASSIGN, MSIX, 0, 1, 0),
        (ASSIGN, MSIX, 1, 1, 1),
        (ASSIGN, MSIX, 2, 2, 0),
        (ASSIGN, MSIX, 4, 1, 1),
    ]
    assert sorted(rig.stage.device.eventfds) == [(MSIX, 1), (MSIX, 4)]


def test_a_pin_is_masked_by_the_device(rig: Rig) -> None:
    rig.connect()
    tell(rig, ASSIGN, INTX, 0, 1, fds=1)
    tell(rig, MASK, INTX, 0, 1)
    tell(rig, UNMASK, INTX, 0, 1)
    tell(rig, RESAMPLE, INTX, 0, 1, fds=1)

    assert told(rig) == [
        (ASSIGN, INTX, 0, 1, 1),
        (MASK, INTX, 0, 1, 0),
        (UNMASK, INTX, 0, 1, 0),
        (RESAMPLE, INTX, 0, 1, 1),
    ]


def test_kinds_that_only_a_vmm_wants_end_here(rig: Rig) -> None:
    rig.connect()
    tell(rig, ASSIGN, REQ, 0, 1, fds=1)
    tell(rig, DISABLE, REQ, 0, 0)

    assert told(rig) == []
    assert rig.function.irq_info(MSI).count == 0


def test_what_the_device_refuses_is_said(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.connect()
    rig.stage.device.refuse[Command.DEVICE_SET_IRQS] = errno.EINVAL

    tell(rig, ASSIGN, MSIX, 0, 1, fds=1)

    assert "00:07.0: interrupts can't be set up" in caplog.text
    counters = rig.function.describe()["counters"]
    assert isinstance(counters, dict)
    assert counters["refused interrupts"] == 1


def test_a_dead_device_is_told_nothing_and_later_everything(rig: Rig) -> None:
    rig.connect()
    tell(rig, ASSIGN, MSIX, 0, 2, fds=2)
    rig.write(0, 0, b"\1")
    rig.kill()
    tell(rig, ASSIGN, MSIX, 3, 1, fds=1)
    tell(rig, MASK, INTX, 0, 1)
    tell(rig, ASSIGN, INTX, 0, 1, fds=1)
    tell(rig, DISABLE, INTX, 0, 0)

    rig.function.reset()
    rig.turn()

    assert told(rig) == [
        (ASSIGN, MSIX, 0, 2, 2),
        (ASSIGN, MSIX, 2, 1, 0),
        (ASSIGN, MSIX, 3, 1, 1),
    ]


def test_a_device_that_starts_again_gets_what_unmasks_its_pin(rig: Rig) -> None:
    rig.connect()
    tell(rig, ASSIGN, INTX, 0, 1, fds=1)
    tell(rig, RESAMPLE, INTX, 0, 1, fds=1)
    rig.kill()
    tell(rig, RESAMPLE, INTX, 0, 1, fds=1)

    rig.turn(40)
    assert told(rig) == [(ASSIGN, INTX, 0, 1, 1), (RESAMPLE, INTX, 0, 1, 1)]

    rig.kill()
    tell(rig, RESAMPLE, INTX, 0, 1)
    rig.turn(40)
    assert told(rig) == [(ASSIGN, INTX, 0, 1, 1)]

    tell(rig, RESAMPLE, INTX, 0, 1, fds=1)
    tell(rig, DISABLE, INTX, 0, 0)
    tell(rig, ASSIGN, INTX, 0, 1, fds=1)
    rig.kill()
    rig.turn(40)
    assert told(rig) == [(ASSIGN, INTX, 0, 1, 1)]

    tell(rig, RESAMPLE, INTX, 0, 1, fds=1)
    before = count_eventfds()
    rig.stage.absent = PeerError(errno.ECONNREFUSED, "nobody is there")
    rig.kill()
    closed_by_device = before - count_eventfds()
    rig.function.close()
    assert before - count_eventfds() == closed_by_device + 1


def many(make: Callable[..., Rig], at_a_time: int = 16) -> Rig:
    shape = Shape()
    shape.capabilities = Capabilities(at_a_time)
    shape.irqs[MSIX] = IrqInfo(256, EVENTFD)
    rig = make(shape).start()
    rig.connect()
    return rig


def test_more_interrupts_than_may_be_under_way_wait(make: Callable[..., Rig]) -> None:
    rig = many(make)
    mine = [fd for start in range(0, 192, 16) for fd in tell(rig, ASSIGN, MSIX, start, 16, fds=16)]
    rig.kill()
    rig.turn(40)
    device = rig.stage.device
    assert len(device.eventfds) == 128, "of more the client must be answered first"

    rig.turn(1)

    assert sorted(device.eventfds) == [(MSIX, vector) for vector in range(192)]
    for vector, fd in enumerate(mine):
        os.eventfd_write(device.eventfds[MSIX, vector], 1)
        assert os.eventfd_read(fd) == 1
    assert rig.function.describe()["counters"]["refused interrupts"] == 0  # type: ignore[index]


def test_what_waits_is_told_as_it_is_by_then(make: Callable[..., Rig]) -> None:
    rig = many(make)
    device = rig.stage.device
    device.mute = {Command.DEVICE_SET_IRQS}
    for start in range(0, 192, 16):
        tell(rig, ASSIGN, MSIX, start, 16, fds=16)
    tell(rig, ASSIGN, MSIX, 150, 1)
    tell(rig, ASSIGN, MSIX, 151, 1, fds=1)
    device.answer_waiting()
    rig.turn()
    told(rig)

    rig.turn(1)

    assert told(rig) == [
        (ASSIGN, MSIX, 128, 16, 16),
        (ASSIGN, MSIX, 144, 6, 6),
        (ASSIGN, MSIX, 151, 16, 16),
        (ASSIGN, MSIX, 167, 16, 16),
        (ASSIGN, MSIX, 183, 9, 9),
    ]
    rig.turn(1)
    assert told(rig) == []


@pytest.mark.parametrize("how", ["disabled", "disconnected", "dead"])
def test_what_waits_is_forgotten(make: Callable[..., Rig], how: str) -> None:
    rig = many(make)
    device = rig.stage.device
    device.mute = {Command.DEVICE_SET_IRQS}
    for start in range(0, 192, 16):
        tell(rig, ASSIGN, MSIX, start, 16, fds=16)
    match how:
        case "disabled":
            tell(rig, DISABLE, MSIX, 0, 0)
        case "disconnected":
            rig.disconnect()
        case _:
            rig.stage.absent = PeerError(errno.ECONNREFUSED, "nobody is there")
            rig.kill()
    if device.open:
        device.answer_waiting()
    rig.turn()

    rig.turn(1)

    assert device.eventfds == {}


def test_a_message_never_has_all_that_may_be_under_way(make: Callable[..., Rig]) -> None:
    rig = many(make, at_a_time=250)
    for start in range(0, 64, 16):
        tell(rig, ASSIGN, MSIX, start, 16, fds=16)
    rig.kill()

    rig.turn(40)

    assert [entry[1:4] for entry in told(rig)] == [(MSIX, 0, 32), (MSIX, 32, 32)]
