"""10,000 random rings, rewritten while they are used: the queue lives, nothing leaks."""

from __future__ import annotations

import gc
import os
import random
import re
import struct
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import open_fds
from tests.virtio.harness import RecordingTransport
from viommu.memory import GuestMemory
from viommu.memory.files import MappedFiles
from viommu.spec import virtio_ring as spec
from viommu.testing.ring import DriverQueue, RingLayout, Used
from viommu.virtio.ring import SplitQueue
from viommu.virtio.runner import QueueRunner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.virtio.ring import Chain

RINGS: Final = 10_000
PAGE: Final = 4096

# The file has a page before and a page behind what the guest was given of it.
RAM_START: Final = 0x10_0000
RAM_SIZE: Final = 16 * PAGE
RAM_END: Final = RAM_START + RAM_SIZE
SPLIT: Final = RAM_START + 2 * PAGE  # where one region ends and another begins
CANARY: Final = b"\xc5" * PAGE

RING: Final = SPLIT - 0x80  # so that the areas cross from one region to the other
TABLE: Final = RAM_START + 8 * PAGE
DATA: Final = RAM_START + 12 * PAGE

ADDRESSES: Final = (
    DATA,
    DATA + 0x20,
    TABLE,
    TABLE + 0x10,
    RING,
    RAM_END - 8,
    RAM_END,
    0,
    RAM_START - 4,
    (1 << 64) - 16,
    (1 << 64) - 1,
)
LENGTHS: Final = (0, 1, 4, 16, 32, 36, 64, 4096, RAM_SIZE, 0x7FFFFFFF, 0xFFFFFFFF)
FLAGS: Final = (0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 0xFFFF)


@pytest.fixture
def ram() -> Iterator[tuple[GuestMemory, int]]:
    fd = os.memfd_create("ram")
    files = MappedFiles()
    memory = GuestMemory()
    try:
        os.pwrite(fd, CANARY, 0)
        os.pwrite(fd, CANARY, PAGE + RAM_SIZE)
        # Swapped halves: what follows in address does not follow in the file.
        first, second = SPLIT - RAM_START, RAM_END - SPLIT
        for gpa, size, offset in ((RAM_START, first, PAGE + second), (SPLIT, second, PAGE)):
            file = files.get(fd, offset, size, writable=True)
            memory.map(gpa, size, readable=True, writable=True, file=file, offset=offset)
        yield memory, fd
    finally:
        memory.close()
        os.close(fd)


class Fuzzer:
    """One random ring after the other, and a device that copies requests to replies."""

    def __init__(self, memory: GuestMemory, seed: int) -> None:
        self.memory = memory
        self.dice = random.Random(seed)
        self.layout = RingLayout.at(RING, 1)
        self.size = 1
        self.outcomes: dict[str, int] = {}

    def descriptors(self, count: int) -> bytes:
        choice, below = self.dice.choice, self.dice.randrange
        entries = []
        for _ in range(count):
            following = below(count + 1) if below(8) else below(0x10000)
            entries.append(
                spec.DESC.pack(choice(ADDRESSES), choice(LENGTHS), choice(FLAGS), following)
            )
        return b"".join(entries)

    def scribble(self) -> None:
        """Rewrite descriptors, tables and the driver's index."""
        dice = self.dice
        self.memory.write(self.layout.desc, self.descriptors(self.size))
        self.memory.write(TABLE, self.descriptors(4))
        idx = dice.randrange(self.size + 2) if dice.randrange(8) else dice.randrange(0x10000)
        heads = [
            dice.randrange(self.size + 1) if dice.randrange(16) else dice.randrange(0x10000)
            for _ in range(self.size)
        ]
        event = dice.randrange(0x10000)
        ring = struct.pack(f"<{self.size + 3}H", dice.randrange(4), idx, *heads, event)
        self.memory.write(self.layout.avail, ring)

    def ring(self) -> None:
        """Set up a queue, as after a reset of the device, and serve it."""
        dice = self.dice
        self.size = 1 << dice.randrange(5)
        self.layout = RingLayout.at(RING, self.size)
        self.scribble()
        transport = RecordingTransport()
        queue = SplitQueue(
            self.memory,
            0,
            self.size,
            *self.layout[:3],
            event_idx=bool(dice.randrange(2)),
            indirect=bool(dice.randrange(4)),
            max_chain_bytes=1 << 20,
        )

        def handle(chain: Chain) -> int | None:
            data = queue.read(chain)[: chain.writable_size]
            what = dice.randrange(8)
            if what == 0:
                return None
            if what < 3:
                self.scribble()  # the guest does not wait
            queue.write(chain, data)
            return len(data)

        runner = QueueRunner(queue, transport, handle)
        turns = 4
        while runner.serve(budget=8) and turns:
            turns -= 1
        if runner.parked is not None:
            runner.resume(runner.parked, dice.randrange(1 << 32))
            runner.serve(budget=8)
        queue.close()
        outcome = transport.reasons[0] if transport.reasons else "served"
        kind = re.sub(r"0x[0-9a-f]+|[0-9]+", "N", outcome)
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1


def serves(memory: GuestMemory) -> None:
    """Assert that a well-behaved driver is served."""
    driver = DriverQueue(memory, 8, RingLayout.at(RING, 8))
    queue = SplitQueue(memory, 0, 8, *driver.layout[:3], event_idx=False, indirect=False)
    head = driver.add([(DATA, 4)], [(DATA + 4, 4)])
    driver.publish()
    runner = QueueRunner(queue, RecordingTransport(), lambda chain: len(queue.read(chain)))
    assert runner.run() == 1
    assert driver.collect() == [Used(head, 4)]


def test_ten_thousand_random_rings(ram: tuple[GuestMemory, int]) -> None:
    memory, fd = ram
    fuzzer = Fuzzer(memory, seed=2)
    for _ in range(RINGS // 10):  # interned strings, free lists and the like settle
        fuzzer.ring()
    gc.collect()
    blocks, fds = sys.getallocatedblocks(), len(open_fds())
    for number in range(RINGS):
        fuzzer.ring()
        if not number % 500:
            serves(memory)
    gc.collect()
    assert len(open_fds()) == fds
    assert sys.getallocatedblocks() - blocks < 500

    # Nothing was written beside what the guest was given.
    assert os.pread(fd, PAGE, 0) == CANARY
    assert os.pread(fd, PAGE, PAGE + RAM_SIZE) == CANARY
    # The rings were worth it: many were served, and many ways to break one were met.
    assert fuzzer.outcomes["served"] > RINGS // 20
    assert len(fuzzer.outcomes) > 10, fuzzer.outcomes
