from __future__ import annotations

import struct
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.spec import virtio_config
from viommu.spec import virtio_pci as spec
from viommu.spec._struct import sizeof
from viommu.spec.virtio_config import Feature
from viommu.virtio.common_config import COMMON_CONFIG_SIZE, CommonConfig
from viommu.virtio.status import Event, State

ACK, DRIVER = virtio_config.STATUS_ACKNOWLEDGE, virtio_config.STATUS_DRIVER
FEATURES_OK, DRIVER_OK = virtio_config.STATUS_FEATURES_OK, virtio_config.STATUS_DRIVER_OK
FAILED = virtio_config.STATUS_FAILED

VERSION_1: Final = 1 << Feature.VERSION_1
PLATFORM: Final = 1 << Feature.ACCESS_PLATFORM
LAYOUT: Any = spec.CommonCfg


class Registers:
    """A register bank as a driver uses it."""

    def __init__(self, offered: int = VERSION_1 | 0b11) -> None:
        self.calls: list[str] = []
        self.config = CommonConfig("test", offered, (256, 64), 3, self)

    def driver_ok(self) -> None:
        self.calls.append("driver ok")

    def driver_failed(self) -> None:
        self.calls.append("failed")

    def reset_requested(self) -> None:
        self.calls.append("reset")

    def __getitem__(self, name: str) -> int:
        field = getattr(LAYOUT, name)
        return int.from_bytes(self.config.read(field.offset, field.size), "little")

    def __setitem__(self, name: str, value: int) -> None:
        field = getattr(LAYOUT, name)
        self.config.write(field.offset, value.to_bytes(field.size, "little"))

    def accept(self, features: int) -> None:
        for select in range(4):
            self["driver_feature_select"] = select
            self["driver_feature"] = features >> 32 * select & 0xFFFFFFFF

    def negotiate(self, features: int) -> bool:
        self["device_status"] = ACK
        self["device_status"] = ACK | DRIVER
        self.accept(features)
        self["device_status"] = ACK | DRIVER | FEATURES_OK
        return bool(self["device_status"] & FEATURES_OK)


def test_what_a_driver_finds() -> None:
    registers = Registers()
    assert COMMON_CONFIG_SIZE == sizeof(spec.CommonCfg) == len(registers.config.read(0, 4096))
    assert registers["num_queues"] == 2
    assert registers["device_status"] == 0
    assert registers["config_msix_vector"] == spec.MSI_NO_VECTOR
    sizes = []
    for index in (0, 1):
        registers["queue_select"] = index
        sizes.append(registers["queue_size"])
    assert sizes == [256, 64]


def test_features_are_shown_32_at_a_time() -> None:
    registers = Registers(VERSION_1 | 0b11 | 1 << 97)
    words = []
    for select in (0, 1, 2, 3, 4, 0xFFFFFFFF):
        registers["device_feature_select"] = select
        words.append(registers["device_feature"])
    assert words == [0b11, 1, 0, 2, 0, 0]


def test_accepted_features_read_back() -> None:
    registers = Registers()
    registers.accept(VERSION_1 | 1)
    registers["driver_feature_select"] = 0
    assert registers["driver_feature"] == 1
    registers["driver_feature_select"] = 1
    assert registers["driver_feature"] == 1
    registers["driver_feature_select"] = 0xFFFFFFFF
    registers["driver_feature"] = 0xFFFFFFFF
    assert registers["driver_feature"] == 0
    assert registers.config.accepted == VERSION_1 | 1


@pytest.mark.parametrize(
    ("offered", "accepted", "why"),
    [
        (VERSION_1 | 0b11, VERSION_1 | 0b11, None),
        (VERSION_1 | 0b11, VERSION_1, None),
        (VERSION_1 | 0b11, 0b11, "VERSION_1"),
        (VERSION_1 | 0b11, VERSION_1 | 0b100, "0x4 were not offered"),
        (VERSION_1, VERSION_1 | 1 << 100, "not offered"),
        (VERSION_1 | PLATFORM, VERSION_1 | PLATFORM, None),
        (VERSION_1 | PLATFORM, VERSION_1, "ACCESS_PLATFORM"),
    ],
)
def test_features_are_agreed_on_or_refused(offered: int, accepted: int, why: str | None) -> None:
    registers = Registers(offered)
    assert registers.negotiate(accepted) == (why is None)
    refusal = registers.config.refusal()
    assert (refusal is None) == (why is None)
    assert (why or "") in (refusal or "")
    registers["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK
    assert registers.calls == (["driver ok"] if why is None else [])


def test_features_refused_can_be_negotiated_again() -> None:
    registers = Registers()
    assert not registers.negotiate(VERSION_1 | 0b1000)
    assert registers.negotiate(VERSION_1)


def test_features_are_fixed_once_agreed_on() -> None:
    registers = Registers()
    registers.negotiate(VERSION_1)
    registers.accept(VERSION_1 | 1)
    assert registers.config.accepted == VERSION_1


@pytest.mark.parametrize(
    ("written", "read"), [(0, 0), (2, 2), (3, spec.MSI_NO_VECTOR), (0xFFFF, spec.MSI_NO_VECTOR)]
)
@pytest.mark.parametrize("register", ["config_msix_vector", "queue_msix_vector"])
def test_a_vector_that_is_not_there_reads_back_as_none(
    register: str, written: int, read: int
) -> None:
    # virtio 1.2, 4.1.5.1.2: that is how a driver learns of the failure.
    registers = Registers()
    registers[register] = written
    assert registers[register] == read


@pytest.mark.parametrize(
    ("written", "read"),
    [(256, 256), (128, 128), (1, 1), (0, 256), (3, 256), (512, 256), (0xFFFF, 256)],
)
def test_queue_sizes_are_powers_of_two_up_to_the_largest(written: int, read: int) -> None:
    registers = Registers()
    registers["queue_size"] = written
    assert registers["queue_size"] == read


def test_queues_are_set_up_one_by_one() -> None:
    registers = Registers()
    for number in (0, 1):
        registers["queue_select"] = number
        assert registers["queue_notify_off"] == number
        registers["queue_desc_lo"] = 0x1000 + number
        registers["queue_desc_hi"] = 0xA
        registers["queue_driver_lo"] = 0x2000
        registers["queue_driver_hi"] = 0xB
        registers["queue_device_lo"] = 0x3000
        registers["queue_device_hi"] = 0xC
        registers["queue_msix_vector"] = number + 1
    queues = registers.config.queues
    assert [queue.desc for queue in queues] == [0xA_0000_1000, 0xA_0000_1001]
    assert [queue.driver for queue in queues] == [0xB_0000_2000] * 2
    assert [queue.device for queue in queues] == [0xC_0000_3000] * 2
    assert [queue.vector for queue in queues] == [1, 2]
    registers["queue_select"] = 0
    assert (registers["queue_desc_lo"], registers["queue_desc_hi"]) == (0x1000, 0xA)


def test_an_enabled_queue_is_fixed() -> None:
    registers = Registers()
    registers["queue_desc_lo"] = 0x1000
    registers["queue_enable"] = 1
    registers["queue_desc_lo"] = 0x2000
    registers["queue_size"] = 16
    registers["queue_enable"] = 0
    assert registers["queue_desc_lo"] == 0x1000
    assert registers["queue_size"] == 256
    assert registers["queue_enable"] == 1


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_only_one_enables(value: int) -> None:
    registers = Registers()
    registers["queue_enable"] = value
    assert registers["queue_enable"] == 0


def test_queues_are_not_enabled_once_the_driver_runs() -> None:
    registers = Registers()
    registers.negotiate(VERSION_1)
    registers["queue_enable"] = 1
    registers["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK
    registers["queue_select"] = 1
    registers["queue_enable"] = 1
    assert registers["queue_enable"] == 0


def test_a_queue_beyond_the_last_is_not_there() -> None:
    registers = Registers()
    registers["queue_select"] = 2
    for register, value in (
        ("queue_size", 8),
        ("queue_msix_vector", 1),
        ("queue_desc_lo", 1),
        ("queue_enable", 1),
    ):
        registers[register] = value
    assert registers["queue_size"] == 0
    assert registers["queue_enable"] == 0
    assert registers["queue_desc_lo"] == 0
    assert registers["queue_notify_off"] == 0
    assert registers["queue_msix_vector"] == spec.MSI_NO_VECTOR


@pytest.mark.parametrize(
    "register",
    [
        "device_feature",
        "num_queues",
        "config_generation",
        "queue_notify_off",
        "queue_notify_data",
        "queue_reset",
    ],
)
def test_read_only_registers(register: str) -> None:
    registers = Registers()
    before = registers[register]
    registers[register] = before + 1
    assert registers[register] == before


def test_a_reset_waits_for_the_device() -> None:
    registers = Registers()
    registers.negotiate(VERSION_1)
    registers["device_status"] = 0
    assert registers.calls == ["reset"]
    assert registers["device_status"] == ACK | DRIVER | FEATURES_OK
    registers["device_status"] = 0
    registers["device_status"] = ACK
    assert registers.calls == ["reset"]
    registers.config.reset()
    assert registers.config.finish_reset()
    assert registers["device_status"] == 0
    assert registers.config.accepted == 0
    assert not registers.config.finish_reset()


def test_a_driver_may_give_up() -> None:
    registers = Registers()
    registers["device_status"] = ACK
    registers["device_status"] = ACK | FAILED
    assert registers.calls == ["failed"]
    assert registers.config.status.state is State.FAILED


def test_a_broken_device_can_only_be_reset() -> None:
    registers = Registers()
    registers.negotiate(VERSION_1)
    registers["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK
    registers.config.status.feed(Event.BREAK)
    registers["device_status"] = ACK | DRIVER | FEATURES_OK | DRIVER_OK
    assert registers["device_status"] & virtio_config.STATUS_DEVICE_NEEDS_RESET


def test_one_write_may_cover_several_registers() -> None:
    registers = Registers()
    registers.config.write(LAYOUT.queue_desc_lo.offset, struct.pack("<Q", 0x1_0000_1000))
    assert registers.config.queues[0].desc == 0x1_0000_1000
    registers.config.write(
        LAYOUT.queue_select.offset, struct.pack("<HHHH", 1, 32, 2, 1) + bytes(2) + b"\x40\0\0\0"
    )
    queue = registers.config.queues[1]
    assert (queue.size, queue.vector, queue.enabled, queue.desc) == (32, 2, True, 0x40)


def test_a_write_of_part_of_a_register_is_ignored() -> None:
    registers = Registers()
    for offset in range(3):
        registers.config.write(LAYOUT.queue_desc_lo.offset + offset, b"\xff")
    registers.config.write(LAYOUT.queue_desc_lo.offset + 2, b"\xff" * 4)
    assert registers.config.queues[0].desc == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 70), st.binary(min_size=1, max_size=8), st.booleans(), st.booleans()
        ),
        max_size=60,
    )
)
def test_no_access_breaks_the_registers(accesses: list[tuple[int, bytes, bool, bool]]) -> None:
    registers = Registers(VERSION_1 | PLATFORM | 0b11)
    for offset, data, read, finish in accesses:
        if read:
            got = registers.config.read(offset, len(data))
            assert len(got) == max(0, min(len(data), COMMON_CONFIG_SIZE - offset))
        else:
            registers.config.write(offset, data)
        if finish:
            registers.config.finish_reset()
        for queue in registers.config.queues:
            assert 0 < queue.size <= queue.max_size
            assert not queue.size & (queue.size - 1)
            assert queue.vector < 3 or queue.vector == spec.MSI_NO_VECTOR
        if registers.config.status.state is State.RUNNING:
            assert registers.config.refusal() is None
