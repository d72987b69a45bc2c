"""PCI configuration space: type 0 header and the capabilities that we have.

Source: PCI Local Bus 3.0, chapter 6; PCI Power Management 1.2; PCI Express Base
5.0, 7.5; ``<linux/pci_regs.h>``. Offsets of registers of a capability count from
its first byte.
"""

from __future__ import annotations

import struct
from ctypes import c_uint8, c_uint16, c_uint32
from typing import TYPE_CHECKING, Final

from viommu.spec._struct import Struct

__all__ = [
    "AF_CAP",
    "AF_CAP_FLR",
    "AF_CTRL",
    "AF_CTRL_FLR",
    "BAR_ADDRESS",
    "BAR_IO",
    "BAR_MEM_64",
    "BAR_PREFETCH",
    "BAR_TYPE",
    "BASE_ADDRESS_0",
    "CACHE_LINE_SIZE",
    "CAPABILITY_LIST",
    "CAP_ID_AF",
    "CAP_ID_EXPRESS",
    "CAP_ID_MSI",
    "CAP_ID_MSIX",
    "CAP_ID_PM",
    "CAP_ID_VENDOR",
    "CLASS_PROG",
    "COMMAND",
    "COMMAND_INTX_DISABLE",
    "COMMAND_IO",
    "COMMAND_MASTER",
    "COMMAND_MEMORY",
    "COMMAND_PARITY",
    "COMMAND_SERR",
    "CONFIG_SPACE_SIZE",
    "DEVICE_ID",
    "EXPRESS",
    "EXP_DEVCAP",
    "EXP_DEVCAP_FLR",
    "EXP_DEVCAP_RBER",
    "EXP_DEVCTL",
    "EXP_DEVCTL2",
    "EXP_DEVCTL_FLR",
    "EXP_DEVCTL_READRQ_512B",
    "EXP_DEVCTL_RELAX",
    "EXP_DEVSTA",
    "EXP_LNKCTL",
    "EXP_LNKCTL2",
    "EXP_LNK_2_5GT",
    "EXP_LNK_X1",
    "EXP_TYPE_ENDPOINT",
    "EXP_VERSION",
    "HEADER_SIZE",
    "HEADER_TYPE",
    "HEADER_TYPE_NORMAL",
    "INTERRUPT_LINE",
    "INTERRUPT_PIN",
    "LEGACY_CONFIG_SPACE_SIZE",
    "MSI",
    "MSIX",
    "MSIX_CTRL_ENABLE",
    "MSIX_CTRL_MASK_ALL",
    "MSIX_CTRL_TABLE_SIZE",
    "MSIX_ENTRY_SIZE",
    "MSIX_MAX_VECTORS",
    "MSIX_PENDING",
    "MSIX_PLACE_BAR",
    "MSIX_TABLE",
    "MSI_CTRL_64BIT",
    "MSI_CTRL_ENABLE",
    "MSI_CTRL_MULTIPLE_ENABLE",
    "MSI_CTRL_MULTIPLE_ENABLE_SHIFT",
    "MSI_MAX_VECTORS",
    "NUM_BARS",
    "PM",
    "PM_CAP_VERSION",
    "PM_CTRL",
    "PM_CTRL_NO_SOFT_RESET",
    "PM_CTRL_STATE",
    "PM_STATE_D0",
    "PM_STATE_D3HOT",
    "REVISION_ID",
    "ROM_ADDRESS",
    "STATUS",
    "STATUS_CAP_LIST",
    "STATUS_ERRORS",
    "SUBSYSTEM_ID",
    "SUBSYSTEM_VENDOR_ID",
    "VENDOR_ID",
    "ExpressCap",
    "Header",
    "MsiCap",
    "MsixCap",
    "MsixEntry",
    "PmCap",
]

CONFIG_SPACE_SIZE: Final = 4096
LEGACY_CONFIG_SPACE_SIZE: Final = 256  # where the capabilities of a chain must lie
HEADER_SIZE: Final = 64
NUM_BARS: Final = 6


class Header(Struct):
    """The type 0 configuration header, 64 bytes."""

    if TYPE_CHECKING:
        vendor_id: int
        device_id: int
        command: int
        status: int
        revision_id: int
        prog_if: int
        subclass: int
        base_class: int
        cache_line_size: int
        latency_timer: int
        header_type: int
        bist: int
        bar: list[int]
        cardbus_cis: int
        subsystem_vendor_id: int
        subsystem_id: int
        rom: int
        capabilities: int
        reserved: bytes
        interrupt_line: int
        interrupt_pin: int
        min_gnt: int
        max_lat: int
    else:
        _fields_ = (
            ("vendor_id", c_uint16),
            ("device_id", c_uint16),
            ("command", c_uint16),
            ("status", c_uint16),
            ("revision_id", c_uint8),
            ("prog_if", c_uint8),
            ("subclass", c_uint8),
            ("base_class", c_uint8),
            ("cache_line_size", c_uint8),
            ("latency_timer", c_uint8),
            ("header_type", c_uint8),
            ("bist", c_uint8),
            ("bar", c_uint32 * NUM_BARS),
            ("cardbus_cis", c_uint32),
            ("subsystem_vendor_id", c_uint16),
            ("subsystem_id", c_uint16),
            ("rom", c_uint32),
            ("capabilities", c_uint8),
            ("reserved", c_uint8 * 7),
            ("interrupt_line", c_uint8),
            ("interrupt_pin", c_uint8),
            ("min_gnt", c_uint8),
            ("max_lat", c_uint8),
        )


VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
STATUS: Final = 0x06
REVISION_ID: Final = 0x08
CLASS_PROG: Final = 0x09
CACHE_LINE_SIZE: Final = 0x0C
HEADER_TYPE: Final = 0x0E
BASE_ADDRESS_0: Final = 0x10
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
ROM_ADDRESS: Final = 0x30
CAPABILITY_LIST: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

HEADER_TYPE_NORMAL: Final = 0

COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_PARITY: Final = 1 << 6
COMMAND_SERR: Final = 1 << 8
COMMAND_INTX_DISABLE: Final = 1 << 10

STATUS_CAP_LIST: Final = 1 << 4
STATUS_ERRORS: Final = 0xF900  # write one to clear

BAR_IO: Final = 0x1
BAR_TYPE: Final = 0x6
BAR_MEM_64: Final = 0x4
BAR_PREFETCH: Final = 0x8
BAR_ADDRESS: Final = 0xFFFFFFF0

CAP_ID_PM: Final = 0x01
CAP_ID_MSI: Final = 0x05
CAP_ID_VENDOR: Final = 0x09
CAP_ID_EXPRESS: Final = 0x10
CAP_ID_MSIX: Final = 0x11
CAP_ID_AF: Final = 0x13


class PmCap(Struct):
    """The power management capability, 8 bytes."""

    if TYPE_CHECKING:
        cap_id: int
        cap_next: int
        pmc: int
        ctrl: int
        bridge: int
        data: int
    else:
        _fields_ = (
            ("cap_id", c_uint8),
            ("cap_next", c_uint8),
            ("pmc", c_uint16),
            ("ctrl", c_uint16),
            ("bridge", c_uint8),
            ("data", c_uint8),
        )


PM: Final = struct.Struct("<HHBB")  # PmCap after its header
PM_CTRL: Final = 4
PM_CAP_VERSION: Final = 3
PM_CTRL_STATE: Final = 0x0003
PM_CTRL_NO_SOFT_RESET: Final = 0x0008
PM_STATE_D0: Final = 0
PM_STATE_D3HOT: Final = 3


class ExpressCap(Struct):
    """The PCI Express capability, version 2, of an endpoint: 60 bytes."""

    if TYPE_CHECKING:
        cap_id: int
        cap_next: int
        flags: int
        devcap: int
        devctl: int
        devsta: int
        lnkcap: int
        lnkctl: int
        lnksta: int
        slot_and_root: bytes
        devcap2: int
        devctl2: int
        devsta2: int
        lnkcap2: int
        lnkctl2: int
        lnksta2: int
        slot2: bytes
    else:
        _fields_ = (
            ("cap_id", c_uint8),
            ("cap_next", c_uint8),
            ("flags", c_uint16),
            ("devcap", c_uint32),
            ("devctl", c_uint16),
            ("devsta", c_uint16),
            ("lnkcap", c_uint32),
            ("lnkctl", c_uint16),
            ("lnksta", c_uint16),
            ("slot_and_root", c_uint8 * 16),
            ("devcap2", c_uint32),
            ("devctl2", c_uint16),
            ("devsta2", c_uint16),
            ("lnkcap2", c_uint32),
            ("lnkctl2", c_uint16),
            ("lnksta2", c_uint16),
            ("slot2", c_uint8 * 8),
        )


EXPRESS: Final = struct.Struct("<HIHHIHH16xIHHIHH8x")  # ExpressCap after its header
EXP_VERSION: Final = 2
EXP_TYPE_ENDPOINT: Final = 0x0
EXP_DEVCAP: Final = 0x04
EXP_DEVCTL: Final = 0x08
EXP_DEVSTA: Final = 0x0A
EXP_LNKCTL: Final = 0x10
EXP_DEVCTL2: Final = 0x28
EXP_LNKCTL2: Final = 0x30
EXP_DEVCAP_RBER: Final = 1 << 15
EXP_DEVCAP_FLR: Final = 1 << 28
EXP_DEVCTL_FLR: Final = 1 << 15
EXP_DEVCTL_RELAX: Final = 1 << 4
EXP_DEVCTL_READRQ_512B: Final = 0x2000
EXP_LNK_2_5GT: Final = 0x1
EXP_LNK_X1: Final = 0x10


class MsiCap(Struct):
    """The MSI capability with 64-bit addresses and no mask bits, 14 bytes and padding.

    The address is two halves, as in ``<linux/pci_regs.h>``.
    """

    if TYPE_CHECKING:
        cap_id: int
        cap_next: int
        ctrl: int
        address_lo: int
        address_hi: int
        data: int
    else:
        _fields_ = (
            ("cap_id", c_uint8),
            ("cap_next", c_uint8),
            ("ctrl", c_uint16),
            ("address_lo", c_uint32),
            ("address_hi", c_uint32),
            ("data", c_uint16),
        )


MSI: Final = struct.Struct("<HIIH")  # MsiCap after its header
MSI_CTRL_ENABLE: Final = 1 << 0
MSI_CTRL_MULTIPLE_ENABLE: Final = 0x0070
MSI_CTRL_MULTIPLE_ENABLE_SHIFT: Final = 4
MSI_CTRL_64BIT: Final = 1 << 7
MSI_MAX_VECTORS: Final = 32


class MsixCap(Struct):
    """The MSI-X capability, 12 bytes; BAR number in the low three bits of both offsets."""

    if TYPE_CHECKING:
        cap_id: int
        cap_next: int
        ctrl: int
        table: int
        pba: int
    else:
        _fields_ = (
            ("cap_id", c_uint8),
            ("cap_next", c_uint8),
            ("ctrl", c_uint16),
            ("table", c_uint32),
            ("pba", c_uint32),
        )


class MsixEntry(Struct):
    """One entry of the MSI-X table, 16 bytes."""

    if TYPE_CHECKING:
        address_lo: int
        address_hi: int
        data: int
        vector_ctrl: int
    else:
        _fields_ = (
            ("address_lo", c_uint32),
            ("address_hi", c_uint32),
            ("data", c_uint32),
            ("vector_ctrl", c_uint32),
        )


MSIX: Final = struct.Struct("<HII")  # MsixCap after its header
MSIX_ENTRY_SIZE: Final = 16
MSIX_MAX_VECTORS: Final = 2048
MSIX_CTRL_MASK_ALL: Final = 1 << 14
MSIX_CTRL_ENABLE: Final = 1 << 15
MSIX_CTRL_TABLE_SIZE: Final = 0x07FF  # number of entries minus one
MSIX_TABLE: Final = 4
MSIX_PENDING: Final = 8
MSIX_PLACE_BAR: Final = 0x7  # the rest of MSIX_TABLE and MSIX_PENDING is an offset in that BAR

# "Advanced features" of conventional PCI (ECN of 2006), here to be reset.
AF_CAP: Final = 3
AF_CAP_FLR: Final = 1 << 1
AF_CTRL: Final = 4
AF_CTRL_FLR: Final = 1 << 0
