"""What a driver has told a device that is elsewhere, followed by the accesses that pass by.

Source: virtio 1.2, 4.1.4.3 "Common configuration structure layout".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from viommu.spec import virtio_pci as spec

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DriverRegisters", "FollowedQueue"]

_LAYOUT: Any = spec.CommonCfg
_FIELDS: Final = tuple(
    (name, getattr(_LAYOUT, name).offset, getattr(_LAYOUT, name).size)
    for name in (
        "driver_feature_select",
        "driver_feature",
        "config_msix_vector",
        "device_status",
        "queue_select",
        "queue_size",
        "queue_msix_vector",
        "queue_desc_lo",
        "queue_desc_hi",
        "queue_driver_lo",
        "queue_driver_hi",
        "queue_device_lo",
        "queue_device_hi",
        "queue_reset",
        "queue_enable",  # last, as in a device: it may come in one write with the addresses
    )
)
_WORD: Final = 0xFFFFFFFF
_FEATURE_WORDS: Final = 4
_MAX_QUEUES: Final = 1024  # followed: a driver may select any of 65536


class FollowedQueue:
    """One queue as the driver set it up."""

    __slots__ = ("desc", "device", "driver", "enabled", "size", "vector")

    def __init__(self) -> None:
        self.size = 0  # until the driver has seen or said one
        self.vector = spec.MSI_NO_VECTOR
        self.enabled = False
        self.desc = 0
        self.driver = 0
        self.device = 0


class DriverRegisters:
    """Follows one driver, from the reset before it to the next."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Be as after a reset."""
        self.status = 0
        self.features = 0
        self.config_vector = spec.MSI_NO_VECTOR
        self.queues: dict[int, FollowedQueue] = {}
        self._feature_select = 0
        self._queue_select = 0

    def wrote(self, offset: int, data: bytes) -> bool:
        """Follow a write at ``offset`` of the structure; return whether it asks for a reset.

        All is forgotten then; what else the write covers can't be meant.
        """
        for name, value in _covered(offset, data):
            if name == "device_status" and not value:
                self.clear()
                return True
            self._follow(name, value)
        return False

    def answered(self, offset: int, data: bytes) -> None:
        """Follow what the device answered: it says how long its queues are by default."""
        for name, value in _covered(offset, data):
            queue = self._selected()
            if name == "queue_size" and queue is not None and not queue.size:
                queue.size = value

    def _follow(self, name: str, value: int) -> None:
        match name:
            case "device_status":
                self.status = value
            case "config_msix_vector":
                self.config_vector = value
            case "driver_feature_select":
                self._feature_select = value
            case "driver_feature":
                if self._feature_select < _FEATURE_WORDS:
                    shift = 32 * self._feature_select
                    self.features = self.features & ~(_WORD << shift) | value << shift
            case "queue_select":
                self._queue_select = value
            case _:
                if (queue := self._selected()) is not None:
                    self._follow_queue(queue, name, value)

    def _follow_queue(self, queue: FollowedQueue, name: str, value: int) -> None:
        match name:
            case "queue_size":
                queue.size = value
            case "queue_msix_vector":
                queue.vector = value
            case "queue_enable":
                queue.enabled = value == 1
            case "queue_reset":
                if value:
                    del self.queues[self._queue_select]
            case _:
                _, area, half = name.split("_")
                shift = 32 if half == "hi" else 0
                kept = getattr(queue, area) & ~(_WORD << shift)
                setattr(queue, area, kept | value << shift)

    def _selected(self) -> FollowedQueue | None:
        if self._queue_select >= _MAX_QUEUES:
            return None
        return self.queues.setdefault(self._queue_select, FollowedQueue())


def _covered(offset: int, data: bytes) -> Iterator[tuple[str, int]]:
    """Yield name and value of every register that an access covers whole."""
    end = offset + len(data)
    for name, start, size in _FIELDS:
        if offset <= start and start + size <= end:
            yield name, int.from_bytes(data[start - offset : start - offset + size], "little")
