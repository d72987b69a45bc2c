"""What is asked of a vIOMMU, byte for byte, and how its events are read; no iommufd is needed.

What the real one answers is tested in ``guest_tests/l1``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, cast

import pytest

from viommu.errors import BackendError
from viommu.spec.iommufd import HwQueueType, Ioctl, VeventqType, ViommuType
from viommu_backends import iommufd_viommu
from viommu_backends.iommufd_viommu import Vevent, VeventQueue, Viommu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu_backends.iommufd_context import Iommufd

LAST = (1 << 31) - 1  # sequence number


class Context:
    """An iommufd as far as vIOMMUs need one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.destroyed: list[int] = []

    def fileno(self) -> int:
        return self.fd

    def destroy(self, number: int) -> None:
        self.destroyed.append(number)

    @property
    def iommufd(self) -> Iommufd:
        return cast("Iommufd", self)


class Kernel:
    """Takes every ioctl; ids and the fd of a queue of events are ``answers``."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.answers = {
            Ioctl.VIOMMU_ALLOC: (20, (7,)),
            Ioctl.VDEVICE_ALLOC: (12, (8,)),
            Ioctl.HW_QUEUE_ALLOC: (20, (9,)),
            Ioctl.VEVENTQ_ALLOC: (20, (10, 0)),
        }

    def ask(self, _: int, request: Ioctl, argument: bytearray, what: str) -> int:
        self.asked.append((request, bytes(argument)))
        offset, words = self.answers[request]
        struct.pack_into(f"<{len(words)}I", argument, offset, *words)
        if request == Ioctl.VIOMMU_ALLOC:
            (size,) = struct.unpack_from("<I", argument, 24)
            (address,) = struct.unpack_from("<Q", argument, 32)
            ctypes.memset(address, 0xAB, size)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(iommufd_viommu, "ask", kernel.ask)
    return kernel


@pytest.fixture
def viommu(kernel: Kernel) -> Viommu:
    viommu = Viommu(Context(3).iommufd, ViommuType.ARM_SMMUV3, 1, 2)
    kernel.asked.clear()
    return viommu


def test_a_viommu_without_a_structure(kernel: Kernel) -> None:
    viommu = Viommu(Context(3).iommufd, ViommuType.ARM_SMMUV3, 1, 2)

    assert viommu.number == 7
    expected = struct.pack("<8IQ", 40, 0, 1, 1, 2, 0, 0, 0, 0)
    assert kernel.asked == [(Ioctl.VIOMMU_ALLOC, expected)]


def test_a_driver_answers_in_its_structure(kernel: Kernel) -> None:
    data = bytearray(16)
    Viommu(Context(3).iommufd, ViommuType.TEGRA241_CMDQV, 1, 2, data)

    assert data == b"\xab" * 16
    ((_, argument),) = kernel.asked
    assert struct.unpack_from("<8I", argument) == (40, 0, 2, 1, 2, 0, 16, 0)


def test_what_is_made_of_it(kernel: Kernel, viommu: Viommu) -> None:
    assert viommu.alloc_device(1, 0x1_0000_0208) == 8
    assert viommu.alloc_queue(HwQueueType.TEGRA241_CMDQV, 1, 0x4000_0000, 0x2000) == 9

    assert kernel.asked == [
        (Ioctl.VDEVICE_ALLOC, struct.pack("<4IQ", 24, 7, 1, 0, 0x1_0000_0208)),
        (Ioctl.HW_QUEUE_ALLOC, struct.pack("<6IQQ", 40, 0, 7, 1, 1, 0, 0x4000_0000, 0x2000)),
    ]


def test_it_is_destroyed_by_its_number(kernel: Kernel) -> None:
    context = Context(3)
    Viommu(context.iommufd, ViommuType.ARM_SMMUV3, 1, 2).destroy()

    assert context.destroyed == [7]


CALLS: dict[str, Callable[[Viommu], object]] = {
    "device": lambda viommu: viommu.alloc_device(1, 2),
    "queue": lambda viommu: viommu.alloc_queue(1, 0, 0, 0x1000),
    "events": lambda viommu: viommu.alloc_events(1, 2, 32),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_file_that_is_no_iommufd_knows_nothing(
    viommu: Viommu, call: Callable[[Viommu], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # from here on the real kernel is asked
    fd = os.memfd_create("other")
    context = Context(fd)
    viommu._context = context.iommufd

    for number in (errno.ENOTTY, errno.EBADF):
        with pytest.raises(BackendError, match="vIOMMU 7") as caught:
            call(viommu)
        assert caught.value.errno == number
        if context.fd >= 0:
            os.close(fd)
        context.fd = -1


def test_a_file_that_is_no_iommufd_has_no_viommu() -> None:
    with pytest.raises(BackendError) as caught:
        Viommu(Context(-1).iommufd, ViommuType.ARM_SMMUV3, 1, 2)
    assert caught.value.errno == errno.EBADF


class Events:
    """A queue of events of four bytes, and the end that the kernel has."""

    def __init__(self, kernel: Kernel) -> None:
        self.context = Context(3)
        reader, self.writer = os.pipe2(os.O_NONBLOCK)
        kernel.answers[Ioctl.VEVENTQ_ALLOC] = (20, (10, reader))
        viommu = Viommu(self.context.iommufd, ViommuType.ARM_SMMUV3, 1, 2)
        self.queue = viommu.alloc_events(VeventqType.ARM_SMMUV3, 16, 4)

    def write(self, *events: tuple[int, bytes | None]) -> None:
        for sequence, data in events:
            os.write(self.writer, struct.pack("<II", data is None, sequence) + (data or b""))


@pytest.fixture
def events(kernel: Kernel) -> Iterator[Events]:
    events = Events(kernel)
    yield events
    events.queue.close()
    os.close(events.writer)


def test_a_queue_is_asked_for_by_kind_and_depth(kernel: Kernel, events: Events) -> None:
    expected = struct.pack("<8I", 32, 0, 7, 1, 16, 0, 0, 0)
    assert kernel.asked[-1] == (Ioctl.VEVENTQ_ALLOC, expected)
    assert events.queue.number == 10


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([(0, b"zero")], [Vevent(0, 0, b"zero")]),
        ([(0, b"zero"), (1, b"one.")], [Vevent(0, 0, b"zero"), Vevent(1, 0, b"one.")]),
        ([(0, b"zero"), (3, b"thre")], [Vevent(0, 0, b"zero"), Vevent(3, 2, b"thre")]),
        ([(0, b"zero"), (1, None)], [Vevent(0, 0, b"zero"), Vevent(1, 1, None)]),
        (
            [(0, b"zero"), (3, None), (4, b"four")],
            [Vevent(0, 0, b"zero"), Vevent(3, 3, None), Vevent(4, 0, b"four")],
        ),
    ],
)
def test_lost_events_are_counted(
    events: Events, written: list[tuple[int, bytes | None]], read: list[Vevent]
) -> None:
    events.write(*written)

    assert events.queue.read() == read


def test_lost_events_are_counted_from_one_read_to_the_next(events: Events) -> None:
    events.write((LAST - 1, b"last"))
    assert events.queue.read() == [Vevent(LAST - 1, LAST - 1, b"last")]
    events.write((2, b"next"))
    assert events.queue.read() == [Vevent(2, 3, b"next")]
    events.write((3, None))
    assert events.queue.read() == [Vevent(3, 1, None)]


@pytest.mark.parametrize("raw", [b"short", struct.pack("<II", 0, 0), struct.pack("<IIH", 0, 0, 0)])
def test_what_is_no_event_is_an_error(events: Events, raw: bytes) -> None:
    os.write(events.writer, raw)

    with pytest.raises(BackendError) as caught:
        events.queue.read()
    assert caught.value.errno == errno.EPROTO


def test_an_error_of_a_read_keeps_its_number(events: Events) -> None:
    with pytest.raises(BackendError, match="queue 10") as caught:
        events.queue.read()
    assert caught.value.errno == errno.EAGAIN


def test_closing_destroys_the_queue_once(events: Events) -> None:
    fd = events.queue.fileno()
    events.queue.close()
    events.queue.close()

    assert events.context.destroyed == [10]
    assert events.queue.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(BackendError) as caught:
        events.queue.read()
    assert caught.value.errno == errno.EBADF


def test_closing_after_the_context_only_closes(kernel: Kernel) -> None:
    context = Context(-1)
    queue = VeventQueue(context.iommufd, 10, os.memfd_create("events"), 4)
    queue.close()

    assert context.destroyed == []
