"""Orders go out in order, a window at a time, and somebody hears when all are answered."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.backends.vfio_user.rig import PAGE, Scripted
from tests.vfio_user.conftest import Clock
from viommu.errors import BackendError, PeerError, UsageError, ViommuError
from viommu.loop import Loop
from viommu.vfio_user import ClientLimits, LoopClient, requests
from viommu.vfio_user.protocol import Capabilities, encode_version
from viommu_backends.vfio_user.orders import OrderQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.vfio_user.requests import Request

PATIENCE = 4.0


class Note:
    """Maps page ``number``, and notes what becomes of it."""

    def __init__(self, number: int, *, barrier: bool = False, request: Any = True) -> None:
        self.number = number
        self.barrier = barrier
        self.wanted = request
        self.outcome: object = None

    def request(self) -> Request[Any] | None:
        if self.wanted is True:
            return requests.dma_map(self.number * PAGE, PAGE)
        made: Request[Any] | None = self.wanted
        return made

    def done(self, answer: Any) -> None:
        assert answer is None
        self.outcome = "done"

    def refused(self, error: ViommuError) -> None:
        self.outcome = error


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.cuts: list[PeerError] = []
        self.queue = OrderQueue(self.loop, patience=PATIENCE, cut_off=self.cut)
        self.lost: list[PeerError] = []
        self.connect()

    def connect(self, *, connected: bool = True, **limits: Any) -> None:
        ours, theirs = socket.socketpair()
        self.device = Scripted(self.loop, theirs)
        self.client = LoopClient(
            self.loop, ours, limits=ClientLimits(**limits), on_closed=self.lost.append
        )
        self.device.answer(self.device.take(), encode_version(1, Capabilities(1)))
        assert self.client.negotiated.done
        if connected:
            self.queue.connect(self.client, 2)

    def cut(self, why: PeerError) -> None:
        self.cuts.append(why)
        self.queue.disconnect()
        self.client.close()

    def add(self, *notes: Note) -> tuple[Note, ...]:
        for note in notes:
            self.queue.add(note)
        return notes

    def pages(self) -> list[int]:
        """The pages of what the device has got by now."""
        asked = self.device.asked()
        self.got = asked
        return [each.what()[1] for each in asked]

    def close(self) -> None:
        self.queue.close()
        self.client.close()
        self.device.close()
        self.loop.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_window_is_sent_and_the_rest_as_answers_come(world: World) -> None:
    notes = world.add(*map(Note, range(4)))
    assert world.pages() == [0, 1]
    assert len(world.queue) == 4
    first, second = world.got

    world.device.answer(second)
    assert [note.outcome for note in notes] == [None, "done", None, None]
    assert world.pages() == [2]
    world.device.answer(first)
    world.device.answer(world.got[0])
    assert world.pages() == [3]
    world.device.answer(world.got[0])
    assert [note.outcome for note in notes] == ["done"] * 4
    assert len(world.queue) == 0
    assert world.queue.answered == 4


def test_nothing_is_sent_before_control_is_back_in_the_loop(world: World) -> None:
    world.add(Note(0))
    assert world.client.outstanding == 0
    world.queue.flush()
    assert world.client.outstanding == 1


def test_what_has_not_been_sent_can_be_cancelled(world: World) -> None:
    notes = world.add(*map(Note, range(4)))
    assert world.pages() == [0, 1]
    assert world.queue.cancel(notes[2])
    assert not world.queue.cancel(notes[2])
    assert not world.queue.cancel(notes[0])
    world.device.answer(world.got[0])
    assert world.pages() == [3]


def test_cancelling_the_last_one_settles(world: World) -> None:
    (note,) = world.add(Note(0))
    event = world.queue.unsettled()
    assert event is not None
    assert world.queue.cancel(note)
    assert world.queue.unsettled() is None
    world.loop.turn(0)
    assert event.is_set()
    event.close()


def test_an_order_can_change_its_mind(world: World) -> None:
    settled: list[bool] = []
    notes = world.add(Note(0, request=None), Note(1), Note(2, request=None))
    pending = world.queue.settled()
    assert pending is not None
    pending.then(lambda _: settled.append(True))
    assert world.pages() == [1]
    world.device.answer(world.got[0])
    assert settled == [True]
    assert notes[0].outcome is None


def test_a_barrier_parts_those_before_it_from_those_behind(world: World) -> None:
    world.add(Note(0), Note(1, barrier=True), Note(2))
    assert world.pages() == [0]
    world.device.answer(world.got[0])
    assert world.pages() == [1]
    world.device.refuse(world.got[0])
    assert world.pages() == [2]


def test_a_refusal_is_told_and_the_rest_goes_on(world: World) -> None:
    notes = world.add(Note(0), Note(1))
    world.pages()
    world.device.refuse(world.got[0], errno.ENOSPC)
    world.device.answer(world.got[1])
    assert isinstance(notes[0].outcome, PeerError)
    assert notes[0].outcome.errno == errno.ENOSPC
    assert notes[1].outcome == "done"


def test_what_the_device_can_not_take_is_refused_without_asking(world: World) -> None:
    both = requests.dma_map(0, PAGE)._replace(fds=(world.client.fileno(),) * 2)
    notes = world.add(Note(0, request=both), Note(1))
    assert world.pages() == [1]
    assert isinstance(notes[0].outcome, UsageError)


def test_the_event_is_one_until_it_fires(world: World) -> None:
    assert world.queue.unsettled() is None
    assert world.queue.settled() is None
    world.add(Note(0))
    event = world.queue.unsettled()
    assert event is not None
    assert world.queue.unsettled() is event
    world.add(Note(1))
    assert world.queue.settled() is world.queue.settled()
    world.pages()
    for asked in world.got:
        assert not event.is_set()
        world.device.answer(asked)
    assert event.is_set()
    assert world.queue.unsettled() is None
    event.close()


def test_whoever_closed_the_event_gets_another(world: World) -> None:
    world.add(Note(0))
    event = world.queue.unsettled()
    assert event is not None
    event.close()
    again = world.queue.unsettled()
    assert again is not None
    assert again is not event
    again.close()
    world.queue.disconnect()


def test_without_a_device_nothing_is_kept(world: World) -> None:
    world.queue.disconnect()
    (note,) = world.add(Note(0))
    assert not world.queue.connected
    assert len(world.queue) == 0
    assert not world.queue.cancel(note)
    with no_descriptor_left():
        world.queue.prepare()


def test_a_device_that_goes_has_nothing_left_to_answer(world: World) -> None:
    notes = world.add(*map(Note, range(4)))
    event = world.queue.unsettled()
    assert event is not None
    world.pages()
    world.device.close()
    world.device.loop.turn(0)
    assert event.is_set()
    event.close()
    assert len(world.queue) == 0
    assert not world.queue.connected
    assert [note.outcome for note in notes] == [None] * 4
    assert len(world.lost) == 1


def test_answers_of_the_device_before_are_not_waited_for(world: World) -> None:
    world.add(Note(0))
    world.pages()
    world.queue.disconnect()
    before, old = world.client, world.device
    world.connect()
    (note,) = world.add(Note(1))
    old.answer(world.got[0])
    assert note.outcome is None
    assert len(world.queue) == 1
    before.close()
    old.close()


def test_a_connection_that_is_closed_already_has_no_device(world: World) -> None:
    world.add(Note(0))
    world.client.close()
    world.loop.turn(0)
    assert not world.queue.connected
    assert len(world.queue) == 0


def test_a_connection_that_others_fill_is_tried_again() -> None:
    world = World()
    world.queue.disconnect()
    world.client.close()
    world.device.close()
    world.connect(max_outstanding=1)
    world.client.submit(requests.reset())
    world.add(Note(0), Note(1))
    (reset,) = world.device.asked()
    world.clock.now += 0.02
    assert world.pages() == []

    world.device.answer(reset)
    world.clock.now += 0.02
    assert world.pages() == [0]
    world.device.answer(world.got[0])  # an answer makes room too
    assert world.pages() == [1]
    world.close()


def test_a_connection_that_is_full_and_goes_is_not_tried_again() -> None:
    world = World()
    world.queue.disconnect()
    world.client.close()
    world.device.close()
    world.connect(max_outstanding=1)
    world.client.submit(requests.reset())
    world.add(Note(0))
    world.loop.turn(0)
    world.queue.disconnect()
    world.clock.now += 0.02
    assert [each.what() for each in world.device.asked()] == [("DEVICE_RESET",)]
    world.close()


def test_without_descriptors_what_can_be_refused_is_refused(world: World) -> None:
    with no_descriptor_left(), pytest.raises(BackendError) as caught:
        world.queue.prepare()
    assert caught.value.errno == errno.EMFILE


def test_without_descriptors_the_device_is_cut_off_rather_than_not_waited_for(
    world: World,
) -> None:
    with no_descriptor_left():
        world.add(Note(0))
    assert [why.errno for why in world.cuts] == [errno.EMFILE]
    assert len(world.queue) == 0


def test_a_device_that_does_not_answer_is_disconnected(world: World) -> None:
    world.add(Note(0))
    world.pages()
    world.clock.now += PATIENCE + 1
    world.loop.turn(0)
    assert world.client.closed
    assert len(world.queue) == 0


def test_a_device_that_answers_too_slowly_is_cut_off(world: World) -> None:
    """Each answer is in time, but a guest would wait for their sum."""
    world.add(*map(Note, range(1000)))
    waiting = world.device.asked()
    for _ in range(8):
        assert world.cuts == []
        for asked in waiting:
            world.device.answer(asked)
        waiting = world.device.asked()
        world.clock.now += 1
    world.loop.turn(0)
    assert [why.errno for why in world.cuts] == [errno.ETIMEDOUT]
    assert "7 answers in 4.0 s, 984 are still to come" in str(world.cuts[0])


def test_a_device_that_keeps_up_is_not_cut_off(world: World) -> None:
    """There is always something under way, but nothing for long."""
    world.add(Note(0), Note(1))
    waiting = world.device.asked()
    for number in range(2, 12):
        world.clock.now += 1
        world.device.answer(waiting.pop(0))
        world.add(Note(number))
        waiting += world.device.asked()
    assert world.cuts == []
    assert not world.client.closed
    for asked in waiting:
        world.device.answer(asked)


def test_a_device_that_has_a_lot_to_answer_is_given_time(world: World) -> None:
    world.queue.window = 1024
    world.add(*map(Note, range(1000)))
    waiting = world.device.asked()
    while waiting:
        world.clock.now += PATIENCE / 11
        for asked in waiting[:100]:
            world.device.answer(asked)
        waiting = waiting[100:]
    assert world.cuts == []
    assert len(world.queue) == 0
