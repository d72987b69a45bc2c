from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.remote.scripted import Stage
from viommu.deferred import Deferred
from viommu.endpoints.remote.link import DeviceLink, LinkState
from viommu.errors import PeerError, UsageError, ViommuError
from viommu.loop import Loop
from viommu.spec.vfio_user import Command
from viommu.vfio_user import requests
from viommu.vfio_user.protocol import Capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.endpoints.remote.description import Description
    from viommu.vfio_user import LoopClient


class Owner:
    """Notes what it is told; ``accepts`` says when a device can be used."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.accepts: Deferred[None] | ViommuError | None = None
        self.client: LoopClient | None = None

    def accept(self, client: LoopClient, description: Description) -> Deferred[None]:
        self.log.append("accept")
        self.client = client
        description.close()
        if isinstance(self.accepts, ViommuError):
            raise self.accepts
        if self.accepts is not None:
            return self.accepts
        ready: Deferred[None] = Deferred()
        ready.resolve(None)
        return ready

    def alive(self) -> None:
        self.log.append("alive")

    def lost(self, why: PeerError) -> None:
        self.log.append(f"lost {errno.errorcode[why.errno]}")

    def failed(self, why: ViommuError) -> None:
        self.log.append("failed")


class Rig:
    def __init__(self) -> None:
        self.now = 0.0
        self.loop = Loop(clock=lambda: self.now)
        self.stage = Stage(self.loop)
        self.owner = Owner()
        self.link = DeviceLink(
            self.loop,
            self.stage.dial,
            self.owner,
            port=None,
            offers=Capabilities(5),
            timeout=1.0,
            connect_timeout=4.0,
        )

    def turn(self, seconds: float = 0) -> None:
        self.now += seconds
        for _ in range(24):
            self.loop.turn(0)

    def state(self) -> LinkState:
        return self.link.state

    def told(self) -> list[str]:
        log, self.owner.log = self.owner.log, []
        return log

    def close(self) -> None:
        self.link.close()
        self.stage.close()
        self.loop.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_a_device_is_accepted_then_alive(rig: Rig) -> None:
    attempt = rig.link.open()
    assert rig.state() is LinkState.CONNECTING
    assert rig.link.client is None
    rig.turn()

    assert attempt.result() is None
    assert rig.state() is LinkState.ALIVE
    assert rig.link.client is rig.owner.client
    assert rig.told() == ["accept", "alive"]
    assert rig.link.open().result() is None
    assert len(rig.stage.devices) == 1


def test_one_attempt_at_a_time(rig: Rig) -> None:
    assert rig.link.open() is rig.link.open()


def test_nobody_to_dial(rig: Rig) -> None:
    rig.stage.absent = PeerError(errno.ENOENT, "no such socket")

    assert rig.link.open().result() is rig.stage.absent
    assert rig.told() == ["failed"]
    assert rig.state() is LinkState.DEAD


def test_a_device_that_is_not_wanted(rig: Rig) -> None:
    rig.owner.accepts = UsageError("not this one")
    attempt = rig.link.open()
    rig.turn()

    assert attempt.result() is rig.owner.accepts
    assert rig.told() == ["accept", "failed"]
    assert not rig.stage.device.open


def test_a_device_that_is_useless(rig: Rig) -> None:
    rig.stage.shape.flags = 0
    attempt = rig.link.open()
    rig.turn()

    assert isinstance(attempt.result(), PeerError)
    assert rig.told() == ["failed"]
    assert not rig.stage.device.open


def test_a_device_that_goes_before_it_says_what_it_is(rig: Rig) -> None:
    rig.stage.prepare = lambda device: device.mute.add(Command.DEVICE_GET_INFO)
    attempt = rig.link.open()
    rig.turn()
    rig.stage.device.die()
    rig.turn()

    assert isinstance(attempt.result(), PeerError)
    assert rig.told() == ["failed"]


def test_a_device_that_goes_before_it_can_be_used(rig: Rig) -> None:
    rig.owner.accepts = Deferred()
    attempt = rig.link.open()
    rig.turn()
    rig.stage.device.die()
    rig.turn()

    assert isinstance(attempt.result(), PeerError)
    assert rig.told() == ["accept", "lost ECONNRESET", "failed"]
    rig.owner.accepts.resolve(None)
    assert rig.told() == []


def test_a_device_that_takes_too_long(rig: Rig) -> None:
    rig.owner.accepts = Deferred()
    attempt = rig.link.open()
    rig.turn(3.9)
    assert not attempt.done
    rig.turn(0.2)

    error = attempt.result()
    assert isinstance(error, PeerError)
    assert error.errno == errno.ETIMEDOUT
    assert rig.told() == ["accept", "lost ETIMEDOUT", "failed"]
    assert not rig.stage.device.open


def test_to_connect_may_take_longer_than_to_answer(rig: Rig) -> None:
    rig.stage.prepare = lambda device: device.mute.add(Command.VERSION)
    attempt = rig.link.open()
    rig.turn(3)
    rig.stage.device.answer_waiting()
    rig.turn()
    assert attempt.result() is None
    rig.told()

    rig.stage.device.mute.add(Command.DEVICE_RESET)
    assert rig.link.client is not None
    rig.link.client.submit(requests.reset())
    rig.turn(1.1)

    assert rig.told() == ["lost ETIMEDOUT"]


def test_it_offers_what_it_is_told(rig: Rig) -> None:
    rig.link.open()
    rig.turn()

    assert b'"max_msg_fds":5' in rig.stage.device.hello


def test_a_device_that_goes(rig: Rig) -> None:
    rig.link.open()
    rig.turn()
    rig.told()
    rig.stage.device.die()
    rig.turn()

    assert rig.told() == ["lost ECONNRESET"]
    assert rig.state() is LinkState.DEAD
    assert rig.link.client is None
    rig.turn(100)
    assert len(rig.stage.devices) == 1


def test_somebody_else_who_ends_it_is_noticed(rig: Rig) -> None:
    rig.link.open()
    rig.turn()
    rig.told()
    assert rig.owner.client is not None
    rig.owner.client.close()

    assert rig.link.client is None
    assert rig.told() == ["lost ENOTCONN"]
    rig.link.open()
    rig.turn()
    assert rig.told() == ["accept", "alive"]


def test_pauses_grow_until_there_is_a_device(rig: Rig) -> None:
    rig.stage.absent = PeerError(errno.ENOENT, "no such socket")
    tries: list[float] = []

    def failed(why: ViommuError) -> None:
        tries.append(rig.now)
        rig.link.keep_trying()

    rig.owner.failed = failed  # type: ignore[method-assign]
    rig.link.open()
    for _ in range(300):
        rig.turn(0.5)

    assert tries == [0, 1, 3, 7, 15, 31, 61, 91, 121]
    rig.stage.absent = None
    rig.turn(30)
    rig.turn(1)
    assert rig.told() == ["accept", "alive"]
    rig.stage.device.die()
    rig.turn()
    rig.link.keep_trying()
    rig.link.keep_trying()
    rig.turn(1)
    assert rig.state() is LinkState.ALIVE
    assert len(rig.stage.devices) == 2


def test_who_asks_does_not_wait_for_a_pause(rig: Rig) -> None:
    rig.link.keep_trying()
    rig.link.open()
    rig.turn()
    rig.turn(10)

    assert len(rig.stage.devices) == 1


def test_a_closed_link_stays_closed(rig: Rig) -> None:
    rig.link.open()
    rig.turn()
    rig.link.close()
    rig.link.close()

    assert rig.told() == ["accept", "alive", "lost ENOTCONN"]
    rig.link.keep_trying()
    assert rig.link.open().result() is None
    assert rig.link.client is None
    rig.turn(100)
    assert len(rig.stage.devices) == 1


def test_closing_while_connecting(rig: Rig) -> None:
    attempt = rig.link.open()
    rig.link.close()
    rig.turn(10)

    assert attempt.done
    assert rig.state() is LinkState.CLOSED
