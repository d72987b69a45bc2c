"""VFIO's view of a PCI device: regions and interrupts, by index.

Source: ``<linux/vfio.h>``; vfio-user uses the same numbers.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "IRQ_INFO_EVENTFD",
    "PCI_CONFIG_REGION_INDEX",
    "PCI_ERR_IRQ_INDEX",
    "PCI_MSIX_IRQ_INDEX",
    "PCI_MSI_IRQ_INDEX",
    "PCI_NUM_IRQS",
    "PCI_NUM_REGIONS",
    "PCI_REQ_IRQ_INDEX",
    "REGION_INFO_FLAG_READ",
    "REGION_INFO_FLAG_WRITE",
]

# Regions 0 to 5 are the BARs.
PCI_CONFIG_REGION_INDEX: Final = 7
PCI_NUM_REGIONS: Final = 9

REGION_INFO_FLAG_READ: Final = 1 << 0
REGION_INFO_FLAG_WRITE: Final = 1 << 1

PCI_MSI_IRQ_INDEX: Final = 1
PCI_MSIX_IRQ_INDEX: Final = 2
PCI_ERR_IRQ_INDEX: Final = 3
PCI_REQ_IRQ_INDEX: Final = 4
PCI_NUM_IRQS: Final = 5

IRQ_INFO_EVENTFD: Final = 1 << 0
