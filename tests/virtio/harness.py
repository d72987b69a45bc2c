"""A device that echoes, a transport that records, and a driver, for the tests beside it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from viommu.memory import GuestMemory
from viommu.spec import pci, vfio, virtio_config
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.testing.ring import DriverQueue, PieceMemory, RingLayout
from viommu.virtio.device import ResetKind, Transport, VirtioDevice
from viommu.virtio.pci import VirtioPciFunction
from viommu.virtio.runner import QueueRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.virtio.ring import Chain, SplitQueue

__all__ = ["CONFIG", "DATA", "EchoDevice", "Guest", "RecordingTransport"]

ACK, DRIVER = virtio_config.STATUS_ACKNOWLEDGE, virtio_config.STATUS_DRIVER
FEATURES_OK, DRIVER_OK = virtio_config.STATUS_FEATURES_OK, virtio_config.STATUS_DRIVER_OK
LAYOUT: Any = spec.CommonCfg
CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
DATA: Final = 0x8000  # where requests are


class RecordingTransport:
    """A transport without a bus."""

    def __init__(self) -> None:
        self.active = True
        self.interrupts: list[int] = []
        self.reasons: list[str] = []

    def interrupt(self, queue: int) -> None:
        self.interrupts.append(queue)

    def config_changed(self) -> None:
        raise AssertionError("no configuration here")

    def needs_reset(self, reason: str) -> None:
        self.active = False
        self.reasons.append(reason)

    def reset_done(self) -> None:
        raise AssertionError("no reset here")


class EchoDevice(VirtioDevice):
    """Copies what is readable to what is writable, in upper case; ``b"park"`` is parked."""

    device_type = 42
    class_code = 0xFF0000
    queue_sizes: tuple[int, ...] = (8, 16)
    features = 0b101
    config_size = 6

    def __init__(self) -> None:
        self.config = bytearray(b"config")
        self.log: list[object] = []
        self.finish_resets = True
        self.transport: Transport | None = None
        self.runners: dict[int, QueueRunner] = {}

    def read_config(self, offset: int, size: int) -> bytes:
        assert offset >= 0
        assert 0 < size <= self.config_size - offset
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes) -> None:
        assert offset >= 0
        assert 0 < len(data) <= self.config_size - offset
        self.config[offset : offset + len(data)] = data

    def start(
        self, transport: Transport, features: int, queues: Sequence[SplitQueue | None]
    ) -> None:
        self.transport = transport
        self.log.append(("start", features, [queue and queue.size for queue in queues]))
        self.runners = {
            queue.index: QueueRunner(queue, transport, partial(self.echo, queue))
            for queue in queues
            if queue
        }

    def echo(self, queue: SplitQueue, chain: Chain) -> int | None:
        data = queue.read(chain)[: chain.writable_size].upper()
        if data == b"PARK":
            return None
        queue.write(chain, data)
        return len(data)

    def notify(self, index: int) -> None:
        self.log.append(("notify", index))
        self.runners[index].serve()

    def reset(self, kind: ResetKind) -> bool:
        self.log.append(kind)
        self.runners = {}
        return self.finish_resets

    def on_bus_master(self, *, enabled: bool) -> None:
        self.log.append(("bus master", enabled))


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
