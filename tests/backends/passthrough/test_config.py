from __future__ import annotations

import pytest

from tests.backends.passthrough.fake_device import (
    AF,
    BAR2,
    CONFIG,
    EXPRESS,
    MSIX,
    PM,
    FakeVfioDevice,
)
from viommu.pci.layout import BarPlace
from viommu.spec import pci
from viommu_backends.passthrough.config import HostConfig

MEMORY = pci.COMMAND_MEMORY
SILENT = pci.COMMAND_INTX_DISABLE >> 8


@pytest.fixture
def config(device: FakeVfioDevice) -> HostConfig:
    return HostConfig(device)


def place(config: HostConfig, bar: int, address: int, width: int = 8) -> None:
    config.write(pci.BASE_ADDRESS_0 + 4 * bar, address.to_bytes(width, "little"))


@pytest.mark.parametrize("size", [256, 4096])
def test_it_is_as_long_as_the_host_s(size: int) -> None:
    device = FakeVfioDevice(config_size=size)

    assert HostConfig(device).size == size
    assert len(HostConfig(device).read(0, size)) == size
    device.close()


def test_there_is_no_interrupt_pin_and_no_rom(device: FakeVfioDevice, config: HostConfig) -> None:
    device.write(CONFIG, pci.ROM_ADDRESS, b"\1\0\xff\xff")
    assert device.read(CONFIG, pci.INTERRUPT_PIN, 1) == b"\1"

    whole = config.read(0, 4096)

    assert whole[pci.INTERRUPT_PIN] == 0
    assert whole[pci.ROM_ADDRESS : pci.ROM_ADDRESS + 4] == bytes(4)
    assert config.read(pci.INTERRUPT_PIN, 1) == b"\0"
    assert config.read(pci.ROM_ADDRESS + 2, 1) == b"\0"
    assert config.read(pci.VENDOR_ID, 4) == b"\x36\x1b\x10\x00"


@pytest.mark.parametrize(
    ("offset", "data", "filtered", "reset"),
    [
        (pci.COMMAND, b"\7\0", b"\7" + bytes([SILENT]), False),
        (pci.COMMAND, b"\7\4\0\0", b"\7\4\0\0", False),
        (pci.COMMAND, b"\7", b"\7", False),
        (pci.COMMAND + 1, b"\0", bytes([SILENT]), False),
        (pci.ROM_ADDRESS, b"\xff\xff\xff\xff", bytes(4), False),
        (pci.ROM_ADDRESS - 2, b"\1\2\3\4", b"\1\2\0\0", False),
        (pci.ROM_ADDRESS + 2, b"\1\2\3\4", b"\0\0\3\4", False),
        (EXPRESS + pci.EXP_DEVCTL, b"\x10\x80", b"\x10\x00", True),
        (EXPRESS + pci.EXP_DEVCTL, b"\x10\x28", b"\x10\x28", False),
        (EXPRESS + pci.EXP_DEVCTL, b"\xff", b"\xff", False),
        (EXPRESS + pci.EXP_DEVCTL + 1, b"\x80", b"\0", True),
        (AF + pci.AF_CTRL, b"\1", b"\0", True),
        (AF + pci.AF_CTRL, b"\0", b"\0", False),
        (0, bytes(range(4)), bytes(range(4)), False),
    ],
)
def test_what_is_written_instead(
    config: HostConfig, offset: int, data: bytes, filtered: bytes, reset: bool
) -> None:
    assert config.filter(offset, data) == (filtered, reset)


@pytest.mark.parametrize(
    ("at", "where"),
    [(EXPRESS + pci.EXP_DEVCAP + 3, "express"), (AF + pci.AF_CAP, "advanced features")],
)
def test_a_function_without_such_a_reset_is_not_reset(
    device: FakeVfioDevice, at: int, where: str
) -> None:
    device._store(at, b"\0")
    config = HostConfig(device)

    resets = [
        config.filter(EXPRESS + pci.EXP_DEVCTL, b"\0\x80")[1],
        config.filter(AF + pci.AF_CTRL, b"\1")[1],
    ]

    assert resets == [where != "express", where == "express"]


def test_where_msix_is(device: FakeVfioDevice, config: HostConfig) -> None:
    assert config.msix == (BarPlace(0, 0x2000, 0x2080), BarPlace(0, 0x3000, 0x3008))
    device._store(MSIX, b"\0")
    assert HostConfig(device).msix == ()


def test_bars_are_where_they_are_decoded(device: FakeVfioDevice, config: HostConfig) -> None:
    place(config, 0, 0xFE00_0000)
    place(config, 2, 0x8_0000_0000)
    place(config, 4, 0xC001, 4)
    assert config.bars() == {}

    config.command = MEMORY

    assert config.bars() == {0: 0xFE00_0000, 2: 0x8_0000_0000}
    assert device.command == MEMORY | pci.COMMAND_INTX_DISABLE
    config.forget_bars()
    assert config.bars() == {}
    assert device.bar(2) == pci.BAR_MEM_64 | pci.BAR_PREFETCH


@pytest.mark.parametrize(
    ("bar", "address", "width"), [(0, 0, 8), (2, -BAR2 & (1 << 64) - 1, 8), (5, 0xFFFFFF00, 4)]
)
def test_what_is_no_address(config: HostConfig, bar: int, address: int, width: int) -> None:
    config.command = MEMORY
    place(config, bar, address, width)

    assert config.bars() == {}


def test_a_function_that_sleeps_decodes_nothing(config: HostConfig) -> None:
    place(config, 2, 0x8_0000_0000)
    config.command = MEMORY

    assert config.bars(PM + pci.PM_CTRL, b"\3\0") == {}
    config.write(PM + pci.PM_CTRL, b"\3")
    assert config.bars() == {}
    assert config.bars(PM + pci.PM_CTRL, b"\0\0") == {2: 0x8_0000_0000}


@pytest.mark.parametrize(
    ("offset", "data", "bars"),
    [
        (pci.COMMAND, b"\0\0", {}),
        (pci.COMMAND, b"\7\0\0\0", {2: 0x8_0000_0000}),
        (pci.BASE_ADDRESS_0 + 12, b"\x09\0\0\0", {2: 0x9_0000_0000}),
        (pci.BASE_ADDRESS_0 + 8, b"\0\0\x01\0", {2: 0x8_0001_0000}),
        (pci.BASE_ADDRESS_0 + 9, b"\0\x02", {2: 0x8_0002_0000}),
        (pci.CACHE_LINE_SIZE, b"\xff", {2: 0x8_0000_0000}),
    ],
)
def test_where_bars_would_be(
    config: HostConfig, offset: int, data: bytes, bars: dict[int, int]
) -> None:
    place(config, 2, 0x8_0000_0000)
    config.command = MEMORY

    assert config.bars(offset, data) == bars


@pytest.mark.parametrize(
    ("offset", "size", "moves"),
    [
        (pci.COMMAND, 2, True),
        (pci.COMMAND - 2, 4, True),
        (pci.COMMAND + 2, 2, False),
        (pci.BASE_ADDRESS_0, 4, True),
        (pci.BASE_ADDRESS_0 + 23, 1, True),
        (pci.BASE_ADDRESS_0 + 24, 4, False),
        (PM + pci.PM_CTRL, 2, True),
        (PM + pci.PM_CTRL - 2, 2, False),
        (MSIX, 4, False),
    ],
)
def test_what_may_place_bars(config: HostConfig, offset: int, size: int, moves: bool) -> None:
    assert config.places_bars(offset, size) is moves


@pytest.mark.parametrize(
    ("offset", "data", "starts"),
    [
        (pci.COMMAND, b"\4\0", True),
        (pci.COMMAND, b"\3\0", False),
        (pci.COMMAND + 1, b"\4", False),
        (0, bytes(4) + b"\6", True),
    ],
)
def test_what_starts_dma(config: HostConfig, offset: int, data: bytes, starts: bool) -> None:
    assert config.starts_dma(offset, data) is starts


def test_a_broken_chain_of_capabilities_ends(device: FakeVfioDevice) -> None:
    device._store(AF + 1, bytes([PM]))

    assert HostConfig(device).msix
