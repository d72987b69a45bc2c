from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from viommu.errors import UsageError
from viommu.memory import GuestMemory
from viommu.pci import Identity, PciFunction, ResetKind
from viommu.spec import pci as spec
from viommu.spec import vfio

if TYPE_CHECKING:
    from viommu.vfio_user.served import ServedDevice

CONFIG = vfio.PCI_CONFIG_REGION_INDEX


class Lines:
    """Records the interrupts that a client would see."""

    def __init__(self) -> None:
        self.raised: list[tuple[int, int]] = []

    def trigger(self, index: int, vector: int) -> bool:
        self.raised.append((index, vector))
        return True


class Ram:
    """A BAR that remembers."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.bytes[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data


class Function(PciFunction):
    def __init__(self) -> None:
        super().__init__("00:04.0", GuestMemory(), Identity(0x1234, 0x11E8, 0x00FF00))
        self.events: list[object] = []
        self.ram = Ram(4096)
        self.add_bar(0, 4096, self.ram)
        self.add_bar(2, 1 << 33, Ram(64), prefetchable=True, bits64=True)
        self.add_msi(2)
        self.add_msix(3, bar=4)
        self.lines = Lines()
        self.connect(self.lines)

    def on_bus_master(self, *, enabled: bool) -> None:
        self.events.append(enabled)

    def on_reset(self, kind: ResetKind) -> None:
        assert not self.bus_master
        self.events.append(kind)

    def masters(self) -> bool:
        return self.bus_master

    def config_write(self, offset: int, value: int, size: int) -> None:
        self.region_write(CONFIG, offset, value.to_bytes(size, "little"))

    def capability(self, cap_id: int) -> int:
        offset = self.config.read(spec.CAPABILITY_LIST, 1)[0]
        while offset:
            found, following = self.config.read(offset, 2)
            if found == cap_id:
                return offset
            offset = following
        raise AssertionError(f"no capability {cap_id:#x}")


def test_it_can_be_served() -> None:
    device: ServedDevice = Function()
    assert (device.num_regions, device.num_irqs) == (9, 5)


def test_regions() -> None:
    function = Function()
    both = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
    infos = [function.region_info(index) for index in range(function.num_regions)]
    assert [(info.size, info.flags) for info in infos] == [
        (4096, both),
        (0, 0),
        (1 << 33, both),
        (0, 0),
        (4096, both),
        (0, 0),
        (0, 0),  # no ROM
        (4096, both),  # configuration space
        (0, 0),  # no VGA
    ]


def test_interrupts() -> None:
    function = Function()
    infos = [function.irq_info(index) for index in range(function.num_irqs)]
    eventfd = vfio.IRQ_INFO_EVENTFD
    expected = [(0, 0), (2, eventfd), (3, eventfd), (1, eventfd), (1, eventfd)]
    assert [(info.count, info.flags) for info in infos] == expected


def test_configuration_space_comes_in_one_read() -> None:
    data = Function().region_read(CONFIG, 0, 4096)
    assert len(data) == 4096
    assert data[spec.INTERRUPT_PIN] == 0
    assert data[0x100:0x104] == bytes(4)  # no extended capability


@pytest.mark.parametrize(
    ("register", "expected"),
    [
        (0, [0xFFFFF000]),
        (1, [0]),
        (2, [0x0000000C, 0xFFFFFFFE]),
        (4, [0xFFFFF000]),
        (5, [0]),
    ],
)
def test_bars_tell_their_size_and_take_an_address(register: int, expected: list[int]) -> None:
    function = Function()
    offset = spec.BASE_ADDRESS_0 + 4 * register
    for number, mask in enumerate(expected):
        function.config_write(offset + 4 * number, 0xFFFFFFFF, 4)
        assert function.config.u32(offset + 4 * number) == mask
        function.config_write(offset + 4 * number, 0xABCDEF00, 4)
        fixed = 0 if number else mask & 0xF  # flags are in the lower half only
        assert function.config.u32(offset + 4 * number) == 0xABCDEF00 & mask | fixed


@pytest.mark.parametrize(
    ("index", "size", "bits64"),
    [
        (0, 4096, False),
        (3, 4096, False),  # the upper half of BAR 2
        (5, 4096, True),
        (6, 4096, False),
        (1, 4000, False),
        (1, 8, False),
        (1, 1 << 32, False),
    ],
)
def test_bars_that_cannot_be_are_refused(index: int, size: int, bits64: bool) -> None:
    with pytest.raises(UsageError, match=f"BAR {index}"):
        Function().add_bar(index, size, Ram(0), bits64=bits64)


def test_bar_accesses_reach_their_handler() -> None:
    function = Function()
    function.region_write(0, 0x10, b"abc")
    assert function.region_read(0, 0x0F, 5) == b"\0abc\0"
    assert function.region_read(1, 0, 4) == b"\xff" * 4
    function.region_write(1, 0, b"ignored")
    function.region_write(8, 0, b"ignored")


def test_bus_mastering_follows_the_command_register() -> None:
    function = Function()
    assert not function.masters()
    function.config_write(spec.COMMAND, 0x0006, 2)
    assert function.masters()
    function.config_write(spec.COMMAND, 0x06, 1)
    function.config_write(spec.COMMAND, 0xFFFF0002, 4)
    assert not function.masters()
    assert function.events == [True, False]


def test_a_function_that_sleeps_neither_masters_nor_answers() -> None:
    function = Function()
    ctrl = function.capability(spec.CAP_ID_PM) + spec.PM_CTRL
    function.config_write(spec.COMMAND, spec.COMMAND_MASTER, 2)
    function.region_write(0, 0, b"state")
    function.config_write(ctrl, spec.PM_STATE_D3HOT, 2)
    assert not function.masters()
    assert function.region_read(0, 0, 5) == b"\xff" * 5
    function.region_write(0, 0, b"ghost")
    for unsupported in (1, 2):
        function.config_write(ctrl, unsupported, 2)
        assert function.config.u16(ctrl) & 3 == spec.PM_STATE_D3HOT
    function.config_write(ctrl, spec.PM_STATE_D0, 2)
    assert function.masters()
    assert function.region_read(0, 0, 5) == b"state"  # No_Soft_Reset
    assert function.events == [True, False, True]


def test_sleep_ends_with_a_reset() -> None:
    function = Function()
    ctrl = function.capability(spec.CAP_ID_PM) + spec.PM_CTRL
    function.config_write(ctrl, spec.PM_STATE_D3HOT, 2)
    function.reset()
    assert function.region_read(0, 0, 4) == bytes(4)
    function.config_write(ctrl, 1, 2)
    assert function.config.u16(ctrl) & 3 == spec.PM_STATE_D0


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (1, 1), (0, 4)])
def test_function_level_reset_at_any_width(offset: int, size: int) -> None:
    function = Function()
    devctl = function.capability(spec.CAP_ID_EXPRESS) + spec.EXP_DEVCTL
    function.config_write(spec.COMMAND, 0x0006, 2)
    function.config_write(spec.BASE_ADDRESS_0, 0xFEB00000, 4)
    function.config_write(devctl + offset, spec.EXP_DEVCTL_FLR >> 8 * offset, size)
    assert function.events == [True, False, ResetKind.FLR]
    assert function.config.u16(spec.COMMAND) == 0
    assert function.config.u32(spec.BASE_ADDRESS_0) == 0
    assert function.config.u16(devctl) & spec.EXP_DEVCTL_FLR == 0


def test_a_write_beside_the_flr_bit_resets_nothing() -> None:
    function = Function()
    devctl = function.capability(spec.CAP_ID_EXPRESS) + spec.EXP_DEVCTL
    function.config_write(devctl, 0x7FFF, 2)
    assert function.events == []
    assert function.config.u16(devctl) == 0x7FFF


def test_system_reset_and_disconnect() -> None:
    function = Function()
    function.config_write(spec.COMMAND, 0x0006, 2)
    function.reset()
    assert function.events == [True, False, ResetKind.SYSTEM]
    function.reset()  # QEMU sends two
    function.disconnect()
    assert function.events[3:] == [ResetKind.SYSTEM, ResetKind.DISCONNECT]


def test_nobody_is_interrupted_after_a_disconnect() -> None:
    function = Function()
    function.disconnect()
    enable_messages(function, spec.CAP_ID_MSIX, spec.MSIX_CTRL_ENABLE)
    function.config_write(spec.COMMAND, spec.COMMAND_MASTER, 2)
    function.raise_msix(0)
    assert function.lines.raised == []


def enable_messages(function: Function, cap_id: int, ctrl: int) -> None:
    function.config_write(function.capability(cap_id) + 2, ctrl, 2)


def test_interrupts_need_the_capability_the_vector_and_the_bus() -> None:
    function = Function()
    enable_messages(function, spec.CAP_ID_MSIX, spec.MSIX_CTRL_ENABLE)
    function.raise_msix(0)
    assert function.lines.raised == []
    function.config_write(spec.COMMAND, spec.COMMAND_MASTER, 2)
    function.raise_msix(2)
    function.raise_msix(3)
    function.raise_msi(0)
    assert function.lines.raised == [(vfio.PCI_MSIX_IRQ_INDEX, 2)]
    assert function.msix_enabled
    enable_messages(function, spec.CAP_ID_MSIX, 0)
    enable_messages(function, spec.CAP_ID_MSI, spec.MSI_CTRL_ENABLE | 1 << 4)
    function.raise_msix(0)
    function.raise_msi(1)
    assert function.lines.raised[1:] == [(vfio.PCI_MSI_IRQ_INDEX, 1)]


def test_interrupts_survive_a_function_level_reset() -> None:
    # QEMU neither disables nor sets eventfds around an FLR.
    function = Function()
    devctl = function.capability(spec.CAP_ID_EXPRESS) + spec.EXP_DEVCTL
    function.config_write(devctl, spec.EXP_DEVCTL_FLR, 2)
    function.config_write(spec.COMMAND, spec.COMMAND_MASTER, 2)
    function.raise_msix(1)
    assert function.lines.raised == []
    enable_messages(function, spec.CAP_ID_MSIX, spec.MSIX_CTRL_ENABLE)
    function.raise_msix(1)
    assert function.lines.raised == [(vfio.PCI_MSIX_IRQ_INDEX, 1)]


def test_a_function_without_messages_raises_none() -> None:
    function = PciFunction("00:05.0", GuestMemory(), Identity(1, 2, 3))
    function.connect(Lines())
    function.config.write(spec.COMMAND, b"\x04\x00")
    function.raise_msi(0)
    function.raise_msix(0)
    assert not function.msix_enabled
    assert [function.irq_info(i).count for i in range(5)] == [0, 0, 0, 1, 1]
    function.reset()
