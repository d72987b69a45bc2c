from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.rig import MEMORY_KINDS, PAGE, RAM_SIZE, Rig, make_rig
from viommu.endpoints.edu_dma import DmaEngine
from viommu.endpoints.edu_registers import (
    BUFFER_SIZE,
    BUFFER_START,
    MAX_HOLD_MS,
    Command,
    FaultPolicy,
    Result,
)
from viommu.errors import Access

if TYPE_CHECKING:
    from collections.abc import Iterator

IOVA = 0x7000_0000
GPA = 0x10_0000
TO_MEMORY = Command.RUN | Command.TO_MEMORY
FROM_MEMORY = Command.RUN


@pytest.fixture(params=MEMORY_KINDS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with make_rig(request.param) as rig:
        yield rig


class Engine(DmaEngine):
    """An engine whose interrupts are counted."""

    def __init__(self, rig: Rig, hold_ms: int = 0) -> None:
        self.interrupts = 0
        super().__init__(rig.dma, rig.loop, self._interrupt, hold_ms=hold_ms)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def to_memory(self, iova: int, count: int, flags: int = 0) -> None:
        self.source, self.destination, self.count = BUFFER_START, iova, count
        self.start(TO_MEMORY | flags)

    def from_memory(self, iova: int, count: int, flags: int = 0) -> None:
        self.source, self.destination, self.count = iova, BUFFER_START, count
        self.start(FROM_MEMORY | flags)


@pytest.fixture
def engine(rig: Rig) -> Iterator[Engine]:
    engine = Engine(rig)
    yield engine
    engine.reset()


def test_moves_data_both_ways(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, GPA, PAGE)
    content = os.urandom(PAGE)
    rig.memory.write(GPA, content)
    engine.from_memory(IOVA, PAGE)
    assert engine.transfers == 0
    rig.advance(0)
    assert not engine.running
    assert engine.buffer == content

    rig.memory.write(GPA, bytes(PAGE))
    engine.source, engine.destination, engine.count = BUFFER_START + 16, IOVA + 32, 100
    engine.start(TO_MEMORY)
    rig.advance(0)
    assert rig.memory.read(GPA, PAGE) == bytes(32) + content[16:116] + bytes(PAGE - 132)
    assert engine.result == Result.OK
    assert engine.transfers == 2
    assert not rig.faults


def test_moves_data_across_scattered_pages(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, GPA, PAGE)
    rig.map(IOVA + PAGE, 0x5000, PAGE)
    engine.buffer[:] = content = os.urandom(PAGE)
    engine.to_memory(IOVA + 0x800, PAGE)
    rig.advance(0)
    assert rig.memory.read(GPA + 0x800, 0x800) + rig.memory.read(0x5000, 0x800) == content


@pytest.mark.parametrize(
    ("access", "command", "wanted"),
    [
        (Access.NONE, FROM_MEMORY, Access.READ),
        (Access.NONE, TO_MEMORY, Access.WRITE),
        (Access.READ, TO_MEMORY, Access.WRITE),
        (Access.WRITE, FROM_MEMORY, Access.READ),
    ],
)
def test_a_blocked_transfer_fails_and_is_reported(
    rig: Rig, engine: Engine, access: Access, command: Command, wanted: Access
) -> None:
    if access:
        rig.map(IOVA, GPA, PAGE, access)
    rig.memory.write(GPA, content := os.urandom(PAGE))
    if command & Command.TO_MEMORY:
        engine.to_memory(IOVA + 8, 64, Command.IRQ)
    else:
        engine.from_memory(IOVA + 8, 64, Command.IRQ)
    rig.advance(0)
    assert engine.result == Result.TRANSLATION_FAULT
    assert not engine.running
    assert engine.interrupts == 1
    assert [(f.iova, f.access) for f in rig.faults] == [(IOVA + 8, wanted)]
    assert rig.memory.read(GPA, PAGE) == content
    assert engine.buffer == bytes(BUFFER_SIZE)


def test_nothing_moves_when_only_the_end_is_missing(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, GPA, PAGE)
    engine.buffer[:] = b"x" * PAGE
    engine.to_memory(IOVA + PAGE - 8, 9)
    rig.advance(0)
    assert engine.result == Result.TRANSLATION_FAULT
    assert [f.iova for f in rig.faults] == [IOVA + PAGE]
    assert rig.memory.read(GPA, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("local", "count"),
    [
        (BUFFER_START - 1, 1),
        (BUFFER_START, BUFFER_SIZE + 1),
        (BUFFER_START + BUFFER_SIZE - 1, 2),
        (BUFFER_START + BUFFER_SIZE + 1, 0),
        (0, 16),
        (2**64 - 1, 2),
        (BUFFER_START, 2**64 - 1),
    ],
)
@pytest.mark.parametrize("to_memory", [False, True])
def test_a_range_outside_the_buffer_is_an_error(
    rig: Rig, engine: Engine, local: int, count: int, *, to_memory: bool
) -> None:
    rig.map(0, 0, RAM_SIZE)
    engine.source, engine.destination = (local, 0) if to_memory else (0, local)
    engine.count = count
    engine.start(TO_MEMORY if to_memory else FROM_MEMORY)
    rig.advance(0)
    assert engine.result == Result.BAD_RANGE
    assert len(engine.buffer) == BUFFER_SIZE
    assert not rig.faults


def test_the_end_of_the_address_space(rig: Rig, engine: Engine) -> None:
    rig.map(2**64 - PAGE, GPA, PAGE)
    rig.memory.write(GPA + PAGE - 2, b"ab")
    engine.from_memory(2**64 - 2, 2)
    rig.advance(0)
    assert (engine.result, bytes(engine.buffer[:2])) == (Result.OK, b"ab")
    engine.from_memory(2**64 - 2, 3)
    rig.advance(0)
    assert engine.result == Result.BAD_RANGE


def test_an_empty_transfer_succeeds_anywhere(rig: Rig, engine: Engine) -> None:
    engine.to_memory(0xDEAD_0000, 0)
    rig.advance(0)
    assert engine.result == Result.OK
    assert not rig.faults


def test_mapped_to_what_is_not_memory(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, RAM_SIZE + PAGE, PAGE)
    engine.to_memory(IOVA, 8)
    rig.advance(0)
    assert engine.result == Result.NO_MEMORY


def test_a_running_transfer_ignores_commands(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, GPA, PAGE)
    engine.hold_ms = 10
    engine.to_memory(IOVA, 8)
    engine.start(TO_MEMORY | Command.IRQ)
    assert rig.exports == 1
    rig.advance(0.010)
    assert engine.transfers == 1
    assert engine.interrupts == 0


def test_a_command_without_run_does_nothing(rig: Rig, engine: Engine) -> None:
    engine.start(Command.TO_MEMORY | Command.IRQ)
    assert engine.command == 0
    rig.advance(1)
    assert engine.transfers == 0


def test_memory_is_held_for_the_hold_time_and_moved_at_its_end(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=250)
    rig.map(IOVA, GPA, PAGE)
    engine.from_memory(IOVA, 4)
    rig.memory.write(GPA, b"late")
    rig.advance(0.249)
    assert engine.transfers == 0
    assert rig.exports == 1
    assert (engine.exported_at, engine.released_at) == (1_000_000_000_000, 0)
    rig.advance(0.001)
    assert not engine.running
    assert rig.exports == 0
    assert engine.buffer[:4] == b"late"
    assert (engine.released_at - engine.exported_at) // 1_000_000 == 250


def test_an_unmap_waits_until_a_held_transfer_has_finished(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=125)
    rig.map(IOVA, GPA, PAGE)
    engine.buffer[:4] = b"data"
    engine.to_memory(IOVA, 4)
    resolution = rig.unmap(IOVA, PAGE)
    assert resolution is not None
    rig.advance(0.0625)
    assert engine.running
    assert not resolution.is_set()
    assert engine.faulted_at == 1_000_062_500_000
    rig.advance(0.0625)
    assert resolution.is_set()
    assert rig.memory.read(GPA, 4) == b"data"
    assert (engine.result, engine.released_at) == (Result.OK, 1_000_125_000_000)
    engine.to_memory(IOVA, 4)
    rig.advance(0)
    assert engine.result == Result.TRANSLATION_FAULT
    assert [f.iova for f in rig.faults] == [IOVA]


def test_a_fault_without_a_transfer_is_none_of_its_business(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, GPA, PAGE)
    other = rig.dma.export(IOVA, 8, Access.READ)
    rig.unmap(IOVA, PAGE)
    rig.advance(0)
    other.release()
    assert (engine.faulted_at, engine.transfers) == (0, 0)


def test_a_transfer_may_let_go_at_once(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=125)
    engine.fault_policy = FaultPolicy.RELEASE
    rig.map(IOVA, GPA, PAGE)
    engine.buffer[:4] = b"data"
    engine.to_memory(IOVA, 4, Command.IRQ)
    resolution = rig.unmap(IOVA, PAGE)
    assert resolution is not None
    rig.advance(0)
    assert resolution.is_set()
    assert (engine.result, engine.running, engine.interrupts) == (Result.ABORTED, False, 1)
    assert rig.memory.read(GPA, 4) == bytes(4)
    rig.advance(1)
    assert engine.transfers == 1


def test_an_unmap_elsewhere_does_not_wait(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=125)
    rig.map(IOVA, GPA, PAGE)
    rig.map(IOVA + PAGE, GPA + PAGE, PAGE)
    engine.to_memory(IOVA, 4)
    assert rig.unmap(IOVA + PAGE, PAGE) is None
    rig.advance(0.125)
    assert (engine.result, engine.faulted_at) == (Result.OK, 0)


def test_memory_that_the_vmm_took_away_meanwhile(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=125)
    rig.map(IOVA, GPA, PAGE)
    engine.to_memory(IOVA, 4)
    rig.memory.unmap_all()
    rig.advance(0.125)
    assert engine.result == Result.NO_MEMORY
    assert rig.exports == 0


def test_abort_releases_before_it_returns(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=125)
    engine.abort()
    assert engine.transfers == 0
    rig.map(IOVA, GPA, PAGE)
    engine.to_memory(IOVA, 4)
    engine.abort()
    assert rig.exports == 0
    assert (engine.result, engine.running) == (Result.ABORTED, False)


def test_reset_releases_and_forgets(rig: Rig) -> None:
    engine = Engine(rig, hold_ms=125)
    rig.map(IOVA, GPA, PAGE)
    engine.to_memory(IOVA, 4, Command.IRQ)
    engine.hold_ms = 7
    engine.buffer[0] = 1
    engine.reset()
    assert rig.exports == 0
    rig.advance(1)
    assert engine.interrupts == engine.transfers == engine.command == engine.released_at == 0
    assert engine.buffer == bytes(BUFFER_SIZE)
    assert engine.hold_ms == 125


def test_bus_mastering_off_fails_without_a_report(rig: Rig, engine: Engine) -> None:
    rig.map(IOVA, GPA, PAGE)
    rig.dma.enabled = False
    engine.to_memory(IOVA, 4)
    rig.advance(0)
    assert engine.result == Result.TRANSLATION_FAULT
    assert not rig.faults


def test_a_hold_time_is_bounded(rig: Rig, engine: Engine) -> None:
    engine.hold_ms = 2**64 - 1
    assert engine.hold_ms == MAX_HOLD_MS
    assert Engine(rig, hold_ms=10**9).hold_ms == MAX_HOLD_MS
