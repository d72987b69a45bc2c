from __future__ import annotations

from typing import Final

import pytest

from tests.virtio.harness import RecordingTransport
from viommu.errors import Access, GuestMemoryError, RingError, TranslationFault, UsageError
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout, Used
from viommu.virtio.ring import Chain, SplitQueue
from viommu.virtio.runner import QueueRunner

DATA: Final = 0x8000
SIZE: Final = 8


class Rig:
    """A runner between a driver and a recording transport; handles as ``answers`` say."""

    def __init__(self, *, event_idx: bool = False) -> None:
        self.memory = PieceMemory(1 << 16)
        layout = RingLayout.at(0x1000, SIZE)
        self.driver = DriverQueue(self.memory, SIZE, layout, event_idx=event_idx)
        self.queue = SplitQueue(
            self.memory, 5, SIZE, *layout[:3], event_idx=event_idx, indirect=False
        )
        self.transport = RecordingTransport()
        self.handled: list[int] = []
        self.answers: dict[int, int | Exception | None] = {}
        self.runner = QueueRunner(self.queue, self.transport, self.handle)

    def handle(self, chain: Chain) -> int | None:
        self.handled.append(chain.head)
        answer = self.answers.get(chain.head, 1)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def send(self, count: int = 1) -> list[int]:
        heads = [self.driver.add([], [(DATA, 4)]) for _ in range(count)]
        self.driver.publish()
        return heads

    def break_rings(self) -> None:
        """Let the rings be nowhere."""
        self.memory.size = 0
        self.memory.generation += 1

    def has_work(self) -> bool:
        return self.runner.has_work()


def test_a_batch_has_one_interrupt() -> None:
    rig = Rig()
    heads = rig.send(4)
    assert rig.has_work()
    assert rig.runner.run() == 4
    assert not rig.has_work()
    assert rig.transport.interrupts == [5]
    assert rig.driver.collect() == [Used(head, 1) for head in heads]
    assert rig.runner.run() == 0
    assert rig.transport.interrupts == [5]


def test_no_interrupt_that_nobody_asked_for() -> None:
    rig = Rig()
    rig.driver.disable_interrupts()
    rig.send(2)
    rig.runner.run()
    assert rig.transport.interrupts == []
    assert len(rig.driver.collect()) == 2


def test_a_budget_is_kept() -> None:
    rig = Rig()
    rig.send(5)
    assert [rig.runner.run(2) for _ in range(4)] == [2, 2, 1, 0]
    assert rig.transport.interrupts == [5, 5, 5]


@pytest.mark.parametrize("event_idx", [False, True])
def test_serve_answers_a_kick_and_asks_for_the_next(event_idx: bool) -> None:
    rig = Rig(event_idx=event_idx)
    for _ in range(3):
        rig.send(2)
        assert not rig.runner.serve()
        assert len(rig.driver.collect()) == 2
        rig.driver.add([], [(DATA, 4)])
        assert rig.driver.publish()  # wants a kick
        assert not rig.runner.serve()
        rig.driver.collect()


def test_serve_says_when_its_budget_is_over_and_keeps_kicks_off() -> None:
    rig = Rig()
    rig.send(5)
    assert rig.runner.serve(3)
    rig.driver.add([], [(DATA, 4)])
    assert not rig.driver.publish()
    assert rig.runner.serve(3) is False
    assert len(rig.handled) == 6
    rig.driver.collect()
    rig.driver.add([], [(DATA, 4)])
    assert rig.driver.publish()


def test_serve_takes_what_raced_with_the_request_for_a_kick() -> None:
    rig = Rig()
    rig.send()
    enable = rig.queue.enable_notifications
    late = [2]

    def racing() -> bool:
        if late:
            late.pop()
            rig.send(2)
        return enable()

    rig.queue.enable_notifications = racing  # type: ignore[method-assign]
    assert not rig.runner.serve()
    assert len(rig.handled) == 3


def test_a_parked_chain_stops_the_queue_until_it_is_resumed() -> None:
    rig = Rig()
    heads = rig.send(3)
    rig.answers[heads[1]] = None
    assert rig.runner.run() == 1
    parked = rig.runner.parked
    assert parked is not None
    assert parked.head == heads[1]
    assert rig.driver.collect() == [Used(heads[0], 1)]
    assert not rig.has_work()
    assert rig.runner.run() == 0
    assert rig.runner.serve() is False
    rig.runner.resume(parked, 3)
    assert rig.driver.collect() == [Used(heads[1], 3)]
    assert rig.has_work()
    assert rig.runner.run() == 1
    assert rig.driver.collect() == [Used(heads[2], 1)]
    with pytest.raises(UsageError, match="is not parked"):
        rig.runner.resume(parked, 3)


def test_a_chain_resumed_while_inactive_waits() -> None:
    rig = Rig()
    heads = rig.send(2)
    rig.answers[heads[0]] = None
    rig.runner.run()
    assert rig.runner.parked is not None
    rig.transport.active = False
    rig.runner.resume(rig.runner.parked, 2)
    assert rig.driver.collect() == []
    assert not rig.has_work()
    rig.transport.active = True
    assert rig.has_work()
    assert rig.runner.run() == 1
    assert rig.driver.collect() == [Used(heads[0], 2), Used(heads[1], 1)]


def test_nothing_is_touched_while_inactive() -> None:
    rig = Rig()
    rig.send(2)
    rig.transport.active = False
    rig.break_rings()
    assert not rig.has_work()
    assert rig.runner.run() == 0
    assert not rig.runner.serve()
    assert not rig.runner.arm()
    assert rig.transport.reasons == []


@pytest.mark.parametrize(
    "error",
    [GuestMemoryError(0xDEAD000, 4, "is not memory"), TranslationFault(0x1000, Access.WRITE)],
)
def test_a_buffer_that_cannot_be_reached_comes_back_with_nothing_written(error: Exception) -> None:
    rig = Rig()
    heads = rig.send(2)
    rig.answers[heads[0]] = error
    assert rig.runner.run() == 2
    assert rig.driver.collect() == [Used(heads[0], 0), Used(heads[1], 1)]
    assert rig.transport.reasons == []


def test_a_broken_ring_needs_a_reset_after_what_was_done_is_published() -> None:
    rig = Rig()
    heads = rig.send(2)
    rig.driver.write_avail(99)
    assert rig.runner.serve() is False
    assert rig.driver.collect() == [Used(head, 1) for head in heads]
    assert rig.transport.interrupts == [5]
    assert rig.transport.reasons == ["queue 5: the chain at head 99 refers to descriptor 99 of 8"]
    rig.transport.active = True
    assert rig.runner.broken
    assert not rig.has_work()
    assert rig.runner.run() == 0
    assert not rig.runner.arm()


def test_a_handler_may_declare_the_queue_broken() -> None:
    rig = Rig()
    heads = rig.send(2)
    rig.answers[heads[1]] = RingError("no room for a status")
    assert rig.runner.run() == 1
    assert rig.driver.collect() == [Used(heads[0], 1)]
    assert rig.transport.reasons == ["no room for a status"]


def test_a_handler_that_breaks_the_device_is_not_called_again() -> None:
    rig = Rig()
    rig.send(3)

    def handle(chain: Chain) -> int:
        rig.transport.needs_reset("enough")
        return 0

    runner = QueueRunner(rig.queue, rig.transport, handle)
    assert runner.run() == 1
    assert rig.transport.reasons == ["enough"]


def test_rings_that_vanish_need_a_reset() -> None:
    rig = Rig()
    rig.send()
    rig.break_rings()
    assert rig.has_work()  # something to say
    assert rig.runner.run() == 0
    assert len(rig.transport.reasons) == 1
    assert "guest memory" in rig.transport.reasons[0]


@pytest.mark.parametrize("call", ["serve", "arm"])
def test_rings_that_vanish_between_two_batches_need_a_reset(call: str) -> None:
    rig = Rig()
    rig.break_rings()
    assert getattr(rig.runner, call)() is False
    assert len(rig.transport.reasons) == 1


def test_rings_that_vanish_under_a_request_need_a_reset() -> None:
    rig = Rig()
    rig.send()

    def handle(chain: Chain) -> int:
        rig.break_rings()
        return 0

    runner = QueueRunner(rig.queue, rig.transport, handle)
    assert runner.run() == 0
    assert len(rig.transport.reasons) == 1


def test_rings_that_vanish_before_the_batch_is_published_need_a_reset() -> None:
    rig = Rig()
    heads = rig.send(2)

    def handle(chain: Chain) -> int | None:
        if chain.head == heads[1]:
            rig.break_rings()
            return None
        return 0

    runner = QueueRunner(rig.queue, rig.transport, handle)
    assert runner.run() == 1
    assert len(rig.transport.reasons) == 1
