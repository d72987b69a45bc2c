"""What a virtio device is to its transport, and a transport to its device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from viommu.pci import ResetKind
from viommu.virtio.ring import DEFAULT_MAX_CHAIN_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.virtio.ring import SplitQueue

__all__ = ["ResetKind", "Transport", "VirtioDevice"]


class Transport(Protocol):
    """How a device talks back; see virtio 1.2, 2.3 "Notifications"."""

    @property
    def active(self) -> bool:
        """Whether the device may touch its queues now.

        It may when the driver is running (DRIVER_OK), the device is not broken,
        and it may master the bus. When that comes back, every queue is notified.
        """

    def interrupt(self, queue: int) -> None:
        """Tell the driver that buffers of ``queue`` were used."""

    def config_changed(self) -> None:
        """Tell the driver that the device configuration has changed."""

    def needs_reset(self, reason: str) -> None:
        """Give up until the driver resets the device; ``reason`` is for humans."""

    def reset_done(self) -> None:
        """Say that a reset that :meth:`VirtioDevice.reset` left open has finished."""


class VirtioDevice(ABC):
    """One device of any type.

    A transport calls from one thread. It serves a device from :meth:`start` to
    :meth:`reset`, over and over; a reset may also come without a start.

    Attributes:
        device_type: The virtio device id (5 "Device Types").
        class_code: PCI base class, subclass and interface.
        queue_sizes: The largest size of each queue, powers of two.
        features: The device type's own feature bits, as a mask.
        behind_iommu: Whether its DMA goes through an IOMMU: ACCESS_PLATFORM is
            offered, and a driver that refuses it is refused.
        config_size: Bytes of device configuration, at most 4096.
        max_chain_bytes: A driver that puts more into one chain has broken the
            device.
    """

    device_type: int
    class_code: int
    queue_sizes: tuple[int, ...]
    features: int
    behind_iommu: bool = False
    config_size: int
    max_chain_bytes: int = DEFAULT_MAX_CHAIN_BYTES

    def plug(self, transport: Transport) -> None:
        """Get to know the transport, once, before anything else is called."""
        del transport

    @abstractmethod
    def read_config(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of device configuration, which lie inside ``config_size``."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """Store ``data``, which lies inside ``config_size``; what is read-only stays."""

    @abstractmethod
    def start(
        self, transport: Transport, features: int, queues: Sequence[SplitQueue | None]
    ) -> None:
        """Begin to serve a driver that has set DRIVER_OK.

        ``features`` are the bits agreed on. A queue that the driver did not
        enable is ``None``. The rings must not be touched while
        ``transport.active`` is false, as it may be already.
        """

    @abstractmethod
    def notify(self, index: int) -> None:
        """Look at a queue: the driver kicked, or the bus may be mastered again.

        Called only when the queue is enabled and the transport is active; this
        must not raise for anything that a guest does.
        """

    @abstractmethod
    def reset(self, kind: ResetKind) -> bool:
        """Forget the driver; return whether that is finished.

        If not, the status register stays non-zero, as virtio 1.2, 2.1 allows,
        until :meth:`Transport.reset_done`. Queues are closed after this call:
        chains that come back later are dropped. A reset of the function may come
        while one by the driver is pending.
        """

    def on_bus_master(self, *, enabled: bool) -> None:
        """Follow COMMAND.BUS_MASTER; a device with a DMA port of its own gates it here."""
        del enabled

    def close(self) -> None:  # noqa: B027 - most devices have nothing that outlives a reset
        """Give back what outlives every reset, such as files; the device is used no more."""
