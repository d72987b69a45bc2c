"""A host device served: by hand, and what other devices reach of it meanwhile."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.backends.passthrough.fake_device import (
    BAR0,
    BAR2,
    CONFIG,
    EXPRESS,
    MAPPABLE,
    PM,
    PORTS,
    READ_WRITE,
    SMALL,
    FakeVfioDevice,
)
from tests.memory.recording import RecordingTarget
from viommu.memory import GuestMemory
from viommu.memory.regions import RegionManager
from viommu.spec import pci, vfio
from viommu.vfio_user import IrqLines, RegionInfo
from viommu_backends.passthrough.function import PassthroughFunction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.backends.passthrough.conftest import Clock
    from viommu.loop import Loop
    from viommu.memory.dma_target import AddressRange
    from viommu.vfio_user import ServedDevice
    from viommu_backends.vfio_device import VfioDevice

PLACE = 0x8_0000_0000
MEMORY, MASTER = pci.COMMAND_MEMORY, pci.COMMAND_MASTER
RESET = b"\0\x80"


class Peer(RecordingTarget):
    """Another device's IOMMU, which notes in the log of ours what it maps and unmaps."""

    def __init__(self, log: list[str]) -> None:
        super().__init__("peer")
        self.log = log

    def map_dma(self, where: AddressRange, /, **what: Any) -> None:
        super().map_dma(where, **what)
        self.log.append(f"map {where.start:#x}")

    def unmap_dma(self, where: AddressRange, /) -> None:
        super().unmap_dma(where)
        self.log.append(f"unmap {where.start:#x}")


class Rig:
    def __init__(self, device: FakeVfioDevice, loop: Loop, clock: Clock) -> None:
        self.device = device
        self.regions = RegionManager()
        self.peer = Peer(device.log)
        self.registration = self.regions.register(self.peer, "peer")
        self.function = PassthroughFunction(
            "00:06.0", GuestMemory(), cast("VfioDevice", device), self.regions, loop
        )
        self._loop = loop
        self._clock = clock

    def write(self, offset: int, data: bytes) -> None:
        self.function.region_write(CONFIG, offset, data)

    def command(self, value: int) -> None:
        self.write(pci.COMMAND, value.to_bytes(2, "little"))

    def place(self, address: int, bar: int = 2) -> None:
        self.write(pci.BASE_ADDRESS_0 + 4 * bar, address.to_bytes(8, "little"))

    def enable(self, address: int = PLACE) -> None:
        """Have BAR 2 decoded, and forget what that took."""
        self.place(address)
        self.command(MEMORY | MASTER)
        self.device.log.clear()

    def reached(self) -> list[int]:
        return sorted(self.peer.entries)

    def wait(self) -> None:
        self._clock.now += 0.1
        self._loop.turn(0)

    def close(self) -> None:
        self.function.close()
        self.registration.release()
        assert self.peer.violations == []
        assert self.regions.regions() == []


@pytest.fixture
def rig(device: FakeVfioDevice, loop: Loop, clock: Clock) -> Iterator[Rig]:
    rig = Rig(device, loop, clock)
    yield rig
    rig.close()


def test_it_is_a_served_device(rig: Rig) -> None:
    served: ServedDevice = rig.function

    assert (served.num_regions, served.num_irqs) == (9, 5)
    assert served.name == "00:06.0"
    assert [served.irq_info(index).count for index in range(5)] == [0, 1, 8, 1, 1]


def test_regions_as_a_vmm_sees_them(rig: Rig) -> None:
    told = [rig.function.region_info(index) for index in range(9)]
    fd = rig.device.fd

    assert told[0] == RegionInfo(BAR0, MAPPABLE, fd, 0, ((0, 0x2000), (0x4000, 0x4000)))
    assert told[2] == RegionInfo(BAR2, MAPPABLE, fd, BAR0, ())
    assert told[4] == RegionInfo(PORTS, READ_WRITE)
    assert told[5] == RegionInfo(SMALL, READ_WRITE)
    assert told[vfio.PCI_CONFIG_REGION_INDEX] == RegionInfo(4096, READ_WRITE)
    assert [told[index] for index in (1, 3, 6, 8)] == [RegionInfo(0, 0)] * 4


def test_a_device_without_a_message_table_is_mappable_as_a_whole(loop: Loop, clock: Clock) -> None:
    device = FakeVfioDevice()
    device._store(0x60, b"\xff")
    rig = Rig(device, loop, clock)

    assert rig.function.region_info(0) == RegionInfo(BAR0, MAPPABLE, device.fd, 0, ())
    rig.close()
    device.close()


def test_accesses_reach_the_device(rig: Rig) -> None:
    rig.enable()

    rig.function.region_write(2, 0x10, b"\1\2\3\4\5\6\7\x08")

    assert rig.function.region_read(2, 0x12, 4) == b"\3\4\5\6"
    assert os.pread(rig.device.fd, 4, BAR0 + 0x10) == b"\1\2\3\4"
    assert rig.function.region_read(CONFIG, 0, 4) == b"\x36\x1b\x10\x00"


def test_what_the_device_does_not_answer_is_all_ones(rig: Rig) -> None:
    rig.function.region_write(2, 0, b"\1\2")

    assert rig.function.region_read(2, 0, 4) == b"\xff\xff\xff\xff"
    rig.enable()
    assert rig.function.region_read(2, 0, 2) == b"\0\0"


def test_a_bar_can_be_sized(rig: Rig) -> None:
    at = pci.BASE_ADDRESS_0 + 8
    rig.write(at, b"\xff\xff\xff\xff")
    rig.write(at + 4, b"\xff\xff\xff\xff")

    low = int.from_bytes(rig.function.region_read(CONFIG, at, 4), "little")

    assert low & ~0xF == -BAR2 & 0xFFFFFFFF
    assert rig.reached() == []


def test_a_bar_is_within_reach_after_it_is_decoded_and_until_before_it_is_not(rig: Rig) -> None:
    rig.place(PLACE)
    assert rig.reached() == []
    rig.device.log.clear()

    rig.command(MEMORY)
    rig.command(MEMORY | MASTER)
    rig.command(0)

    assert rig.device.log == [
        "decode", f"map {PLACE:#x}", f"unmap {PLACE:#x}", "decode not",
    ]  # fmt: skip


def test_a_bar_that_moves_is_dropped_and_restored(rig: Rig) -> None:
    rig.enable()

    rig.write(pci.BASE_ADDRESS_0 + 12, b"\x09\0\0\0")

    assert rig.device.log == [f"unmap {PLACE:#x}", "map 0x900000000"]


def test_a_write_across_everything_is_one_step(rig: Rig) -> None:
    rig.enable()

    header = bytearray(rig.function.region_read(CONFIG, 0, 0x40))
    header[pci.BASE_ADDRESS_0 + 12] = 9
    rig.write(0, bytes(header))

    assert rig.device.log == [f"unmap {PLACE:#x}", "map 0x900000000"]


def test_sleep_is_as_good_as_no_decoding(rig: Rig) -> None:
    rig.enable()

    rig.write(PM + pci.PM_CTRL, b"\3\0")
    assert rig.reached() == []
    rig.write(PM + pci.PM_CTRL, b"\0\0")

    assert rig.reached() == [PLACE]


def test_a_device_that_stops_decoding_by_itself_is_taken_at_its_word(rig: Rig) -> None:
    rig.enable()
    rig.device._store(pci.COMMAND, b"\0", writable=b"\4")

    rig.command(MEMORY | MASTER)

    assert rig.reached() == []


def test_interrupts_are_never_lines(rig: Rig) -> None:
    rig.command(MEMORY)

    assert rig.device.command == MEMORY | pci.COMMAND_INTX_DISABLE
    assert rig.function.region_read(CONFIG, pci.INTERRUPT_PIN, 1) == b"\0"


def test_a_function_level_reset_takes_bars_away_and_puts_them_back(rig: Rig) -> None:
    rig.enable()

    rig.write(EXPRESS + pci.EXP_DEVCTL, RESET)

    assert rig.device.log == [f"unmap {PLACE:#x}", "reset", f"map {PLACE:#x}"]
    assert rig.device.command & (MEMORY | MASTER) == MEMORY
    assert rig.device.read(CONFIG, EXPRESS + pci.EXP_DEVCTL, 2) == b"\0\0"


def test_a_reset_that_has_to_wait_keeps_bars_away_until_it_is_done(rig: Rig) -> None:
    rig.enable()
    rig.device.busy = 1

    rig.write(EXPRESS + pci.EXP_DEVCTL, RESET)
    rig.command(MEMORY)
    assert rig.reached() == []
    rig.wait()

    assert rig.device.log == [f"unmap {PLACE:#x}", "reset", f"map {PLACE:#x}"]


def test_a_driver_that_does_not_wait_for_a_reset_gets_its_device(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.enable()
    rig.device.busy = 1

    rig.write(EXPRESS + pci.EXP_DEVCTL, RESET)
    rig.command(MEMORY | MASTER)
    rig.wait()

    assert rig.reached() == [PLACE]
    assert "reset" not in rig.device.log
    assert "does not wait" in caplog.text


def test_a_system_reset_stops_the_device_first(rig: Rig) -> None:
    rig.enable()

    rig.function.reset()

    assert rig.device.log == [f"unmap {PLACE:#x}", "decode not", "reset"]
    assert rig.device.command == pci.COMMAND_INTX_DISABLE


def test_a_device_that_can_not_be_reset_is_stopped(loop: Loop, clock: Clock) -> None:
    device = FakeVfioDevice(can_reset=False)
    rig = Rig(device, loop, clock)
    rig.enable()

    rig.function.reset()

    assert device.log == [f"unmap {PLACE:#x}", "decode not"]
    assert device.command == pci.COMMAND_INTX_DISABLE
    rig.close()
    device.close()


def test_the_kernel_signals_the_vmm_until_it_goes(rig: Rig) -> None:
    lines = IrqLines([rig.function.irq_info(index).count for index in range(5)])
    rig.function.connect(lines)
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
    lines.set_irqs(vfio.IRQ_SET.pack(20, flags, 2, 0, 1), [os.dup(event)])

    rig.device.signal(2, 0)
    assert os.eventfd_read(event) == 1
    rig.enable()
    rig.function.reset()
    assert rig.device.eventfds, "a system reset leaves them"
    rig.function.disconnect()

    assert rig.device.eventfds == {}
    lines.close()
    os.close(event)


def test_after_a_vmm_has_gone_the_next_finds_a_device_as_after_power_on(rig: Rig) -> None:
    rig.enable()
    lines = IrqLines([0] * 5)
    rig.function.connect(lines)

    rig.function.disconnect()

    assert rig.device.log == [f"unmap {PLACE:#x}", "decode not", "reset"]
    assert rig.function.region_read(CONFIG, pci.BASE_ADDRESS_0 + 12, 4) == bytes(4)
    assert rig.device.bar(2) & ~0xF == 0
    lines.close()


def test_a_device_is_stopped_when_it_is_opened(loop: Loop, clock: Clock) -> None:
    """Whoever had it before may have left it doing DMA."""
    device = FakeVfioDevice()
    device.write(CONFIG, pci.COMMAND, b"\7\0")
    rig = Rig(device, loop, clock)

    assert device.command == pci.COMMAND_INTX_DISABLE
    rig.close()
    device.close()


def test_closing_stops_the_device_and_gives_up_what_waits(rig: Rig) -> None:
    rig.enable()
    rig.device.busy = 9
    rig.function.reset()

    rig.function.close()
    rig.function.close()
    rig.function.disconnect()
    rig.wait()

    assert rig.reached() == []
    assert rig.device.command == pci.COMMAND_INTX_DISABLE
    assert "reset" not in rig.device.log


def test_a_device_that_was_pulled_out_does_no_harm(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.enable()
    rig.device.gone = True

    assert rig.function.region_read(2, 0, 4) == b"\xff" * 4
    rig.function.region_write(2, 0, b"1234")
    rig.function.close()

    assert rig.reached() == []
    assert caplog.text
