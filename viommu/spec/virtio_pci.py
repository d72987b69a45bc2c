"""Virtio over PCI, modern interface: capabilities and the common configuration.

Source: virtio 1.2, 4.1 "Virtio Over PCI Bus"; ``<linux/virtio_pci.h>``.
"""

from __future__ import annotations

import enum
import struct
from ctypes import c_uint8, c_uint16, c_uint32
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "CAP_BODY",
    "COMMON_CFG",
    "DEVICE_ID_BASE",
    "ISR_CONFIG",
    "ISR_QUEUE",
    "MSI_NO_VECTOR",
    "PCI_CFG_DATA_SIZE",
    "VENDOR_ID",
    "Cap",
    "CfgCap",
    "CfgType",
    "CommonCfg",
    "NotifyCap",
]

VENDOR_ID: Final = 0x1AF4
DEVICE_ID_BASE: Final = 0x1040  # plus the virtio device id; 4.1.2

MSI_NO_VECTOR: Final = 0xFFFF

ISR_QUEUE: Final = 1 << 0
ISR_CONFIG: Final = 1 << 1


class CfgType(enum.IntEnum):
    """``cfg_type`` of a vendor capability, virtio 1.2, 4.1.4."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5
    SHARED_MEMORY = 8
    VENDOR = 9


class Cap(Struct):
    """``struct virtio_pci_cap``, 16 bytes."""

    if TYPE_CHECKING:
        cap_vndr: int
        cap_next: int
        cap_len: int
        cfg_type: int
        bar: int
        id: int
        padding: bytes
        offset: int
        length: int
    else:
        _fields_ = (
            ("cap_vndr", c_uint8),
            ("cap_next", c_uint8),
            ("cap_len", c_uint8),
            ("cfg_type", c_uint8),
            ("bar", c_uint8),
            ("id", c_uint8),
            ("padding", c_uint8 * 2),
            ("offset", c_uint32),
            ("length", c_uint32),
        )


class NotifyCap(Struct):
    """``struct virtio_pci_notify_cap``, 20 bytes."""

    if TYPE_CHECKING:
        cap: Cap
        notify_off_multiplier: int
    else:
        _fields_ = (("cap", Cap), ("notify_off_multiplier", c_uint32))


class CfgCap(Struct):
    """``struct virtio_pci_cfg_cap``, 20 bytes: a window on the BARs in config space."""

    if TYPE_CHECKING:
        cap: Cap
        pci_cfg_data: bytes
    else:
        _fields_ = (("cap", Cap), ("pci_cfg_data", c_uint8 * 4))


class CommonCfg(Struct):
    """``struct virtio_pci_common_cfg`` with the two fields of virtio 1.2, 60 bytes.

    The 64-bit addresses are two 32-bit halves each, because that is how a
    driver must access them (4.1.3.1).
    """

    if TYPE_CHECKING:
        device_feature_select: int
        device_feature: int
        driver_feature_select: int
        driver_feature: int
        config_msix_vector: int
        num_queues: int
        device_status: int
        config_generation: int
        queue_select: int
        queue_size: int
        queue_msix_vector: int
        queue_enable: int
        queue_notify_off: int
        queue_desc_lo: int
        queue_desc_hi: int
        queue_driver_lo: int
        queue_driver_hi: int
        queue_device_lo: int
        queue_device_hi: int
        queue_notify_data: int
        queue_reset: int
    else:
        _fields_ = (
            ("device_feature_select", c_uint32),
            ("device_feature", c_uint32),
            ("driver_feature_select", c_uint32),
            ("driver_feature", c_uint32),
            ("config_msix_vector", c_uint16),
            ("num_queues", c_uint16),
            ("device_status", c_uint8),
            ("config_generation", c_uint8),
            ("queue_select", c_uint16),
            ("queue_size", c_uint16),
            ("queue_msix_vector", c_uint16),
            ("queue_enable", c_uint16),
            ("queue_notify_off", c_uint16),
            ("queue_desc_lo", c_uint32),
            ("queue_desc_hi", c_uint32),
            ("queue_driver_lo", c_uint32),
            ("queue_driver_hi", c_uint32),
            ("queue_device_lo", c_uint32),
            ("queue_device_hi", c_uint32),
            ("queue_notify_data", c_uint16),
            ("queue_reset", c_uint16),
        )


# The part of Cap after cap_next: cap_len, cfg_type, bar, id, offset, length.
CAP_BODY: Final = struct.Struct("<BBBB2xII")
COMMON_CFG: Final = struct.Struct("<IIIIHHBBHHHHHIIIIIIHH")
PCI_CFG_DATA_SIZE: Final = 4
