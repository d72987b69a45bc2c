from __future__ import annotations

import pytest

from tests.endpoints.remote.scripted import (
    CONFIG,
    EXPRESS,
    FLR,
    INTX,
    MSIX_CAP,
    Shape,
)
from viommu.endpoints.remote.config import RemoteConfig
from viommu.endpoints.remote.description import Description
from viommu.spec import pci
from viommu.vfio_user import DeviceInfo


def config_of(shape: Shape) -> RemoteConfig:
    info = DeviceInfo(shape.flags, shape.num_regions, shape.num_irqs)
    return RemoteConfig(Description(info, shape.regions, shape.irqs, bytes(shape.config[:256])))


@pytest.fixture
def config() -> RemoteConfig:
    return config_of(Shape())


def masters(config: RemoteConfig) -> bool:
    return config.bus_master


def test_a_pin_is_seen_where_there_is_an_interrupt(config: RemoteConfig) -> None:
    shape = Shape()
    del shape.irqs[INTX]

    assert config.seen(pci.INTERRUPT_LINE, b"\x0b\1") == b"\x0b\1"
    assert config_of(shape).seen(pci.INTERRUPT_LINE, b"\x0b\1") == b"\x0b\0"
    assert config_of(shape).seen(pci.INTERRUPT_PIN + 1, b"\1\1") == b"\1\1"


@pytest.mark.parametrize(
    ("offset", "data", "seen"),
    [
        (pci.ROM_ADDRESS, b"\1\2\3\4", bytes(4)),
        (pci.ROM_ADDRESS - 2, b"\1\2\3\4", b"\1\2\0\0"),
        (pci.ROM_ADDRESS + 3, b"\1\2", b"\0\2"),
        (0, b"\1\2\3\4", b"\1\2\3\4"),
        (0x100, b"\1\2\3\4", b"\1\2\3\4"),
    ],
)
def test_the_rom_reads_and_is_written_as_zero(
    config: RemoteConfig, offset: int, data: bytes, seen: bytes
) -> None:
    assert config.seen(offset, data) == seen
    assert config.wrote(offset, data) == (seen, False)


def test_a_reset_is_noticed_and_passed_on(config: RemoteConfig) -> None:
    assert config.wrote(*FLR) == (FLR[1], True)
    assert config.wrote(EXPRESS + pci.EXP_DEVCTL, b"\xff\x7f")[1] is False


def test_bus_mastering_until_a_reset(config: RemoteConfig) -> None:
    assert not masters(config)
    config.wrote(pci.COMMAND, b"\4")
    assert masters(config)
    config.wrote(pci.COMMAND - 2, b"\0\0\2\0")
    assert not masters(config)
    config.wrote(pci.COMMAND, b"\7\1\0\0")
    assert masters(config)
    config.wrote(*FLR)
    assert not masters(config)
    config.keep_command(7)
    assert masters(config)
    config.forget()
    assert not masters(config)


def test_what_a_new_device_has_to_be_told(config: RemoteConfig) -> None:
    assert list(config.kept()) == []
    config.wrote(pci.COMMAND, b"\6\0")
    config.wrote(pci.BASE_ADDRESS_0 + 8, b"\xff\xff\xff\xff")
    config.wrote(pci.BASE_ADDRESS_0 + 8, b"\x0c\0\0\xfe\1\0\0\0")
    config.wrote(pci.INTERRUPT_LINE, b"\x0b")
    config.wrote(MSIX_CAP + 2, b"\7\xc0")
    config.wrote(pci.BASE_ADDRESS_0 + 16, b"\1")  # a part of a register

    assert list(config.kept()) == [
        (pci.BASE_ADDRESS_0 + 8, b"\x0c\0\0\xfe"),
        (pci.BASE_ADDRESS_0 + 12, b"\1\0\0\0"),
        (pci.INTERRUPT_LINE, b"\x0b"),
        (MSIX_CAP + 2, b"\7\xc0"),
        (pci.COMMAND, b"\6\0"),
    ]
    config.forget()
    assert list(config.kept()) == []


def test_registers_are_as_wide_as_devices_want_them() -> None:
    shape = Shape()
    assert config_of(shape).reset_write() == FLR

    shape.config[EXPRESS : EXPRESS + 4] = bytes([pci.CAP_ID_AF, 0, 6, pci.AF_CAP_FLR])
    assert config_of(shape).reset_write() == (EXPRESS + pci.AF_CTRL, bytes([pci.AF_CTRL_FLR]))

    shape.config[EXPRESS] = pci.CAP_ID_PM
    assert config_of(shape).reset_write() is None
    assert CONFIG in shape.regions
