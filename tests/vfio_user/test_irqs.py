"""SET_IRQS: names of what is refused are those of libvfio-user's tests."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import open_fds
from viommu.errors import BackendError, PeerError
from viommu.spec import vfio
from viommu.vfio_user.irqs import IrqLines, IrqSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NONE, BOOL, EVENTFD = (
    vfio.IRQ_SET_DATA_NONE,
    vfio.IRQ_SET_DATA_BOOL,
    vfio.IRQ_SET_DATA_EVENTFD,
)
MASK, UNMASK, TRIGGER = (
    vfio.IRQ_SET_ACTION_MASK,
    vfio.IRQ_SET_ACTION_UNMASK,
    vfio.IRQ_SET_ACTION_TRIGGER,
)
INTX, MSI, MSIX, ERR, REQ = range(5)
FULL = 2**64 - 2


@pytest.fixture
def lines() -> Iterator[IrqLines]:
    lines = IrqLines((1, 0, 2048, 1, 1))
    yield lines
    lines.close()


def irq_set(
    flags: int, index: int, start: int, count: int, data: bytes = b"", *, argsz: int | None = None
) -> bytes:
    size = 20 + len(data) if argsz is None else argsz
    return vfio.IRQ_SET.pack(size, flags, index, start, count) + data


def assign(lines: IrqLines, start: int, *fds: int, index: int = MSIX) -> None:
    """Assign duplicates, as they come over a socket."""
    mine = [os.dup(fd) for fd in fds]
    lines.set_irqs(irq_set(EVENTFD | TRIGGER, index, start, len(fds)), mine)
    assert mine == [], "all are kept"


def raised(fd: int) -> int:
    """How often an eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


REFUSED: dict[str, tuple[bytes, int]] = {
    "no_irq_set": (b"", 0),
    "short_write": (bytes(8), 0),
    "bad_argsz": (irq_set(TRIGGER | NONE, MSIX, 0, 0, argsz=3), 0),
    "bad_index": (irq_set(TRIGGER | NONE, 5, 0, 0), 0),
    "bad_flags_mask_and_unmask": (irq_set(MASK | UNMASK | NONE, MSIX, 0, 1), 0),
    "bad_flags_none_and_bool": (irq_set(MASK | NONE | BOOL, MSIX, 0, 1, b"\1"), 0),
    "no action": (irq_set(NONE, MSIX, 0, 1), 0),
    "no data": (irq_set(TRIGGER, MSIX, 0, 1), 0),
    "unknown flag": (irq_set(TRIGGER | NONE | 64, MSIX, 0, 1), 0),
    "bad_start_count_range": (irq_set(TRIGGER | NONE, MSIX, 2047, 2), 0),
    "bad_start_count_range2": (irq_set(TRIGGER | NONE, MSIX, 2049, 1), 0),
    "start behind the last": (irq_set(TRIGGER | NONE, MSIX, 2048, 1), 0),
    "bad_start_overflow": (irq_set(TRIGGER | NONE, MSIX, 284, 2**32 - 1), 0),
    "bad_action_for_err_irq": (irq_set(MASK | NONE, ERR, 0, 1), 0),
    "bad_action_for_req_irq": (irq_set(MASK | NONE, REQ, 0, 1), 0),
    "bad_count_for_err_irq": (irq_set(TRIGGER | NONE, ERR, 0, 2), 0),
    "bad_count_for_req_irq": (irq_set(TRIGGER | NONE, REQ, 0, 2), 0),
    "bad_start_for_count_0": (irq_set(TRIGGER | NONE, MSIX, 1, 0), 0),
    "bad_action_for_count_0": (irq_set(MASK | NONE, MSIX, 0, 0), 0),
    "bad_action_and_data_type_for_count_0": (irq_set(TRIGGER | BOOL, MSIX, 0, 0), 0),
    "eventfds, none of them": (irq_set(TRIGGER | EVENTFD, MSIX, 0, 0), 0),
    "bad_fds_for_data_bool": (irq_set(TRIGGER | BOOL, MSIX, 0, 1, b"\1"), 1),
    "bad_fds_for_data_none": (irq_set(TRIGGER | NONE, MSIX, 0, 1), 1),
    "bad_fds_for_count_2": (irq_set(TRIGGER | EVENTFD, MSIX, 0, 2), 1),
    "more fds than count": (irq_set(TRIGGER | EVENTFD, MSIX, 0, 1), 2),
    "bad_bool_count short": (irq_set(TRIGGER | BOOL, MSIX, 0, 2, b"\1"), 0),
    "bad_bool_count long": (irq_set(TRIGGER | BOOL, MSIX, 0, 1, b"\1\1"), 0),
    "an index without interrupts": (irq_set(TRIGGER | NONE, MSI, 0, 0), 0),
    "an index without interrupts, one": (irq_set(TRIGGER | NONE, MSI, 0, 1), 0),
}


@pytest.mark.parametrize(("payload", "nr_fds"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changes(
    lines: IrqLines, eventfd: Callable[..., int], payload: bytes, nr_fds: int
) -> None:
    fd = eventfd()
    assign(lines, 0, fd)
    fds = [eventfd() for _ in range(nr_fds)]
    sent = list(fds)
    with pytest.raises(PeerError, match="SET_IRQS") as caught:
        lines.set_irqs(payload, fds)
    assert caught.value.errno == errno.EINVAL
    assert fds == sent, "nothing was taken"
    assert lines.vectors(MSIX) == [0]
    assert raised(fd) == 0


def test_disable(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    one, other = eventfd(), eventfd()
    assign(lines, 3, one)
    assign(lines, 0, other, index=ERR)
    lines.set_irqs(irq_set(TRIGGER | NONE, MSIX, 0, 0), [])
    assert not lines.trigger(MSIX, 3)
    assert lines.trigger(ERR, 0)
    assert (raised(one), raised(other)) == (0, 1)


def test_enable_and_trigger(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fds = [eventfd() for _ in range(8)]
    assign(lines, 2040, *fds)
    assert lines.vectors(MSIX) == list(range(2040, 2048))
    assert lines.trigger(MSIX, 2047)
    assert lines.trigger(MSIX, 2047)
    assert [raised(fd) for fd in fds] == [0] * 7 + [2]


def test_enable_update_closes_the_old_one(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    old, new = eventfd(), eventfd()
    assign(lines, 0, old)
    before = open_fds()
    assign(lines, 0, new)
    assert open_fds() == before
    assert lines.trigger(MSIX, 0)
    assert (raised(old), raised(new)) == (0, 1)


def test_a_message_without_fds_de_assigns(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fds = [eventfd() for _ in range(4)]
    assign(lines, 0, *fds)
    lines.set_irqs(irq_set(TRIGGER | EVENTFD, MSIX, 1, 2), [])
    assert lines.vectors(MSIX) == [0, 3]
    # What QEMU sends when MSI-X is enabled and no vector is used yet.
    lines.set_irqs(irq_set(TRIGGER | EVENTFD, MSIX, 0, 1), [])
    assert lines.vectors(MSIX) == [3]
    assert not lines.trigger(MSIX, 0)


def test_trigger_none(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    one, two = eventfd(4), eventfd(8)
    assign(lines, 0, one, two)
    lines.set_irqs(irq_set(TRIGGER | NONE, MSIX, 1, 1), [])
    assert (raised(one), raised(two)) == (4, 9)


def test_trigger_bool(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    one, two = eventfd(4), eventfd(8)
    assign(lines, 0, one, two)
    lines.set_irqs(irq_set(TRIGGER | BOOL, MSIX, 0, 2, b"\0\1"), [])
    assert (raised(one), raised(two)) == (4, 9)


def test_trailing_bytes_are_ignored(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fds = [eventfd(), eventfd()]
    assign(lines, 0, *fds)
    for junk in (b"\0", b"junk"):
        lines.set_irqs(irq_set(TRIGGER | NONE, MSIX, 0, 2, junk, argsz=20), [])
        assert [raised(fd) for fd in fds] == [1, 1]


def test_a_masked_interrupt_waits(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fd = eventfd()
    assign(lines, 0, fd, index=INTX)
    lines.set_irqs(irq_set(MASK | NONE, INTX, 0, 1), [])
    assert not lines.trigger(INTX, 0)
    assert not lines.trigger(INTX, 0)
    assert raised(fd) == 0
    lines.set_irqs(irq_set(UNMASK | NONE, INTX, 0, 1), [])
    assert raised(fd) == 1
    lines.set_irqs(irq_set(UNMASK | BOOL, INTX, 0, 1, b"\1"), [])
    assert raised(fd) == 0
    assert lines.trigger(INTX, 0)


def test_a_mask_ends_with_the_interrupts(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fd = eventfd()
    assign(lines, 0, fd)
    lines.set_irqs(irq_set(MASK | NONE, MSIX, 0, 1), [])
    lines.trigger(MSIX, 0)
    lines.set_irqs(irq_set(TRIGGER | NONE, MSIX, 0, 0), [])
    assign(lines, 0, fd)
    assert lines.trigger(MSIX, 0)
    assert raised(fd) == 1


def test_resample_fds_are_accepted_and_not_kept(
    lines: IrqLines, eventfd: Callable[..., int]
) -> None:
    fd = eventfd()
    for action in (MASK, UNMASK):
        fds = [fd]
        lines.set_irqs(irq_set(EVENTFD | action, INTX, 0, 1), fds)
        assert fds == [fd]
    assert lines.vectors(INTX) == []


@pytest.mark.parametrize("kind", ["pipe", "file", "memfd"])
def test_only_eventfds_are_taken(lines: IrqLines, eventfd: Callable[..., int], kind: str) -> None:
    reader, writer = os.pipe()
    fd = {
        "pipe": lambda: os.dup(writer),
        "file": lambda: os.open("/dev/null", os.O_WRONLY),
        "memfd": lambda: os.memfd_create("x"),
    }[kind]()
    try:
        with pytest.raises(PeerError, match="not an eventfd"):
            lines.set_irqs(irq_set(EVENTFD | TRIGGER, MSIX, 0, 2), [eventfd(), fd])
        assert lines.vectors(MSIX) == []
    finally:
        for each in (reader, writer, fd):
            os.close(each)


def test_what_is_not_even_open_is_not_taken(lines: IrqLines) -> None:
    with pytest.raises(PeerError, match="not an eventfd"):
        lines.set_irqs(irq_set(EVENTFD | TRIGGER, MSIX, 0, 1), [1_000_000])


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_a_full_eventfd_never_blocks(
    lines: IrqLines, eventfd: Callable[..., int], flags: int
) -> None:
    fd = eventfd(0, flags)
    os.eventfd_write(fd, FULL)
    assign(lines, 0, fd)
    assert not lines.trigger(MSIX, 0)
    assert os.eventfd_read(fd) == FULL
    assert lines.trigger(MSIX, 0)
    assert os.eventfd_read(fd) == 1


@pytest.mark.parametrize(("index", "vector"), [(MSIX, 0), (MSIX, 4096), (7, 0), (MSIX, -1)])
def test_what_is_not_there_is_not_triggered(lines: IrqLines, index: int, vector: int) -> None:
    assert not lines.trigger(index, vector)


def test_closed_lines_are_silent(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fd = eventfd()
    assign(lines, 0, fd)
    lines.close()
    assert not lines.trigger(MSIX, 0)
    assert raised(fd) == 0


# --- an observer, for a device whose interrupts others raise


Change = tuple[int, int, tuple[bool, ...]]


@pytest.fixture
def changes(lines: IrqLines) -> Iterator[list[Change]]:
    """What an observer is told: kind, first vector, and whether each from there on is signalled."""
    changes: list[Change] = []

    def observe(index: int, start: int, fds: Sequence[int]) -> None:
        changes.append((index, start, tuple(_is_open(fd) for fd in fds)))

    lines.on_change(observe)
    yield changes
    lines.on_change(None)


def _is_open(fd: int) -> bool:
    if fd >= 0:
        os.fstat(fd)
    return fd >= 0


def test_an_observer_is_told_of_eventfds_and_of_their_end(
    lines: IrqLines, changes: list[Change], eventfd: Callable[..., int]
) -> None:
    fd = eventfd()

    assign(lines, 3, fd, fd)
    lines.set_irqs(irq_set(EVENTFD | TRIGGER, MSIX, 0, 2), [])
    lines.set_irqs(irq_set(NONE | TRIGGER, MSIX, 0, 0), [])

    assert changes == [(MSIX, 3, (True, True)), (MSIX, 0, (False, False)), (MSIX, 0, ())]


def test_an_observer_that_refuses_changes_nothing(
    lines: IrqLines, eventfd: Callable[..., int]
) -> None:
    def refuse(index: int, start: int, fds: Sequence[int]) -> None:
        if fds:
            raise BackendError(errno.ENOSPC, f"{len(fds)} interrupts from {start} of kind {index}")

    first, second = eventfd(), eventfd()
    assign(lines, 0, first)
    lines.on_change(refuse)
    before = open_fds()
    mine = [os.dup(second)]

    with pytest.raises(BackendError):
        lines.set_irqs(irq_set(EVENTFD | TRIGGER, MSIX, 0, 1), mine)

    assert len(mine) == 1, "the caller closes what isn't kept"
    os.close(mine[0])
    assert open_fds() == before
    lines.trigger(MSIX, 0)
    assert (raised(first), raised(second)) == (1, 0)


def test_nobody_is_told_of_masks_or_of_what_is_raised_by_hand(
    lines: IrqLines, changes: list[Change], eventfd: Callable[..., int]
) -> None:
    assign(lines, 0, eventfd())
    changes.clear()

    lines.set_irqs(irq_set(NONE | MASK, MSIX, 0, 1), [])
    lines.set_irqs(irq_set(NONE | TRIGGER, MSIX, 0, 1), [])
    lines.set_irqs(irq_set(NONE | UNMASK, MSIX, 0, 1), [])

    assert changes == []


def test_eventfds_by_vector(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    fd = eventfd()
    assign(lines, 1, fd)
    assign(lines, 3, fd)

    assert [known >= 0 for known in lines.fds(MSIX)] == [False, True, False, True]
    assert lines.fds(REQ) == []


def test_who_masks_itself_is_told_how(lines: IrqLines, eventfd: Callable[..., int]) -> None:
    told: list[tuple[int, int, int, int, int]] = []

    def observe(request: IrqSet, fds: Sequence[int]) -> None:
        told.append((request.action, request.index, request.start, request.count, len(fds)))

    lines.on_masking(observe)
    resample = os.dup(eventfd())
    fds = [resample]

    lines.set_irqs(irq_set(NONE | MASK, INTX, 0, 1), [])
    lines.set_irqs(irq_set(BOOL | UNMASK, MSIX, 3, 2, b"\0\1"), [])
    lines.set_irqs(irq_set(EVENTFD | UNMASK, INTX, 0, 1), fds)
    lines.set_irqs(irq_set(NONE | TRIGGER, INTX, 0, 1), [])
    lines.on_masking(None)
    lines.set_irqs(irq_set(NONE | MASK, INTX, 0, 1), [])

    assert told == [(MASK, INTX, 0, 1, 0), (UNMASK, MSIX, 3, 2, 0), (UNMASK, INTX, 0, 1, 1)]
    assert fds == [resample], "it stays the caller's"
    os.close(resample)
