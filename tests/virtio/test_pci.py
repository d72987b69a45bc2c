from __future__ import annotations

import itertools
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.harness import EchoDevice
from viommu.errors import UsageError
from viommu.memory import GuestMemory
from viommu.pci import ResetKind
from viommu.spec import pci, vfio, virtio_config
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout, Used
from viommu.virtio.pci import VirtioPciFunction
from viommu.virtio.status import State

ACK, DRIVER = virtio_config.STATUS_ACKNOWLEDGE, virtio_config.STATUS_DRIVER
FEATURES_OK, DRIVER_OK = virtio_config.STATUS_FEATURES_OK, virtio_config.STATUS_DRIVER_OK
NEEDS_RESET = virtio_config.STATUS_DEVICE_NEEDS_RESET
LAYOUT: Any = spec.CommonCfg
CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
DATA: Final = 0x8000

RING_FEATURES: Final = 1 << Feature.RING_INDIRECT_DESC | 1 << Feature.RING_EVENT_IDX
VERSION_1: Final = 1 << Feature.VERSION_1


class Lines:
    def __init__(self) -> None:
        self.raised: list[int] = []

    def trigger(self, index: int, vector: int) -> bool:
        assert index == vfio.PCI_MSIX_IRQ_INDEX
        self.raised.append(vector)
        return True


class Guest:
    """A driver that finds everything through the capabilities, as Linux does."""

    def __init__(self, device: EchoDevice | None = None) -> None:
        self.device = device or EchoDevice()
        self.ram = PieceMemory(1 << 16)
        self.function = VirtioPciFunction("00:03.0", GuestMemory(), self.device, self.ram)
        self.lines = Lines()
        self.function.connect(self.lines)
        self.queues: list[DriverQueue] = []
        self.caps: dict[int, tuple[int, spec.Cap]] = {}
        offset = self.config(pci.CAPABILITY_LIST, 1)
        while offset:
            raw = self.function.region_read(CONFIG, offset, 16)
            if raw[0] == pci.CAP_ID_VENDOR:
                cap = spec.Cap.from_buffer_copy(raw)
                self.caps[cap.cfg_type] = (offset, cap)
            elif raw[0] == pci.CAP_ID_MSIX:
                self.msix = offset
            elif raw[0] == pci.CAP_ID_EXPRESS:
                self.express = offset
            offset = raw[1]

    def config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.region_read(CONFIG, offset, size), "little")

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.function.region_write(CONFIG, offset, value.to_bytes(size, "little"))

    def read(self, kind: spec.CfgType, offset: int, size: int) -> bytes:
        cap = self.caps[kind][1]
        return self.function.region_read(cap.bar, cap.offset + offset, size)

    def write(self, kind: spec.CfgType, offset: int, data: bytes) -> None:
        cap = self.caps[kind][1]
        self.function.region_write(cap.bar, cap.offset + offset, data)

    def __getitem__(self, name: str) -> int:
        field = getattr(LAYOUT, name)
        return int.from_bytes(self.read(spec.CfgType.COMMON, field.offset, field.size), "little")

    def __setitem__(self, name: str, value: int) -> None:
        field = getattr(LAYOUT, name)
        self.write(spec.CfgType.COMMON, field.offset, value.to_bytes(field.size, "little"))

    def offered(self) -> int:
        words = []
        for select in (0, 1):
            self["device_feature_select"] = select
            words.append(self["device_feature"])
        return words[0] | words[1] << 32

    def negotiate(self, features: int) -> None:
        self["device_status"] = ACK
        self["device_status"] = ACK | DRIVER
        for select in (0, 1):
            self["driver_feature_select"] = select
            self["driver_feature"] = features >> 32 * select & 0xFFFFFFFF
        self["device_status"] = ACK | DRIVER | FEATURES_OK
        assert self["device_status"] & FEATURES_OK

    def master(self, *, enabled: bool = True) -> None:
        self.set_config(pci.COMMAND, 2, 0x0406 if enabled else 0x0402)

    def enable_msix(self) -> None:
        self.set_config(self.msix + 2, 2, pci.MSIX_CTRL_ENABLE)

    def start(self, features: int | None = None, *, queues: int = 2) -> None:
        features = self.offered() if features is None else features
        self.master()
        self.enable_msix()
        self.negotiate(features)
        self["config_msix_vector"] = 0
        at = 0x1000
        self.queues = []
        for index in range(queues):
            self["queue_select"] = index
            layout = RingLayout.at(at, self["queue_size"])
            at = layout.end
            event_idx = bool(features >> Feature.RING_EVENT_IDX & 1)
            driver = DriverQueue(self.ram, self["queue_size"], layout, event_idx=event_idx)
            self.queues.append(driver)
            self["queue_msix_vector"] = index + 1
            self["queue_desc_lo"] = layout.desc
            self["queue_driver_lo"] = layout.avail
            self["queue_device_lo"] = layout.used
            self["queue_enable"] = 1
        self["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK

    def kick(self, index: int) -> None:
        self["queue_select"] = index
        multiplier = self.config(self.caps[spec.CfgType.NOTIFY][0] + 16, 4)
        offset = self["queue_notify_off"] * multiplier
        self.write(spec.CfgType.NOTIFY, offset, index.to_bytes(2, "little"))

    def send(self, index: int, data: bytes) -> int:
        self.ram.write(DATA, data)
        head = self.queues[index].add([(DATA, len(data))], [(DATA + 0x100, 64)])
        if self.queues[index].publish():
            self.kick(index)
        return head


def test_the_capabilities_lead_to_every_structure() -> None:
    guest = Guest()
    assert set(guest.caps) == {
        spec.CfgType.COMMON,
        spec.CfgType.NOTIFY,
        spec.CfgType.ISR,
        spec.CfgType.DEVICE,
        spec.CfgType.PCI,
    }
    ends = []
    for kind, (_, cap) in guest.caps.items():
        if kind != spec.CfgType.PCI:
            assert cap.offset % 4 == 0
            assert cap.length > 0
            assert cap.offset + cap.length <= guest.function.bar_size(cap.bar)
            ends.append((cap.offset, cap.offset + cap.length))
        assert cap.cap_len == (20 if kind in {spec.CfgType.NOTIFY, spec.CfgType.PCI} else 16)
    ends.sort()
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
    assert guest.caps[spec.CfgType.DEVICE][1].length == EchoDevice.config_size


def test_the_identity_is_a_modern_device() -> None:
    guest = Guest()
    assert guest.config(pci.VENDOR_ID, 2) == 0x1AF4
    assert guest.config(pci.DEVICE_ID, 2) == 0x1040 + 42
    assert guest.config(pci.REVISION_ID, 1) >= 1
    assert guest.config(pci.CLASS_PROG, 2) | guest.config(pci.CLASS_PROG + 2, 1) << 16 == 0xFF0000
    assert guest.config(pci.INTERRUPT_PIN, 1) == 0


def test_a_vector_for_the_configuration_and_one_a_queue() -> None:
    assert Guest().function.irq_info(vfio.PCI_MSIX_IRQ_INDEX).count == 3


@pytest.mark.parametrize("behind_iommu", [False, True])
def test_what_is_offered(behind_iommu: bool) -> None:
    device = EchoDevice()
    device.behind_iommu = behind_iommu
    platform = 1 << Feature.ACCESS_PLATFORM if behind_iommu else 0
    assert Guest(device).offered() == 0b101 | RING_FEATURES | VERSION_1 | platform


def test_a_device_may_not_claim_the_transports_features() -> None:
    device = EchoDevice()
    device.features = 1 << Feature.RING_PACKED
    with pytest.raises(UsageError, match="0x400000000"):
        Guest(device)


@pytest.mark.parametrize(("queues", "size"), [(1025, 6), (2, 4097)])
def test_a_device_that_does_not_fit_is_refused(queues: int, size: int) -> None:
    device = EchoDevice()
    device.queue_sizes = (8,) * queues
    device.config_size = size
    with pytest.raises(UsageError, match="a page each"):
        Guest(device)


def test_a_device_without_configuration_has_no_capability_for_it() -> None:
    device = EchoDevice()
    device.config_size = 0
    assert spec.CfgType.DEVICE not in Guest(device).caps


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | RING_FEATURES])
def test_requests_are_served_and_interrupt_their_queue(features: int) -> None:
    guest = Guest()
    guest.start(features)
    head = guest.send(1, b"hello")
    assert guest.queues[1].collect() == [Used(head, 5)]
    assert guest.ram.read(DATA + 0x100, 5) == b"HELLO"
    assert guest.lines.raised == [2]
    assert guest.device.log[-2:] == [("start", features, [8, 16]), ("notify", 1)]


def test_a_queue_that_was_not_enabled_is_not_there() -> None:
    guest = Guest()
    guest.start(queues=1)
    assert guest.device.log[-1] == ("start", guest.function.features, [8, None])
    guest.kick(1)
    assert ("notify", 1) not in guest.device.log


def test_a_queue_without_a_vector_interrupts_nobody() -> None:
    guest = Guest()
    guest.start()
    guest["queue_select"] = 0
    guest["queue_msix_vector"] = spec.MSI_NO_VECTOR
    guest.send(0, b"x")
    assert guest.queues[0].has_used()
    assert guest.lines.raised == []
    assert guest.read(spec.CfgType.ISR, 0, 1) == b"\0"


def test_without_msix_the_isr_tells_and_reading_clears_it() -> None:
    guest = Guest()
    guest.start()
    guest.set_config(guest.msix + 2, 2, 0)
    guest.send(0, b"x")
    assert guest.lines.raised == []
    assert guest.read(spec.CfgType.ISR, 0, 1) == bytes([spec.ISR_QUEUE])
    guest.function.config_changed()
    assert guest.read(spec.CfgType.ISR, 0, 4) == bytes([spec.ISR_CONFIG, 0, 0, 0])
    assert guest.read(spec.CfgType.ISR, 0, 1) == b"\0"


def test_a_configuration_change_is_told_once_the_driver_runs() -> None:
    guest = Guest()
    guest.function.config_changed()
    guest.start()
    assert guest.lines.raised == []
    before = guest["config_generation"]
    guest.function.config_changed()
    assert guest["config_generation"] == before + 1
    assert guest.lines.raised == [0]
    guest["config_msix_vector"] = spec.MSI_NO_VECTOR
    guest.function.config_changed()
    assert guest.lines.raised == [0]


def test_the_generation_wraps() -> None:
    guest = Guest()
    for _ in range(256):
        guest.function.config_changed()
    assert guest["config_generation"] == 0


@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [(0, 6, b"config"), (4, 4, b"ig\0\0"), (5, 1, b"g"), (6, 4, bytes(4)), (4095, 1, b"\0")],
)
def test_device_configuration_is_read_inside_its_bounds(
    offset: int, count: int, expected: bytes
) -> None:
    assert Guest().read(spec.CfgType.DEVICE, offset, count) == expected


def test_device_configuration_is_written_inside_its_bounds() -> None:
    guest = Guest()
    guest.write(spec.CfgType.DEVICE, 4, b"ABCD")
    guest.write(spec.CfgType.DEVICE, 6, b"XX")
    assert guest.device.config == b"confAB"


def test_nothing_happens_before_the_driver_is_ready() -> None:
    guest = Guest()
    guest.master()
    guest.kick(0)
    guest.negotiate(VERSION_1)
    guest.kick(0)
    assert guest.device.log == [("bus master", True)]


def test_rings_wait_for_the_bus() -> None:
    guest = Guest()
    guest.start()
    guest.master(enabled=False)
    assert not guest.function.active
    guest.device.log.clear()
    guest.send(0, b"waits")
    guest.kick(0)
    assert guest.device.log == []
    assert not guest.queues[0].has_used()
    guest.master()
    assert guest.device.log == [("bus master", True), ("notify", 0), ("notify", 1)]
    assert guest.queues[0].has_used()
    assert guest.lines.raised == [1]


def test_a_driver_reset_leaves_configuration_space_alone() -> None:
    guest = Guest()
    guest.start()
    guest["device_status"] = 0
    assert guest.device.log[-1] is ResetKind.DRIVER
    assert guest["device_status"] == 0
    assert guest["queue_enable"] == 0
    assert guest["queue_msix_vector"] == spec.MSI_NO_VECTOR
    assert guest.config(pci.COMMAND, 2) & pci.COMMAND_MASTER
    assert guest.function.msix_enabled
    guest.kick(0)
    assert guest.device.log[-1] is ResetKind.DRIVER
    guest.start()
    guest.send(0, b"again")
    assert guest.queues[0].has_used()


def test_a_driver_reset_may_take_its_time() -> None:
    guest = Guest()
    guest.device.finish_resets = False
    guest.start()
    guest.send(0, b"park")
    runner = guest.device.runners[0]
    parked = runner.parked
    assert parked is not None
    guest["device_status"] = 0
    assert guest["device_status"] != 0
    guest["device_status"] = ACK
    assert guest["device_status"] & DRIVER_OK
    guest.function.active = True  # even then: the queue is closed
    runner.resume(parked, 4)
    assert not guest.queues[0].has_used()
    guest.function.reset_done()
    assert guest["device_status"] == 0
    guest.function.reset_done()  # too often is harmless
    guest.start()
    assert guest.function.state is State.RUNNING


@pytest.mark.parametrize("kind", [ResetKind.FLR, ResetKind.SYSTEM, ResetKind.DISCONNECT])
def test_the_function_resets_its_device(kind: ResetKind) -> None:
    guest = Guest()
    guest.start()
    if kind is ResetKind.FLR:
        guest.set_config(guest.express + pci.EXP_DEVCTL, 2, pci.EXP_DEVCTL_FLR)
    elif kind is ResetKind.SYSTEM:
        guest.function.reset()
    else:
        guest.function.disconnect()
        guest.function.connect(guest.lines)
    assert guest.device.log[-2:] == [("bus master", False), kind]
    assert guest["device_status"] == 0
    assert guest.config(pci.COMMAND, 2) == 0
    guest.start()
    guest.send(0, b"again")
    assert guest.queues[0].has_used()
    assert guest.lines.raised == [1]


def test_a_function_reset_while_a_driver_reset_is_pending() -> None:
    guest = Guest()
    guest.device.finish_resets = False
    guest.start()
    guest["device_status"] = 0
    guest.function.reset()
    assert guest.device.log[-1] is ResetKind.SYSTEM
    assert guest["device_status"] != 0
    guest.function.reset_done()
    assert guest["device_status"] == 0


def test_a_broken_queue_needs_a_reset_and_says_so() -> None:
    guest = Guest()
    guest.start()
    guest.queues[0].write_avail(77)
    guest.kick(0)
    assert guest["device_status"] & NEEDS_RESET
    assert guest.lines.raised == [0]
    assert guest.read(spec.CfgType.ISR, 0, 1)[0] & spec.ISR_CONFIG
    assert "head 77" in (guest.function.reset_reason or "")
    guest.device.log.clear()
    guest.kick(1)
    assert guest.device.log == []
    guest["device_status"] = 0
    guest.start()
    assert guest.function.reset_reason is None
    guest.send(0, b"well")
    assert guest.queues[0].has_used()


@pytest.mark.parametrize("register", ["queue_desc_lo", "queue_driver_lo", "queue_device_lo"])
def test_a_misaligned_ring_needs_a_reset(register: str) -> None:
    guest = Guest()
    guest.master()
    guest.negotiate(VERSION_1)
    guest[register] = 1
    guest["queue_enable"] = 1
    guest["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK
    assert guest["device_status"] & NEEDS_RESET
    assert "0x1 is not aligned" in (guest.function.reset_reason or "")
    assert guest.device.transport is None
    guest.kick(0)


def test_a_ring_outside_memory_needs_a_reset_when_it_is_used() -> None:
    guest = Guest()
    guest.master()
    guest.negotiate(VERSION_1)
    guest["queue_desc_hi"] = 0xFF
    guest["queue_enable"] = 1
    guest["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK
    assert not guest["device_status"] & NEEDS_RESET
    guest.kick(0)
    assert guest["device_status"] & NEEDS_RESET


def test_a_driver_that_gives_up_is_left_alone() -> None:
    guest = Guest()
    guest.start()
    guest["device_status"] = 0x8F
    assert not guest.function.active


@pytest.mark.parametrize("index", [2, 3, 1000])
def test_kicks_of_queues_that_do_not_exist(index: int) -> None:
    guest = Guest()
    guest.start()
    guest.device.log.clear()
    guest.function.region_write(0, 0x3000 + 4 * index, b"\0\0")
    guest.function.region_write(0, 0x3001, b"\0\0")
    assert guest.device.log == []


class TestWindow:
    """The PCI configuration access capability, virtio 1.2, 4.1.4.9."""

    @staticmethod
    def aim(guest: Guest, kind: spec.CfgType, offset: int, width: int) -> int:
        at = guest.caps[spec.CfgType.PCI][0]
        target = guest.caps[kind][1]
        guest.set_config(at + 4, 1, target.bar)
        guest.set_config(at + 8, 4, target.offset + offset)
        guest.set_config(at + 12, 4, width)
        return at + 16

    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_reads(self, width: int) -> None:
        guest = Guest()
        data = self.aim(guest, spec.CfgType.DEVICE, 0, width)
        assert guest.config(data, width) == int.from_bytes(b"config"[:width], "little")

    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_writes(self, width: int) -> None:
        guest = Guest()
        data = self.aim(guest, spec.CfgType.DEVICE, 0, width)
        guest.set_config(data, width, int.from_bytes(b"WXYZ"[:width], "little"))
        assert guest.device.config == b"WXYZ"[:width] + b"config"[width:]

    def test_a_device_can_be_driven_without_a_bar(self) -> None:
        guest = Guest()
        guest.start()
        head = guest.queues[1].add([(DATA, 1)], [(DATA + 0x100, 1)])
        guest.queues[1].publish()
        data = self.aim(guest, spec.CfgType.NOTIFY, 4, 2)
        guest.set_config(data, 2, 1)
        assert guest.queues[1].collect() == [Used(head, 1)]

    def test_a_dump_of_configuration_space_reads_no_register(self) -> None:
        guest = Guest()
        guest.function.config_changed()
        data = self.aim(guest, spec.CfgType.ISR, 0, 1)
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
    def test_a_window_on_nothing(self, bar: int, offset: int, width: int) -> None:
        guest = Guest()
        at = guest.caps[spec.CfgType.PCI][0]
        guest.set_config(at + 4, 1, bar)
        guest.set_config(at + 8, 4, offset)
        guest.set_config(at + 12, 4, width)
        guest.set_config(at + 16, 4, 0x41414141)
        assert guest.config(at + 16, 4) == 0x41414141
        assert guest.device.config == b"config"


@given(
    accesses=st.lists(
        st.tuples(
            st.sampled_from([0, 1, CONFIG]),
            st.integers(0, 0x3FFF),
            st.sampled_from([1, 2, 4, 8, 3]),
            st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=60,
    )
)
def test_no_access_of_any_width_anywhere_raises(
    accesses: list[tuple[int, int, int, int | None]],
) -> None:
    guest = Guest()
    guest.start()
    for index, where, width, value in accesses:
        offset = where % (guest.function.region_info(index).size - width + 1)
        if value is None:
            assert len(guest.function.region_read(index, offset, width)) == width
        else:
            guest.function.region_write(
                index, offset, (value % (1 << 8 * width)).to_bytes(width, "little")
            )
