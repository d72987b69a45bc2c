"""Message signalled interrupts: MSI and MSI-X as a device behind vfio sees them.

The VMM keeps addresses, data and masks, and gives an eventfd a vector. What is
left to the device is whether the mechanism is on at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.errors import UsageError
from viommu.pci.config_space import Capability
from viommu.spec import pci as spec

if TYPE_CHECKING:
    from viommu.pci.config_space import ConfigSpace

__all__ = ["Msi", "Msix", "MsixBar"]

_CTRL: Final = 2  # of either capability
_MIN_BAR: Final = 4096


class Msi:
    """The MSI capability: up to 32 vectors, 64-bit addresses, no mask bits.

    Raises:
        UsageError: The number of vectors is not a power of two up to 32.
    """

    def __init__(self, config: ConfigSpace, vectors: int) -> None:
        if not 0 < vectors <= spec.MSI_MAX_VECTORS or vectors & (vectors - 1):
            raise UsageError(f"MSI has a power of two up to 32 vectors, not {vectors}")
        self.vectors = vectors
        self._config = config
        multiple_capable = (vectors.bit_length() - 1) << 1
        self._offset = config.add_capability(
            Capability(
                spec.CAP_ID_MSI,
                spec.MSI.pack(spec.MSI_CTRL_64BIT | multiple_capable, 0, 0, 0),
                writable=spec.MSI.pack(
                    spec.MSI_CTRL_ENABLE | spec.MSI_CTRL_MULTIPLE_ENABLE,
                    0xFFFFFFFC,
                    0xFFFFFFFF,
                    0xFFFF,
                ),
            )
        )

    def allows(self, vector: int) -> bool:
        """Return whether the driver has switched this vector on."""
        ctrl = self._config.u16(self._offset + _CTRL)
        exponent = (ctrl & spec.MSI_CTRL_MULTIPLE_ENABLE) >> spec.MSI_CTRL_MULTIPLE_ENABLE_SHIFT
        granted = min(self.vectors, 1 << exponent)
        return bool(ctrl & spec.MSI_CTRL_ENABLE) and 0 <= vector < granted


class Msix:
    """The MSI-X capability, its table and pending bits in a BAR of their own.

    Raises:
        UsageError: More than 2048 vectors, or none.
    """

    def __init__(self, config: ConfigSpace, vectors: int, bar: int) -> None:
        if not 0 < vectors <= spec.MSIX_MAX_VECTORS:
            raise UsageError(f"MSI-X has 1 to 2048 vectors, not {vectors}")
        self.vectors = vectors
        # The table in the lower half, the pending bits in the upper.
        half = 1 << (vectors * spec.MSIX_ENTRY_SIZE - 1).bit_length()
        self.bar_size = max(_MIN_BAR, 2 * half)
        self._config = config
        self._offset = config.add_capability(
            Capability(
                spec.CAP_ID_MSIX,
                spec.MSIX.pack(vectors - 1, bar, self.bar_size // 2 | bar),
                writable=spec.MSIX.pack(spec.MSIX_CTRL_ENABLE | spec.MSIX_CTRL_MASK_ALL, 0, 0),
            )
        )

    @property
    def enabled(self) -> bool:
        """Whether the driver has switched MSI-X on."""
        return bool(self._config.u16(self._offset + _CTRL) & spec.MSIX_CTRL_ENABLE)

    def allows(self, vector: int) -> bool:
        """Return whether this vector exists and MSI-X is on; masks are the VMM's."""
        return self.enabled and 0 <= vector < self.vectors


class MsixBar:
    """The BAR with table and pending bits, which the VMM emulates in front of us.

    What comes through all the same reads as zero: nothing is pending here.
    """

    @staticmethod
    def read(offset: int, count: int) -> bytes:
        """Return zeros."""
        del offset
        return bytes(count)

    @staticmethod
    def write(offset: int, data: bytes) -> None:
        """Ignore a write."""
        del offset, data
