from __future__ import annotations

import itertools
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.harness import CONFIG, DATA, EchoDevice, Guest
from viommu.errors import UsageError
from viommu.pci import ResetKind
from viommu.spec import pci, vfio, virtio_config
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.testing.ring import Used
from viommu.virtio.status import State

ACK, DRIVER = virtio_config.STATUS_ACKNOWLEDGE, virtio_config.STATUS_DRIVER
FEATURES_OK, DRIVER_OK = virtio_config.STATUS_FEATURES_OK, virtio_config.STATUS_DRIVER_OK
NEEDS_RESET = virtio_config.STATUS_DEVICE_NEEDS_RESET

RING_FEATURES: Final = 1 << Feature.RING_INDIRECT_DESC | 1 << Feature.RING_EVENT_IDX
VERSION_1: Final = 1 << Feature.VERSION_1


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


def test_a_configuration_change_is_not_told_before_the_driver_runs() -> None:
    guest = Guest()
    guest.master()
    guest.enable_msix()
    guest.negotiate(VERSION_1)
    guest["config_msix_vector"] = 0
    guest.function.config_changed()
    assert guest.lines.raised == []


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


def test_a_driver_that_breaks_its_device_again_and_again_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guest = Guest()

    def break_often() -> int:
        caplog.clear()
        for _ in range(30):
            guest.start()
            guest.queues[0].write_avail(77)
            guest.kick(0)
            assert guest["device_status"] & NEEDS_RESET
            guest["device_status"] = 0
        return len(caplog.records)

    assert break_often() == 16
    assert break_often() == 0
    guest.function.disconnect()
    assert break_often() == 16


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
