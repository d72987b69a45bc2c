"""The capabilities that every function has: power management and PCI Express."""

from __future__ import annotations

from typing import Final

from viommu.pci.config_space import Capability
from viommu.spec import pci as spec

__all__ = ["express_endpoint", "power_management"]

_WRITABLE_16: Final = b"\xff\xff"
_DEVSTA_ERRORS: Final = 0x000F  # detected errors; write one to clear


def power_management() -> Capability:
    """Return PM with D0 and D3hot, which keeps state from D3hot to D0.

    No_Soft_Reset matters: without it Linux resets a virtio device on suspend, and
    its virtio-iommu driver can't restore one.
    """
    return Capability(
        spec.CAP_ID_PM,
        spec.PM.pack(spec.PM_CAP_VERSION, spec.PM_CTRL_NO_SOFT_RESET, 0, 0),
        writable=spec.PM.pack(0, spec.PM_CTRL_STATE, 0, 0),
    )


def express_endpoint() -> Capability:
    """Return a version 2 PCI Express endpoint behind a link of width 1 at 2.5 GT/s.

    It can be reset by itself (FLR). On a root bus the VMM turns it into an
    integrated endpoint without a link, as QEMU does.
    """
    link = spec.EXP_LNK_2_5GT | spec.EXP_LNK_X1
    devctl = spec.EXP_DEVCTL_RELAX | spec.EXP_DEVCTL_READRQ_512B
    body = spec.EXPRESS.pack(
        spec.EXP_VERSION | spec.EXP_TYPE_ENDPOINT << 4,
        spec.EXP_DEVCAP_RBER | spec.EXP_DEVCAP_FLR,
        devctl,
        0,  # device status
        link,
        0,  # link control
        link,
        0,  # device capabilities 2
        0,
        0,
        spec.EXP_LNK_2_5GT << 1,  # supported speeds, a bit each from bit 1 on
        spec.EXP_LNK_2_5GT,  # target speed
        0,
    )
    writable = bytearray(len(body))
    for register in (spec.EXP_DEVCTL, spec.EXP_LNKCTL, spec.EXP_DEVCTL2, spec.EXP_LNKCTL2):
        writable[register - 2 : register] = _WRITABLE_16
    clear_on_one = bytearray(len(body))
    clear_on_one[spec.EXP_DEVSTA - 2] = _DEVSTA_ERRORS
    return Capability(spec.CAP_ID_EXPRESS, body, bytes(writable), bytes(clear_on_one))
