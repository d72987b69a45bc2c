"""The common configuration: the registers through which a driver sets a device up.

Source: virtio 1.2, 4.1.4.3 "Common configuration structure layout". A driver
must access each field at its own width; anything else is answered (reads give
the bytes, writes change the fields that they cover whole) and breaks nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Protocol

from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.virtio.status import DeviceStatus, Event, State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["COMMON_CONFIG_SIZE", "CommonConfig", "CommonConfigHooks", "QueueRegisters"]

_log = logging.getLogger(__name__)

COMMON_CONFIG_SIZE: Final = spec.COMMON_CFG.size

_WORD: Final = 0xFFFFFFFF
_FEATURE_WORDS: Final = 4  # 128 feature bits are defined; selecting further ones reads 0


class CommonConfigHooks(Protocol):
    """Whom the registers tell what the driver wants."""

    def driver_ok(self) -> None:
        """The driver is running now."""

    def driver_failed(self) -> None:
        """The driver has given up on the device."""

    def reset_requested(self) -> None:
        """The driver wrote 0 to the status; :meth:`CommonConfig.finish_reset` is due."""


class QueueRegisters:
    """What a driver says about one queue; zeros in :attr:`addresses` until it does."""

    __slots__ = ("desc", "device", "driver", "enabled", "max_size", "size", "vector")

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Go back to what a driver finds after a reset."""
        self.size = self.max_size
        self.vector = spec.MSI_NO_VECTOR
        self.enabled = False
        self.desc = 0
        self.driver = 0
        self.device = 0


class CommonConfig:
    """The register bank.

    Args:
        name: What messages call the device.
        offered: The feature bits that the device offers, as a mask.
        queue_sizes: The largest size of each queue.
        num_vectors: How many MSI-X vectors there are; others read back as NO_VECTOR.
        hooks: Whom to tell.
    """

    def __init__(
        self,
        name: str,
        offered: int,
        queue_sizes: Sequence[int],
        num_vectors: int,
        hooks: CommonConfigHooks,
    ) -> None:
        self.offered = offered
        self.queues = [QueueRegisters(size) for size in queue_sizes]
        self.status = DeviceStatus()
        self.generation = 0
        self._name = name
        self._num_vectors = num_vectors
        self._hooks = hooks
        self._no_queue = QueueRegisters(0)  # what a driver sees beyond the last one
        self._writers = self._table()
        self._clear()

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes of registers, fewer at the end."""
        queue = self._selected()
        return spec.COMMON_CFG.pack(
            self.device_feature_select,
            self._feature_word(self.offered, self.device_feature_select),
            self.driver_feature_select,
            self._feature_word(self.accepted, self.driver_feature_select),
            self.config_vector,
            len(self.queues),
            self.status.byte,
            self.generation,
            self.queue_select,
            queue.size,
            queue.vector,
            queue.enabled,
            self.queue_select if queue is not self._no_queue else 0,  # notify offset
            queue.desc & _WORD,
            queue.desc >> 32,
            queue.driver & _WORD,
            queue.driver >> 32,
            queue.device & _WORD,
            queue.device >> 32,
            0,  # queue_notify_data: NOTIF_CONFIG_DATA is not offered
            0,  # queue_reset: RING_RESET is not offered
        )[offset : offset + count]

    def write(self, offset: int, data: bytes) -> None:
        """Store every register that ``data`` covers."""
        end = offset + len(data)
        for start, size, store in self._writers:
            if offset <= start and start + size <= end:
                store(int.from_bytes(data[start - offset : start - offset + size], "little"))

    def reset(self) -> None:
        """Clear every register but the status, which waits for :meth:`finish_reset`."""
        self._clear()

    def finish_reset(self) -> bool:
        """Let the driver see that the reset is over; return whether there was one."""
        return self.status.feed(Event.FINISH_RESET)

    def refusal(self) -> str | None:
        """Return why the accepted features are refused, ``None`` when they are not.

        Source: virtio 1.2, 2.2.2, 6.1, 6.2.
        """
        if unknown := self.accepted & ~self.offered:
            return f"feature bits {unknown:#x} were not offered"
        if not self.accepted >> Feature.VERSION_1 & 1:
            return "VERSION_1 was not accepted"
        if self.offered & ~self.accepted & 1 << Feature.ACCESS_PLATFORM:
            return "ACCESS_PLATFORM was not accepted, and this device is behind an IOMMU"
        return None

    def _clear(self) -> None:
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.accepted = 0
        self.config_vector = spec.MSI_NO_VECTOR
        self.queue_select = 0
        for queue in self.queues:
            queue.reset()

    def _selected(self) -> QueueRegisters:
        if self.queue_select < len(self.queues):
            return self.queues[self.queue_select]
        return self._no_queue

    @staticmethod
    def _feature_word(mask: int, select: int) -> int:
        return mask >> 32 * select & _WORD if select < _FEATURE_WORDS else 0

    def _table(self) -> list[tuple[int, int, Callable[[int], None]]]:
        """Return offset, size and action of each register that can be written."""
        layout: Any = spec.CommonCfg
        actions: dict[str, Callable[[int], None]] = {
            "device_feature_select": self._select_device_feature,
            "driver_feature_select": self._select_driver_feature,
            "driver_feature": self._accept,
            "config_msix_vector": self._set_config_vector,
            "device_status": self._set_status,
            "queue_select": self._select_queue,
            "queue_size": self._set_queue_size,
            "queue_msix_vector": self._set_queue_vector,
        }
        for area in ("desc", "driver", "device"):
            actions[f"queue_{area}_lo"] = self._address_writer(area, 0)
            actions[f"queue_{area}_hi"] = self._address_writer(area, 32)
        # Last: a write that covers addresses as well must not enable before them.
        actions["queue_enable"] = self._enable_queue
        return [
            (getattr(layout, name).offset, getattr(layout, name).size, action)
            for name, action in actions.items()
        ]

    def _select_device_feature(self, value: int) -> None:
        self.device_feature_select = value

    def _select_driver_feature(self, value: int) -> None:
        self.driver_feature_select = value

    def _select_queue(self, value: int) -> None:
        self.queue_select = value

    def _accept(self, value: int) -> None:
        """Take one word of features; too late once FEATURES_OK is set (3.1.1)."""
        negotiating = {State.RESET, State.ACKNOWLEDGED, State.DRIVER}
        select = self.driver_feature_select
        if self.status.state in negotiating and select < _FEATURE_WORDS:
            kept = self.accepted & ~(_WORD << 32 * select)
            self.accepted = kept | value << 32 * select

    def _vector(self, value: int) -> int:
        return value if value < self._num_vectors else spec.MSI_NO_VECTOR

    def _set_config_vector(self, value: int) -> None:
        self.config_vector = self._vector(value)

    def _set_queue_vector(self, value: int) -> None:
        queue = self._selected()
        if queue is not self._no_queue:
            queue.vector = self._vector(value)

    def _set_queue_size(self, value: int) -> None:
        queue = self._selected()
        if not queue.enabled and 0 < value <= queue.max_size and not value & (value - 1):
            queue.size = value

    def _address_writer(self, area: str, shift: int) -> Callable[[int], None]:
        def store(value: int) -> None:
            queue = self._selected()
            if not queue.enabled and queue is not self._no_queue:
                kept = getattr(queue, area) & ~(_WORD << shift)
                setattr(queue, area, kept | value << shift)

        return store

    def _enable_queue(self, value: int) -> None:
        """Enable a queue; only before DRIVER_OK, and there is no way back (4.1.4.3.2)."""
        queue = self._selected()
        settled = {State.RUNNING, State.NEEDS_RESET, State.FAILED, State.RESETTING}
        if value == 1 and queue is not self._no_queue and self.status.state not in settled:
            queue.enabled = True

    def _set_status(self, value: int) -> None:
        for event in DeviceStatus.events_of(value, self.status.byte):
            if event is Event.FEATURES_OK and (refusal := self.refusal()):
                _log.info("%s: FEATURES_OK is refused: %s", self._name, refusal)
                continue
            if not self.status.feed(event):
                continue
            if event is Event.START_RESET:
                self._hooks.reset_requested()
            elif event is Event.DRIVER_OK:
                self._hooks.driver_ok()
            elif event is Event.FAIL:
                self._hooks.driver_failed()
