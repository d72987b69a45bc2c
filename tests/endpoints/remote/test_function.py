"""A function in front of a device in another process, alive and dead."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.remote.conftest import Shift
from tests.endpoints.remote.scripted import (
    CONFIG,
    FLR,
    MSIX,
    MSIX_CAP,
    Shape,
)
from viommu.errors import BackendError, PeerError, UsageError
from viommu.spec import pci, vfio
from viommu.spec.vfio_user import Command
from viommu.vfio_user.protocol import Capabilities

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.endpoints.remote.conftest import Rig
    from viommu.vfio_user import ServedDevice
    from viommu.vfio_user.protocol import Message

COMMAND_OFF = ("write", CONFIG, pci.COMMAND, b"\0\0")
MASTER = (pci.COMMAND_MEMORY | pci.COMMAND_MASTER).to_bytes(2, "little")
NOBODY = PeerError(errno.ECONNREFUSED, "nobody is there")


# --- alive


def test_it_is_a_served_device(rig: Rig) -> None:
    served: ServedDevice = rig.function

    assert (served.name, served.num_regions, served.num_irqs) == ("00:07.0", 9, 5)
    assert rig.function.client is not None


def test_a_device_is_told_its_mappings_then_reset_then_used(make: Callable[..., Rig]) -> None:
    rig = make().start()

    assert rig.watcher.told() == ["connected", False]
    assert rig.stage.device.writes() == [COMMAND_OFF, ("reset",)]
    assert rig.ghost.told() == [("follow", 256), "revived"]


def test_accesses_are_passed_on(rig: Rig) -> None:
    rig.stage.device.bars[2][0x10:0x14] = b"abcd"

    assert rig.read(2, 0x10, 4) == b"abcd"
    assert rig.write(2, 0x20, b"xy")

    assert rig.stage.device.log == [("read", 2, 0x10, 4), ("write", 2, 0x20, b"xy")]
    assert rig.ghost.told() == [("answered", 2, 0x10, b"abcd")]


def test_writes_are_passed_on_in_order_without_waiting(rig: Rig) -> None:
    rig.stage.device.mute.add(Command.REGION_WRITE)

    done = [rig.function.region_write(0, 4 * number, bytes(4)) for number in range(5)]
    rig.turn()
    assert not any(rig.done(one) for one in done)
    rig.stage.device.answer_waiting()
    rig.turn()

    assert all(rig.done(one) for one in done)
    assert [entry[2] for entry in rig.stage.device.log] == [0, 4, 8, 12, 16]


def test_a_filter_stands_in_between(make: Callable[..., Rig]) -> None:
    between = Shift()
    rig = make(access_filter=between).start()
    rig.stage.device.bars[2][0x10:0x14] = b"abcd"
    rig.ghost.told()

    assert rig.read(2, 0x10, 4) == b"bcde"
    rig.write(2, 0x20, b"xy")

    assert between.followed == 256
    assert rig.stage.device.log[-1] == ("write", 2, 0x20, b"yz")
    assert rig.ghost.told() == [("answered", 2, 0x10, b"abcd")]
    assert rig.read(CONFIG, 0, 2) == b"\x36\x1b"


def test_large_accesses_come_in_pieces(make: Callable[..., Rig]) -> None:
    shape = Shape()
    shape.capabilities = Capabilities(8, max_data_xfer_size=100)
    rig = make(shape).start()
    rig.stage.device.bars[0][:250] = bytes(range(250))
    rig.stage.device.writes()

    assert rig.read(0, 0, 250) == bytes(range(250))
    assert rig.write(0, 0x800, bytes(150))

    assert rig.stage.device.log == [
        ("read", 0, 0, 100),
        ("read", 0, 100, 100),
        ("read", 0, 200, 50),
        ("write", 0, 0x800, bytes(100)),
        ("write", 0, 0x864, bytes(50)),
    ]


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_a_device_that_refuses_an_access_is_not_dead(make: Callable[..., Rig], limit: int) -> None:
    shape = Shape()
    shape.capabilities = Capabilities(8, max_data_xfer_size=limit)
    rig = make(shape).start()
    rig.stage.device.refuse = {Command.REGION_READ: errno.EINVAL, Command.REGION_WRITE: errno.EPERM}

    assert rig.read(0, 0, 150) == b"\xff" * 150
    assert rig.write(CONFIG, 0x40, bytes(150))

    assert rig.function.refused == 2
    assert rig.why_dead() is None


def test_there_is_no_rom_to_see(rig: Rig) -> None:
    assert rig.read(CONFIG, pci.ROM_ADDRESS, 4) == bytes(4)
    rig.write(CONFIG, pci.ROM_ADDRESS, b"\0\xf8\xff\xff")
    assert rig.stage.device.writes() == [("write", CONFIG, pci.ROM_ADDRESS, bytes(4))]


def test_bus_mastering_is_followed(rig: Rig) -> None:
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.write(CONFIG, pci.COMMAND, MASTER)
    assert rig.watcher.told() == [True]
    rig.write(CONFIG, pci.COMMAND, b"\2\0")
    assert rig.watcher.told() == [False]
    assert rig.ghost.told() == [("bus master", True), ("bus master", False)]


def test_a_system_reset(rig: Rig) -> None:
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.stage.device.writes()
    rig.watcher.told()
    rig.ghost.told()

    done = rig.function.reset()
    assert not rig.done(done)
    rig.turn()

    assert rig.done(done)
    assert rig.stage.device.writes() == [COMMAND_OFF, ("reset",)]
    assert rig.watcher.told() == [False]
    assert rig.ghost.told() == [("bus master", False), "reset"]


def test_a_device_without_a_reset_has_a_register_for_it(make: Callable[..., Rig]) -> None:
    shape = Shape()
    shape.flags = vfio.DEVICE_FLAGS_PCI
    rig = make(shape).start()

    assert rig.stage.device.writes() == [COMMAND_OFF, ("write", CONFIG, *FLR)]


def test_a_device_that_nothing_resets_is_stopped(make: Callable[..., Rig]) -> None:
    shape = Shape()
    shape.flags = vfio.DEVICE_FLAGS_PCI
    shape.put(pci.CAPABILITY_LIST, MSIX_CAP, 1)
    rig = make(shape).start()

    assert rig.stage.device.writes() == [COMMAND_OFF]


def test_a_refused_reset_is_a_reset(rig: Rig) -> None:
    rig.stage.device.refuse[Command.DEVICE_RESET] = errno.EIO

    done = rig.function.reset()
    rig.turn()

    assert rig.done(done)
    assert rig.function.refused == 1


@pytest.mark.parametrize("forgets", [True, False])
def test_a_function_level_reset_is_passed_on(rig: Rig, forgets: bool) -> None:
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.stage.device.writes()
    rig.watcher.told()
    rig.ghost.told()
    if forgets:
        rig.stage.device.bars[CONFIG][pci.COMMAND] = 0

    assert rig.write(CONFIG, *FLR)

    assert rig.stage.device.writes() == [("write", CONFIG, *FLR)]
    # A device that still masters the bus is not written to by a guest that restores it.
    assert rig.watcher.told() == ([False] if forgets else [])
    assert "reset" in rig.ghost.told()


def test_a_reset_allows_nothing_that_the_guest_did_not(rig: Rig) -> None:
    rig.stage.device.bars[CONFIG][pci.COMMAND] = 0xFF

    rig.write(CONFIG, *FLR)

    assert rig.watcher.told() == []


def test_what_is_written_after_a_function_level_reset_counts(rig: Rig) -> None:
    rig.write(CONFIG, pci.COMMAND, MASTER)
    device = rig.stage.device
    device.mute = {Command.REGION_READ}
    rig.watcher.told()

    rig.write(CONFIG, *FLR)
    device.bars[CONFIG][pci.COMMAND] = 0  # as it was when the question arrived
    rig.write(CONFIG, pci.COMMAND, MASTER)
    device.bars[CONFIG][pci.COMMAND] = 0
    device.answer_waiting()
    rig.turn()

    assert rig.watcher.told() == []
    rig.write(CONFIG, pci.COMMAND, bytes(2))
    assert rig.watcher.told() == [False]


def test_a_device_that_dies_of_a_function_level_reset_masters_no_bus(rig: Rig) -> None:
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.stage.device.mute = {Command.REGION_READ}
    rig.stage.absent = NOBODY
    rig.write(CONFIG, *FLR)
    rig.watcher.told()

    rig.kill()
    assert rig.watcher.told() == [False, "lost"]
    rig.stage.absent = None
    rig.turn(60)

    assert rig.why_dead() is None
    assert rig.watcher.told() == ["connected", False]


def test_a_vmm_that_goes_leaves_nothing(rig: Rig) -> None:
    lines = rig.connect()
    flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
    lines.set_irqs(vfio.IRQ_SET.pack(20, flags, MSIX, 0, 1), [os.dup(rig.eventfd())])
    rig.write(CONFIG, pci.COMMAND, MASTER)
    rig.turn()
    device = rig.stage.device
    device.writes()
    rig.watcher.told()

    rig.disconnect()

    disable = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER
    assert device.writes() == [("irqs", disable, MSIX, 0, 0, 0), COMMAND_OFF, ("reset",)]
    assert device.eventfds == {}
    assert rig.watcher.told() == [False]
    rig.connect()


# --- not usable


def test_nobody_there_is_said_at_once(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.stage.absent = NOBODY
    with pytest.raises(BackendError, match=r"00:07\.0: nobody is there"):
        rig.start()


def test_what_a_dialler_says_is_passed_on(make: Callable[..., Rig]) -> None:
    def dial() -> None:
        raise UsageError("there is no such program")

    rig = make()
    rig.stage.dial = dial  # type: ignore[assignment, method-assign]
    with pytest.raises(UsageError, match="no such program"):
        rig.start()


def test_a_device_that_takes_too_long_is_given_up(make: Callable[..., Rig]) -> None:
    rig = make()

    def answer(_: Message, reply: bytes) -> bytes:
        rig.now += 0.5
        return reply

    rig.stage.prepare = lambda device: setattr(device, "lie", answer)
    with pytest.raises(BackendError) as caught:
        rig.start()
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_mapper_that_can_not_serve_it(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.watcher.refuse = True
    with pytest.raises(BackendError):
        rig.start()
    assert rig.watcher.told()[-1] == "lost"


# --- dead


def test_a_dead_device_reads_as_all_ones(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.connect()
    rig.kill()

    assert rig.read(CONFIG, 0, 64) == b"\xff" * 64
    assert rig.read(2, 0x10, 4) == b"\xff" * 4
    assert rig.read(0, 0, 4) == b"\x60\x61\x62\x63", "the afterlife knows better"
    assert rig.write(2, 0, b"lost")
    assert rig.write(CONFIG, 0x60, b"lost")

    assert rig.watcher.told() == ["lost"]
    assert rig.ghost.told() == [("died", True)]
    state = rig.function.describe()
    assert state["state"] == "dead"
    assert isinstance(state["dead"], dict)
    assert "gone" in state["dead"]["why"]
    assert state["dead"]["since"].endswith("+00:00")
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "00:07.0: the device is dead: the server has gone" in record.message


def test_what_waits_when_it_dies_is_answered(rig: Rig) -> None:
    rig.stage.device.mute |= {Command.REGION_READ, Command.REGION_WRITE, Command.DEVICE_RESET}
    read = rig.function.region_read(0, 0, 4)
    other = rig.function.region_read(2, 0, 4)
    write = rig.function.region_write(2, 0, bytes(4))
    reset = rig.function.reset()
    rig.turn()
    assert [rig.done(one) for one in (read, other, write, reset)] == [False] * 4
    rig.stage.absent = NOBODY

    rig.kill()

    assert rig.result(read) == b"\x60\x61\x62\x63"
    assert rig.result(other) == b"\xff" * 4
    assert rig.done(write)
    assert rig.done(reset)


def test_a_device_that_does_not_answer_in_time_is_dead(rig: Rig) -> None:
    rig.stage.device.mute.add(Command.REGION_READ)
    read = rig.function.region_read(2, 0, 4)

    rig.turn(4.1)

    assert rig.result(read) == b"\xff" * 4
    assert "in time" in (rig.why_dead() or "")
    assert not rig.stage.devices[0].open


def test_a_device_that_lies_is_dead(rig: Rig) -> None:
    rig.stage.device.lie = lambda _, reply: bytes([reply[0] ^ 1]) + reply[1:]

    assert rig.read(2, 0, 4) == b"\xff" * 4
    assert rig.function.deaths == 1


def test_no_vmm_is_served_without_a_device(rig: Rig) -> None:
    rig.stage.absent = NOBODY
    rig.kill()

    with pytest.raises(PeerError, match="there is no device") as caught:
        rig.connect()
    assert caught.value.errno == errno.ENODEV


def test_a_vmm_that_comes_too_early_has_the_device_dialled_for_the_next_one(rig: Rig) -> None:
    rig.stage.absent = NOBODY
    rig.kill()
    rig.turn(40)
    rig.turn(1)  # pauses have grown: the next one is longer than that
    rig.stage.absent = None

    with pytest.raises(PeerError, match="there is no device"):
        rig.connect()
    rig.turn()

    rig.connect()
