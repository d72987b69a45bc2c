"""What every virtio device has: status bits and transport feature bits.

Source: virtio 1.2, 2.1 "Device Status Field" and 6 "Reserved Feature Bits";
``<linux/virtio_config.h>``, ``<linux/virtio_ring.h>``.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = [
    "DEVICE_FEATURES",
    "STATUS_ACKNOWLEDGE",
    "STATUS_DEVICE_NEEDS_RESET",
    "STATUS_DRIVER",
    "STATUS_DRIVER_OK",
    "STATUS_FAILED",
    "STATUS_FEATURES_OK",
    "Feature",
]

STATUS_ACKNOWLEDGE: Final = 1
STATUS_DRIVER: Final = 2
STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8
STATUS_DEVICE_NEEDS_RESET: Final = 64
STATUS_FAILED: Final = 128


class Feature(enum.IntEnum):
    """Feature bits (bit numbers) that belong to the ring and the transport."""

    RING_INDIRECT_DESC = 28
    RING_EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40


# Bits 0 to 23 and 50 to 127 are a device type's own (virtio 1.2, 2.2).
DEVICE_FEATURES: Final = (1 << 24) - 1 | (1 << 128) - (1 << 50)
