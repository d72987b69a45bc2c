from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.endpoints.remote.scripted import Shape, Stage
from viommu.deferred import Deferred
from viommu.endpoints.remote import RemoteFunction
from viommu.loop import Loop
from viommu.memory import GuestMemory
from viommu.vfio_user import IrqLines, LoopClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.errors import PeerError


class Watcher:
    """Notes what a mapper is told."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.refuse = False
        self.mapped: Deferred[None] | None = None

    def connected(self, client: LoopClient) -> Deferred[None] | None:
        self.log.append("connected")
        if self.refuse:
            client.close()
        return self.mapped

    def lost(self, why: PeerError) -> None:
        self.log.append("lost")

    def bus_master(self, *, enabled: bool) -> None:
        self.log.append(enabled)

    def told(self) -> list[object]:
        log, self.log = self.log, []
        return log


class Ghost:
    """An afterlife that notes what it is told, and answers 0x60 0x61 ... in BAR 0."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.reset_at = 0x40  # a write there resets the device

    def follow(self, config: bytes) -> None:
        self.log.append(("follow", len(config)))

    def wrote(self, region: int, offset: int, data: bytes) -> bool:
        return region == 0 and offset == self.reset_at

    def answered(self, region: int, offset: int, data: bytes) -> None:
        self.log.append(("answered", region, offset, data))

    def read(self, region: int, offset: int, count: int) -> bytes | None:
        return bytes(range(0x60, 0x60 + count)) if region == 0 else None

    def bus_master(self, *, enabled: bool) -> None:
        self.log.append(("bus master", enabled))

    def died(self, lines: IrqLines | None) -> None:
        self.log.append(("died", lines is not None))

    def reset(self) -> None:
        self.log.append("reset")

    def stayed_dead(self) -> None:
        self.log.append("stayed dead")

    def revived(self) -> None:
        self.log.append("revived")

    def close(self) -> None:
        self.log.append("close")

    def told(self) -> list[object]:
        log, self.log = self.log, []
        return log


class Shift:
    """A filter that adds one to every byte on its way, either way."""

    def __init__(self) -> None:
        self.followed = 0

    def follow(self, config: bytes) -> None:
        self.followed = len(config)

    def seen(self, region: int, offset: int, data: bytes) -> bytes:
        return bytes(byte + 1 for byte in data)

    def passed(self, region: int, offset: int, data: bytes) -> bytes:
        return bytes(byte + 1 for byte in data)


class Rig:
    """A function in front of a scripted device, in a loop whose clock the test turns."""

    def __init__(self, shape: Shape | None = None, **options: Any) -> None:
        self.now = 1000.0
        self.loop = Loop(clock=lambda: self.now)
        self.stage = Stage(self.loop, shape)
        self.watcher = Watcher()
        self.ghost = Ghost()
        self.lines: IrqLines | None = None
        self._eventfds: list[int] = []
        self._options = options
        self.function: RemoteFunction

    def start(self) -> Rig:
        self.function = RemoteFunction(
            "00:07.0",
            GuestMemory(),
            self.loop,
            self.stage.dial,
            watcher=self.watcher,
            afterlife=self.ghost,
            **self._options,
        )
        return self

    def turn(self, seconds: float = 0) -> None:
        self.now += seconds
        for _ in range(24):  # a connection takes several rounds of messages
            self.loop.turn(0)

    def connect(self) -> IrqLines:
        """Let a VMM come."""
        function = self.function
        self.lines = IrqLines([function.irq_info(index).count for index in range(5)])
        function.connect(self.lines)
        return self.lines

    def disconnect(self) -> None:
        """Let it go."""
        assert self.lines is not None
        self.function.disconnect()
        self.lines.close()
        self.lines = None
        self.turn()

    def eventfd(self) -> int:
        self._eventfds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self._eventfds[-1]

    def read(self, index: int, offset: int, count: int) -> bytes:
        data = self.function.region_read(index, offset, count)
        if isinstance(data, Deferred):
            self.turn()
            data = data.result()
        return data

    def write(self, index: int, offset: int, data: bytes) -> bool:
        """Write, and say whether that was answered."""
        done = self.function.region_write(index, offset, data)
        self.turn()
        return done is None or done.done

    @staticmethod
    def done(answer: object) -> bool:
        """Whether something that comes later has come."""
        assert isinstance(answer, Deferred)
        return answer.done

    @staticmethod
    def result(answer: object) -> object:
        """What has come."""
        assert isinstance(answer, Deferred)
        return answer.result()

    def why_dead(self) -> str | None:
        return self.function.dead[0] if self.function.dead is not None else None

    def kill(self) -> None:
        self.stage.device.die()
        self.turn()

    def close(self) -> None:
        if self.lines is not None:
            self.disconnect()
        self.stage.close()
        self.loop.close()
        for fd in self._eventfds:
            os.close(fd)


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    """A function that makes rigs; they are closed at the end."""
    rigs: list[Rig] = []

    def make_one(shape: Shape | None = None, **options: Any) -> Rig:
        rigs.append(Rig(shape, **options))
        return rigs[-1]

    yield make_one
    for rig in rigs:
        if hasattr(rig, "function"):
            rig.function.close()
        rig.close()


@pytest.fixture
def rig(make: Callable[..., Rig]) -> Rig:
    """A rig whose device is connected, and what that took forgotten."""
    rig = make().start()
    rig.stage.device.writes()
    rig.watcher.told()
    rig.ghost.told()
    return rig
