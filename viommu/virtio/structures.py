"""What configuration space says of a virtio device: what it is, and where its structures are.

Source: virtio 1.2, 4.1.2 "PCI Device Discovery", 4.1.4 "Virtio Structure PCI
Capabilities".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.pci.layout import ConfigLayout
from viommu.spec import pci, virtio_blk
from viommu.spec import virtio_pci as spec
from viommu.spec._struct import sizeof

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Structure", "find_structures", "find_virtio", "is_disk"]

_BODY_AT: Final = 2  # of a capability: after its id and the link to the next one
_LAST_BAR: Final = 5  # higher numbers are reserved: the capability means nothing


_TRANSITIONAL_DISK: Final = 0x1001  # those have numbers of their own, 4.1.2
_DISKS: Final = (spec.DEVICE_ID_BASE + virtio_blk.DEVICE_ID, _TRANSITIONAL_DISK)


class Structure(NamedTuple):
    """``[start, end)`` of a BAR."""

    bar: int
    start: int
    end: int

    def offset_of(self, bar: int, offset: int, size: int) -> int | None:
        """Return where an access of ``size`` bytes is in here; ``None``: it isn't, or not all."""
        inside = bar == self.bar and self.start <= offset and offset + size <= self.end
        return offset - self.start if inside else None


def find_virtio(config: bytes) -> dict[spec.CfgType, Structure]:
    """Return the structures of the device with this configuration space, if it is virtio's."""
    if _u16(config, pci.VENDOR_ID) != spec.VENDOR_ID:
        return {}
    return find_structures(config, ConfigLayout(config).find_all(pci.CAP_ID_VENDOR))


def is_disk(config: bytes) -> bool:
    """Return whether it is virtio-blk."""
    return _u16(config, pci.VENDOR_ID) == spec.VENDOR_ID and _u16(config, pci.DEVICE_ID) in _DISKS


def find_structures(config: bytes, capabilities: Iterable[int]) -> dict[spec.CfgType, Structure]:
    """Return the structures in BARs, the first of each kind: that is the one drivers use.

    ``capabilities`` are the offsets of the vendor capabilities in ``config``, in order.
    """
    found: dict[spec.CfgType, Structure] = {}
    for at in capabilities:
        if at + sizeof(spec.Cap) > len(config):
            continue
        length, kind, bar, _, offset, size = spec.CAP_BODY.unpack_from(config, at + _BODY_AT)
        if length < sizeof(spec.Cap) or bar > _LAST_BAR or not size:
            continue
        if kind in _IN_BARS:
            found.setdefault(spec.CfgType(kind), Structure(bar, offset, offset + size))
    return found


_IN_BARS: Final = frozenset(
    (spec.CfgType.COMMON, spec.CfgType.NOTIFY, spec.CfgType.ISR, spec.CfgType.DEVICE)
)


def _u16(config: bytes, at: int) -> int:
    return int.from_bytes(config[at : at + 2], "little")
