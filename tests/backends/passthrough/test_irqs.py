from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.backends.passthrough.fake_device import FakeVfioDevice
from viommu.errors import BackendError
from viommu.spec import vfio
from viommu.vfio_user import IrqInfo, IrqLines
from viommu_backends.passthrough.irqs import KernelIrqs
from viommu_backends.vfio_device import HostIrq

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INTX, MSI, MSIX, ERR, REQ = range(5)
ASSIGN = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
DISABLE = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER


@pytest.fixture
def eventfd() -> Iterator[Callable[[], int]]:
    made: list[int] = []

    def make() -> int:
        made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


class Rig:
    def __init__(self, device: FakeVfioDevice) -> None:
        self.device = device
        self.irqs = KernelIrqs(device)
        self.lines = IrqLines([self.irqs.info(index).count for index in range(5)])
        self.irqs.follow(self.lines)

    def assign(self, index: int, start: int, *fds: int) -> None:
        mine = [os.dup(fd) for fd in fds]
        try:
            self.lines.set_irqs(vfio.IRQ_SET.pack(20, ASSIGN, index, start, len(fds)), mine)
        finally:
            for fd in mine:
                os.close(fd)

    def none(self, index: int, start: int, count: int) -> None:
        self.lines.set_irqs(vfio.IRQ_SET.pack(20, ASSIGN, index, start, count), [])

    def disable(self, index: int) -> None:
        self.lines.set_irqs(vfio.IRQ_SET.pack(20, DISABLE, index, 0, 0), [])

    def close(self) -> None:
        self.irqs.leave()
        self.lines.close()
        self.device.close()


@pytest.fixture(params=[True, False], ids=["resizable", "fixed"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(FakeVfioDevice(resizable=request.param))
    yield rig
    rig.close()


def test_what_a_client_is_told(rig: Rig) -> None:
    told = [rig.irqs.info(index) for index in range(5)]

    assert [info.count for info in told] == [0, 1, 8, 1, 1]
    assert told[INTX] == IrqInfo(0, 0)
    assert {info.flags for info in told[1:]} == {vfio.IRQ_INFO_EVENTFD}


def test_the_kernel_signals_the_client(rig: Rig, eventfd: Callable[[], int]) -> None:
    first, second = eventfd(), eventfd()

    rig.assign(MSIX, 0, first, second)
    rig.device.signal(MSIX, 1)

    assert os.eventfd_read(second) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(first)


def test_vectors_come_one_by_one(rig: Rig, eventfd: Callable[[], int]) -> None:
    """Linux under QEMU: MSI-X is enabled with no vector, then each as it is unmasked."""
    fds = [eventfd() for _ in range(3)]

    rig.none(MSIX, 0, 1)
    for vector, fd in enumerate(fds):
        rig.assign(MSIX, vector, fd)

    for vector, fd in enumerate(fds):
        rig.device.signal(MSIX, vector)
        assert os.eventfd_read(fd) == 1


def test_only_a_kernel_that_must_is_switched_off_and_on(
    rig: Rig, eventfd: Callable[[], int]
) -> None:
    rig.assign(MSIX, 0, eventfd())
    rig.assign(MSIX, 2, eventfd())

    grown = ["irqs 2 0+0 0", "irqs 2 0+3 2"]
    resizable = not rig.device.irqs[MSIX].flags & vfio.IRQ_INFO_NORESIZE
    assert rig.device.log == ["irqs 2 0+1 1", *(["irqs 2 2+1 1"] if resizable else grown)]


def test_what_the_kernel_has_is_replaced_in_place(rig: Rig, eventfd: Callable[[], int]) -> None:
    rig.assign(MSIX, 0, eventfd(), eventfd(), eventfd())
    for vector in (0, 2, 1):
        rig.assign(MSIX, vector, eventfd())

    assert not any(line.endswith("0+0 0") for line in rig.device.log)


def test_a_replaced_eventfd_is_not_signalled_any_more(rig: Rig, eventfd: Callable[[], int]) -> None:
    old, new = eventfd(), eventfd()
    rig.assign(MSIX, 0, old)
    rig.assign(MSIX, 0, new)

    rig.device.signal(MSIX, 0)

    assert os.eventfd_read(new) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(old)


def test_switching_off_reaches_the_kernel_once(rig: Rig, eventfd: Callable[[], int]) -> None:
    rig.assign(MSIX, 0, eventfd())

    rig.disable(MSIX)
    rig.disable(MSIX)

    assert rig.device.eventfds == {}
    assert rig.device.log.count("irqs 2 0+0 0") == 1


def test_what_is_not_the_kernel_s_stays_here(rig: Rig, eventfd: Callable[[], int]) -> None:
    fd = eventfd()
    rig.assign(REQ, 0, fd)

    assert rig.device.log == []
    assert rig.lines.trigger(REQ, 0)
    assert os.eventfd_read(fd) == 1


def test_errors_of_the_device_reach_the_client_if_the_host_tells_them(
    rig: Rig, eventfd: Callable[[], int]
) -> None:
    fd = eventfd()
    rig.assign(ERR, 0, fd)
    rig.device.signal(ERR, 0)
    assert os.eventfd_read(fd) == 1

    rig.disable(ERR)
    rig.device.irqs[ERR] = HostIrq(0, 0)
    rig.device.log.clear()
    rig.assign(ERR, 0, fd)

    assert rig.device.log == []


def test_a_refusal_refuses_the_client_and_leaves_what_there_was(
    rig: Rig, eventfd: Callable[[], int]
) -> None:
    first, second = eventfd(), eventfd()
    rig.assign(MSIX, 0, first)
    rig.device.refuse = errno.ENOSPC

    with pytest.raises(BackendError):
        rig.assign(MSIX, 1, second)

    assert rig.lines.vectors(MSIX) == [0]
    rig.device.signal(MSIX, 0)
    assert os.eventfd_read(first) == 1


def test_nobody_is_followed_for_ever(rig: Rig, eventfd: Callable[[], int]) -> None:
    rig.assign(MSIX, 0, eventfd())
    rig.irqs.leave()
    assert rig.device.eventfds == {}
    rig.device.log.clear()

    rig.assign(MSIX, 0, eventfd())
    rig.lines.close()

    assert rig.device.log == []


def test_a_device_that_is_gone_is_left_all_the_same(
    rig: Rig,
    eventfd: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig.assign(MSIX, 0, eventfd())

    def gone(*_: object) -> None:
        raise BackendError(errno.ENODEV, "interrupts")

    with monkeypatch.context() as pulled_out:
        pulled_out.setattr(rig.device, "set_irqs", gone)
        rig.irqs.leave()

    assert "can't be switched off" in caplog.text
