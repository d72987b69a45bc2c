"""The PCI configuration access capability, virtio 1.2, 4.1.4.9."""

from __future__ import annotations

import pytest

from tests.virtio.harness import CONFIG, DATA, Guest
from viommu.spec import virtio_pci as spec
from viommu.testing.ring import Used


def aim(guest: Guest, kind: spec.CfgType, offset: int, width: int) -> int:
    at = guest.caps[spec.CfgType.PCI][0]
    target = guest.caps[kind][1]
    guest.set_config(at + 4, 1, target.bar)
    guest.set_config(at + 8, 4, target.offset + offset)
    guest.set_config(at + 12, 4, width)
    return at + 16


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_window_reads_at_any_width(width: int) -> None:
    guest = Guest()
    data = aim(guest, spec.CfgType.DEVICE, 0, width)
    assert guest.config(data, width) == int.from_bytes(b"config"[:width], "little")


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_window_writes_at_any_width(width: int) -> None:
    guest = Guest()
    data = aim(guest, spec.CfgType.DEVICE, 0, width)
    guest.set_config(data, width, int.from_bytes(b"WXYZ"[:width], "little"))
    assert guest.device.config == b"WXYZ"[:width] + b"config"[width:]


def test_a_device_can_be_driven_without_a_bar() -> None:
    guest = Guest()
    guest.start()
    head = guest.queues[1].add([(DATA, 1)], [(DATA + 0x100, 1)])
    guest.queues[1].publish()
    data = aim(guest, spec.CfgType.NOTIFY, 4, 2)
    guest.set_config(data, 2, 1)
    assert guest.queues[1].collect() == [Used(head, 1)]


def test_a_dump_of_configuration_space_reads_no_register() -> None:
    guest = Guest()
    guest.function.config_changed()
    data = aim(guest, spec.CfgType.ISR, 0, 1)
    guest.function.region_read(CONFIG, 0, 4096)
    guest.function.region_read(CONFIG, data - 4, 8)
    assert guest.config(data, 1) == spec.ISR_CONFIG
    assert guest.config(data, 1) == 0


@pytest.mark.parametrize(
    ("bar", "offset", "width"),
    [
        (0, 0x2000, 0),
        (0, 0x2000, 3),
        (0, 0x2000, 8),
        (0, 0x2001, 2),
        (0, 0x4000, 4),
        (0, 0xFFFFFFFC, 4),
        (2, 0, 4),
        (6, 0, 4),
        (255, 0, 4),
    ],
)
def test_a_window_on_nothing(bar: int, offset: int, width: int) -> None:
    guest = Guest()
    at = guest.caps[spec.CfgType.PCI][0]
    guest.set_config(at + 4, 1, bar)
    guest.set_config(at + 8, 4, offset)
    guest.set_config(at + 12, 4, width)
    guest.set_config(at + 16, 4, 0x41414141)
    assert guest.config(at + 16, 4) == 0x41414141
    assert guest.device.config == b"config"
