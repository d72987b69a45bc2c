"""A virtio device that echoes, and a transport that records, for the tests beside it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from viommu.virtio.device import ResetKind, Transport, VirtioDevice
from viommu.virtio.runner import QueueRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.virtio.ring import Chain, SplitQueue

__all__ = ["EchoDevice", "RecordingTransport"]


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
