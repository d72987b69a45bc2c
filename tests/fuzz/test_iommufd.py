"""10,000 random iommufd commands among others, from clients that come and go."""

from __future__ import annotations

import gc
import struct
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.footprint import memory_use, open_fds
from tests.fuzz.test_vfio_user import (
    MESSAGES,
    NUMBERS,
    PAGE,
    Fuzzer,
    Shot,
    SlowBank,
    SteadyBank,
)
from tests.vfio_user import ioas_payloads as wire
from tests.vfio_user.ioas_payloads import FIXED, READABLE, RW, WRITEABLE
from viommu.loop import Loop
from viommu.memory import MappedFiles
from viommu.spec.vfio_user import F_ERROR, HEADER, Command
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.vfio_user import Server, ServerLimits
from viommu.vfio_user.ioas_table import IoasLimits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from viommu.vfio_user.protocol import Message

BASE = 0x100000
LIMITS = IoasLimits(max_ioas=4, max_mappings=12, apertures=((BASE, BASE + 16 * PAGE),))


class IommufdFuzzer(Fuzzer):
    """As its parent, and mostly about address spaces."""

    hello = wire.hello()

    def __init__(self, server: Server, loop: Loop, bank: SteadyBank, seed: int) -> None:
        super().__init__(server, loop, bank, seed)
        self.done: Counter[int] = Counter()
        self.templates = [
            *self.templates,
            *[lambda: Shot(IommufdCommand.ALLOC_IOAS, wire.alloc_ioas())] * 4,
            lambda: Shot(IommufdCommand.DESTROY_IOAS, wire.destroy_ioas(self._ioas())),
            *[self._ioas_map] * 16,
            *[self._ioas_unmap] * 8,
            *[self._ioas_copy] * 6,
            *[lambda: Shot(IommufdCommand.BIND, wire.bind())] * 2,
            *[lambda: Shot(IommufdCommand.ATTACH_PT, wire.attach_pt(self._ioas()))] * 6,
            *[lambda: Shot(IommufdCommand.DETACH_PT, wire.detach_pt())] * 2,
            *[self._device_write] * 4,
        ]

    def connect(self, *, polite: float = 0.95) -> None:
        """Connect, and begin as a client that means well."""
        super().connect(polite=polite)
        if not self.expected:
            return
        for command, payload in (
            (IommufdCommand.ALLOC_IOAS, wire.alloc_ioas()),
            (IommufdCommand.ALLOC_IOAS, wire.alloc_ioas()),
            (IommufdCommand.BIND, wire.bind()),
            (IommufdCommand.ATTACH_PT, wire.attach_pt(1)),
        ):
            self.expected.append(command)
            self.send(HEADER.pack(command, command, 16 + len(payload), 0, 0) + payload)

    def judge(self, message: Message) -> None:
        super().judge(message)
        if not message.flags & F_ERROR:
            self.done[message.command] += 1

    def _ioas(self) -> int:
        """Return an id: mostly one of the first, which are there."""
        return (1 + self._below(2)) if self._below(4) else self._number() & 0xFFFFFFFF

    def _iova(self) -> int:
        if self._below(6) == 0:
            return self._number()
        return BASE + self._below(2 + 16 * (self._below(4) == 0)) * PAGE

    def _size(self) -> int:
        return self._number() if self._below(8) == 0 else PAGE

    def _number(self) -> int:
        return int(self.random.choice(NUMBERS))

    def _map_flags(self) -> int:
        return int(self.random.choice([RW, RW, RW, RW | FIXED, READABLE, WRITEABLE, 0, 8]))

    def _ioas_map(self) -> Shot:
        payload = wire.ioas_map(
            self._ioas(),
            self._size(),
            flags=self._map_flags(),
            iova=self._iova(),
            offset=self.random.choice([0, PAGE, 0x123, 15 * PAGE, self._number()]),
        )
        fds = [self.random.choice(self.fds[:2])] if self.random.random() < 0.95 else []
        return Shot(IommufdCommand.IOAS_MAP, payload, fds)

    def _ioas_unmap(self) -> Shot:
        if self.random.random() < 0.1:
            return Shot(IommufdCommand.IOAS_UNMAP, wire.ioas_unmap(self._ioas(), 0, 0, flags=1))
        payload = wire.ioas_unmap(self._ioas(), self._iova(), self._size())
        return Shot(IommufdCommand.IOAS_UNMAP, payload)

    def _ioas_copy(self) -> Shot:
        payload = wire.ioas_copy(
            self._ioas(),
            self._iova(),
            self._size(),
            self._ioas(),
            flags=self.random.choice([0, 0, 0, self._map_flags()]),
            iova=self._iova(),
        )
        return Shot(IommufdCommand.IOAS_COPY, payload)

    def _device_write(self) -> Shot:
        """Have the device do DMA: the address first, and the data then."""
        if self.random.random() < 0.5:
            data, offset = struct.pack("<Q", self._iova()), 0x18
        else:
            data, offset = b"data", 0x20
        return Shot(Command.REGION_WRITE, struct.pack("<QII", offset, 0, len(data)) + data)


@pytest.fixture(params=[SteadyBank, SlowBank])
def bank(request: pytest.FixtureRequest) -> Iterator[SteadyBank]:
    bank: SteadyBank = request.param()
    yield bank
    bank.close()


@pytest.fixture
def files() -> MappedFiles:
    return MappedFiles()


@pytest.fixture
def fuzzer(bank: SteadyBank, files: MappedFiles, tmp_path: Path) -> Iterator[IommufdFuzzer]:
    loop = Loop()
    server = Server(loop, bank, tmp_path / "s", files, ServerLimits(iommufd=LIMITS))
    fuzzer = IommufdFuzzer(server, loop, bank, seed=2)
    yield fuzzer
    fuzzer.close()
    server.close()
    loop.close()


def test_random_commands_leave_the_server_as_it_was(
    fuzzer: IommufdFuzzer, bank: SteadyBank, files: MappedFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "viommu.vfio_user")  # thousands of refusals
    seen = 0
    while fuzzer.sent < MESSAGES // 5:  # allocators settle
        fuzzer.step()
    fuzzer.leave()
    gc.collect()
    fds_before, memory_before = open_fds(), memory_use()
    while fuzzer.sent < MESSAGES:
        fuzzer.step()
        seen += bool(bank.memory.regions())
    fuzzer.leave()
    while bank.settle():
        pass
    gc.collect()
    assert open_fds() == fds_before
    assert bank.memory.regions() == []
    assert len(files) == 0
    for now, before in zip(memory_use(), memory_before, strict=True):
        assert now - before < 4 << 20, "memory has grown"
    counters = fuzzer.server.counters
    assert counters.internal_errors == 0
    # It was a test: much was understood, much was refused, and the device saw something.
    assert counters.messages > MESSAGES // 2
    assert MESSAGES // 10 < counters.refused < counters.messages
    assert seen > MESSAGES // 20
    assert min(fuzzer.done[command] for command in IommufdCommand) > 20
