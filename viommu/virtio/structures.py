"""Where a virtio device has its structures: the vendor capabilities, as a driver reads them.

Source: virtio 1.2, 4.1.4 "Virtio Structure PCI Capabilities".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.spec import virtio_pci as spec
from viommu.spec._struct import sizeof

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Structure", "find_structures"]

_BODY_AT: Final = 2  # of a capability: after its id and the link to the next one
_LAST_BAR: Final = 5  # higher numbers are reserved: the capability means nothing


class Structure(NamedTuple):
    """``[start, end)`` of a BAR."""

    bar: int
    start: int
    end: int

    def offset_of(self, bar: int, offset: int, size: int) -> int | None:
        """Return where an access of ``size`` bytes is in here; ``None``: it isn't, or not all."""
        inside = bar == self.bar and self.start <= offset and offset + size <= self.end
        return offset - self.start if inside else None


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
