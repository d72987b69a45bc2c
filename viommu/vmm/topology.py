"""Which PCI addresses a virtio-iommu and its endpoints can have on a q35 machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.vmm.bdf import Bdf

__all__ = ["check_topology"]

_TAKEN = {0x00: "the host bridge", 0x1F: "the LPC, SATA and SMBus functions"}


def check_topology(iommu: Bdf, endpoints: Sequence[Bdf]) -> None:
    """Check that these functions can be together on the root bus of QEMU's q35.

    Raises:
        UsageError: An address is taken twice or by the machine itself, is not on
            bus 0, or is a function of a device that has no function 0: a guest
            looks for the others only where it found that one.
    """
    everyone = {iommu}
    for endpoint in endpoints:
        if endpoint == iommu:
            raise UsageError(f"PCI address {endpoint} is both the IOMMU and an endpoint: move one")
        if endpoint in everyone:
            raise UsageError(f"PCI address {endpoint} is given to two endpoints: move one")
        everyone.add(endpoint)
    for bdf in sorted(everyone):
        if bdf.bus:
            raise UsageError(
                f"PCI address {bdf}: only bus 00 can be used so far, "
                f"choose 00:{bdf.device:02x}.{bdf.function:x} or another device of it"
            )
        if owner := _TAKEN.get(bdf.device):
            raise UsageError(
                f"PCI address {bdf}: q35 has {owner} there, choose a device from 01 to 1e"
            )
        if bdf._replace(function=0) not in everyone:
            raise UsageError(
                f"PCI address {bdf}: the device needs a function 0, "
                f"add an endpoint at {bdf._replace(function=0)}"
            )
