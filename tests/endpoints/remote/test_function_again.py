"""A function whose device has died: when it is taken again, and as what."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.remote.scripted import (
    CONFIG,
    FLR,
    MAPPABLE,
    MSIX,
    MSIX_CAP,
    Scripted,
    Shape,
)
from viommu.deferred import Deferred
from viommu.errors import PeerError
from viommu.spec import pci, vfio
from viommu.spec.vfio_user import Command
from viommu.vfio_user import RegionInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.endpoints.remote.conftest import Rig

COMMAND_OFF = ("write", CONFIG, pci.COMMAND, b"\0\0")
MASTER = (pci.COMMAND_MEMORY | pci.COMMAND_MASTER).to_bytes(2, "little")
NOBODY = PeerError(errno.ECONNREFUSED, "nobody is there")


def in_use(rig: Rig) -> None:
    """A VMM whose guest's driver has written something."""
    lines = rig.connect()
    flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
    lines.set_irqs(vfio.IRQ_SET.pack(20, flags, MSIX, 0, 1), [os.dup(rig.eventfd())])
    rig.write(CONFIG, pci.BASE_ADDRESS_0, b"\0\0\0\xfe")
    rig.write(CONFIG, MSIX_CAP + 2, b"\7\x80")
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.write(0, 0, b"\1\2\3\4")
    rig.watcher.told()
    rig.ghost.told()


def test_a_device_is_not_used_before_it_has_its_mappings(rig: Rig) -> None:
    in_use(rig)
    rig.kill()
    rig.watcher.mapped = Deferred()
    done = rig.function.reset()
    rig.turn()

    assert not rig.done(done)
    assert rig.read(2, 0, 1) == b"\xff"
    rig.watcher.mapped.resolve(None)
    assert rig.done(done)
    assert rig.read(2, 0, 1) == b"\0"


def test_it_is_not_taken_again_before_a_reset(rig: Rig) -> None:
    in_use(rig)
    rig.kill()

    rig.turn(100)

    assert len(rig.stage.devices) == 1
    assert rig.why_dead() is not None


ASSIGN = ("irqs", vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER, MSIX, 0, 1, 1)


@pytest.mark.parametrize("how", ["system", "function"])
def test_a_reset_takes_it_again(rig: Rig, how: str, caplog: pytest.LogCaptureFixture) -> None:
    in_use(rig)
    rig.kill()
    rig.watcher.told()
    rig.ghost.told()

    function = rig.function
    done = function.reset() if how == "system" else function.region_write(CONFIG, *FLR)
    assert not rig.done(done)
    rig.turn()

    assert rig.done(done)
    assert rig.watcher.told() == [False, "connected", False]
    assert rig.ghost.told() == [("bus master", False), "reset", "revived"]
    assert rig.stage.device.writes() == [COMMAND_OFF, ("reset",), ASSIGN]
    assert list(rig.stage.device.eventfds) == [(MSIX, 0)]
    assert rig.read(0, 0, 4) == bytes(4)
    assert rig.function.describe()["state"] == "alive"
    assert "there is a device again" in caplog.text


def test_a_reset_by_its_driver_takes_it_with_the_function_s_registers(rig: Rig) -> None:
    in_use(rig)
    rig.kill()
    rig.watcher.told()

    assert rig.write(0, rig.ghost.reset_at, b"\0")

    assert rig.watcher.told() == ["connected", True]
    assert rig.stage.device.writes() == [
        COMMAND_OFF,
        ("reset",),
        ASSIGN,
        ("write", CONFIG, pci.BASE_ADDRESS_0, b"\0\0\0\xfe"),
        ("write", CONFIG, MSIX_CAP + 2, b"\7\x80"),
        ("write", CONFIG, pci.COMMAND, MASTER),
    ]


def test_what_is_written_meanwhile_is_not_lost_but_for_its_driver(rig: Rig) -> None:
    in_use(rig)
    rig.stage.absent = NOBODY
    rig.kill()
    rig.function.reset()
    rig.write(CONFIG, pci.BASE_ADDRESS_0, b"\0\0\0\xfd")
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.write(0, 0, b"\1\2\3\4")
    rig.stage.absent = None

    rig.turn(1)

    written = rig.stage.device.writes()
    assert ("write", CONFIG, pci.BASE_ADDRESS_0, b"\0\0\0\xfd") in written
    assert ("write", CONFIG, pci.COMMAND, MASTER) in written
    assert not [entry for entry in written if entry[:2] == ("write", 0)]


def test_a_device_that_was_reset_comes_back_by_itself(rig: Rig) -> None:
    in_use(rig)
    rig.stage.absent = NOBODY
    rig.kill()
    rig.ghost.told()

    done = rig.function.reset()

    assert rig.done(done)
    assert rig.ghost.told() == [("bus master", False), "reset", "stayed dead"]
    rig.turn(1)
    rig.turn(1)
    rig.stage.absent = None
    rig.turn(0.5)
    assert rig.why_dead() is not None, "the pauses grow"
    rig.turn(1)
    assert rig.why_dead() is None


def test_a_device_that_nobody_uses_comes_back_by_itself(rig: Rig) -> None:
    rig.connect()
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.kill()
    rig.turn(1)

    assert rig.why_dead() is None
    assert len(rig.stage.devices) == 2


def test_after_its_driver_has_reset_it_nobody_uses_it(rig: Rig) -> None:
    in_use(rig)
    rig.write(0, rig.ghost.reset_at, b"\0")
    rig.kill()
    rig.turn(1)

    assert rig.why_dead() is None


def test_a_vmm_that_goes_lets_it_come_back(rig: Rig) -> None:
    in_use(rig)
    rig.kill()
    rig.disconnect()

    assert rig.why_dead() is None
    rig.connect()


def test_two_resets_are_one_attempt(rig: Rig) -> None:
    in_use(rig)
    rig.kill()

    first, second = rig.function.reset(), rig.function.reset()
    rig.turn()

    assert rig.done(first)
    assert rig.done(second)
    assert len(rig.stage.devices) == 2


def test_while_it_is_connected_it_is_dead(rig: Rig) -> None:
    in_use(rig)
    rig.kill()
    rig.stage.prepare = lambda device: device.mute.add(Command.DEVICE_RESET)
    done = rig.function.reset()
    rig.turn()

    assert rig.read(2, 0, 2) == b"\xff\xff"
    assert not rig.done(done)
    rig.stage.device.answer_waiting()
    rig.turn()
    assert rig.done(done)
    assert rig.read(2, 0, 2) == b"\0\0"


def test_a_device_that_dies_again_meanwhile(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    in_use(rig)
    rig.kill()
    rig.stage.prepare = lambda device: device.mute.add(Command.DEVICE_RESET)
    done = rig.function.reset()
    rig.turn()
    rig.watcher.told()

    rig.kill()

    assert rig.done(done)
    assert rig.watcher.told() == ["lost"]
    assert rig.function.deaths == 1


def test_an_attempt_takes_no_longer_than_an_answer(rig: Rig) -> None:
    in_use(rig)
    rig.kill()

    def slow(device: Scripted) -> None:
        device.mute.add(Command.DEVICE_GET_IRQ_INFO)

    rig.stage.prepare = slow
    done = rig.function.reset()
    rig.turn(2)
    rig.stage.device.answer_waiting()
    rig.stage.device.mute.add(Command.REGION_READ)
    rig.turn()
    assert not rig.done(done)
    rig.turn(2.1)

    assert rig.done(done)
    assert "was not ready within" in (rig.why_dead() or "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda shape: shape.put(pci.DEVICE_ID, 0x9999, 2), "vendor and device is 361b9999"),
        (lambda shape: shape.regions.update({2: RegionInfo(0x100, 3)}), "region 2 has 256 bytes"),
        (lambda shape: shape.irqs.pop(MSIX), "0 interrupts of kind 2, it had 8"),
        (lambda shape: shape.put(pci.CAPABILITY_LIST, MSIX_CAP, 1), "its capabilities are"),
    ],
)
def test_another_device_is_not_taken(
    rig: Rig, change: Callable[[Shape], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    in_use(rig)
    rig.kill()
    change(rig.stage.shape)

    done = rig.function.reset()
    rig.turn()

    assert rig.done(done)
    assert why in caplog.text
    assert rig.read(2, 0, 1) == b"\xff"
    rig.disconnect()
    rig.turn(60)
    assert rig.why_dead() is None, "the next VMM does not know the one before"


def test_a_device_whose_memory_the_vmm_has_mapped_waits_for_the_next_vmm(
    make: Callable[..., Rig],
) -> None:
    shape = Shape()
    fds = [os.memfd_create("bar") for _ in range(2)]
    for fd in fds:
        os.ftruncate(fd, 0x8000)
    shape.regions[2] = RegionInfo(0x8000, MAPPABLE, fds[0])
    rig = make(shape).start()
    in_use(rig)
    assert rig.function.region_info(2).fd is not None
    rig.kill()

    shape.regions[2] = RegionInfo(0x8000, MAPPABLE, fds[1])
    rig.function.reset()
    rig.turn()
    assert "has mapped BAR 2" in (rig.why_dead() or "")
    shape.regions[2] = RegionInfo(0x8000, MAPPABLE, fds[0])
    rig.function.reset()
    rig.turn()
    assert rig.why_dead() is None, "this is the same memory"
    in_use_again = rig.function.region_info(2)
    rig.kill()
    shape.regions[2] = RegionInfo(0x8000, MAPPABLE, fds[1])
    rig.disconnect()
    rig.turn(60)
    assert rig.why_dead() is None
    assert rig.function.region_info(2) != in_use_again

    for fd in fds:
        os.close(fd)


def test_memory_that_nobody_may_map_can_change(make: Callable[..., Rig]) -> None:
    shape = Shape()
    fds = [os.memfd_create("bar") for _ in range(2)]
    for fd in fds:
        os.ftruncate(fd, 0x8000)
    shape.regions[2] = RegionInfo(0x8000, MAPPABLE, fds[0])
    rig = make(shape, mappable=False).start()
    assert rig.function.region_info(2) == RegionInfo(0x8000, 3)
    in_use(rig)
    rig.kill()
    shape.regions[2] = RegionInfo(0x8000, MAPPABLE, fds[1])

    rig.function.reset()
    rig.turn()

    assert rig.why_dead() is None
    for fd in fds:
        os.close(fd)


def test_a_function_that_is_closed_stays_closed(rig: Rig) -> None:
    in_use(rig)
    rig.function.close()
    rig.function.close()

    assert rig.watcher.told() == ["lost"]
    assert rig.read(2, 0, 1) == b"\xff"
    assert rig.write(CONFIG, *FLR)
    rig.turn(100)
    assert len(rig.stage.devices) == 1
    assert not rig.stage.device.open


def test_closing_while_it_is_dead(rig: Rig) -> None:
    in_use(rig)
    rig.stage.absent = NOBODY
    rig.kill()
    rig.function.reset()
    rig.function.close()
    rig.stage.absent = None
    rig.turn(100)

    assert len(rig.stage.devices) == 1


def test_closing_while_it_is_connected(rig: Rig) -> None:
    in_use(rig)
    rig.kill()
    done = rig.function.reset()

    rig.function.close()
    rig.turn()

    assert rig.done(done)
