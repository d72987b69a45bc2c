"""PCI functions: configuration space, capabilities, BARs and interrupts."""

from viommu.pci.config_space import Capability, ConfigSpace, Identity
from viommu.pci.function import BarHandler, PciFunction, ResetKind

__all__ = ["BarHandler", "Capability", "ConfigSpace", "Identity", "PciFunction", "ResetKind"]
