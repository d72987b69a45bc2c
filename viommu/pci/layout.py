"""What a configuration space says of its function: capabilities, resets, where MSI-X is.

For devices of others, whose configuration space may be wrong in any way.

Source: PCI Local Bus 3.0, chapter 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from viommu.memory.fixed_mapping import page_size
from viommu.spec import pci, vfio

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["BarPlace", "ConfigLayout", "mappable_areas", "overlay"]

_END_OF_MSIX: Final = 12  # bytes of the capability


class BarPlace(NamedTuple):
    """``[start, end)`` of a BAR."""

    bar: int
    start: int
    end: int


class ConfigLayout:
    """Reads what never changes in ``config``, at least the first 256 bytes.

    Layouts that say the same are equal.

    Attributes:
        capabilities: Id and offset of each, in the order of the chain.
        reset_bits: Where a function level reset is asked for: the bit, by the offset
            of its byte.
        msix: Where the table and the pending bits of MSI-X are; empty without MSI-X.
    """

    def __init__(self, config: bytes | bytearray) -> None:
        self.capabilities = tuple(_capabilities(config))
        self.reset_bits = dict(self._find_reset_bits(config))
        self.msix = self._find_msix(config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigLayout) and vars(self) == vars(other)

    def __repr__(self) -> str:
        found = ", ".join(f"{cap_id:#x} at {at:#x}" for cap_id, at in self.capabilities)
        return f"[{found}]"

    __hash__ = None  # type: ignore[assignment] # compared, never looked up

    def find(self, cap_id: int) -> int | None:
        """Return the offset of the first capability of a kind."""
        return next((at for found, at in self.capabilities if found == cap_id), None)

    def find_all(self, cap_id: int) -> list[int]:
        """Return the offsets of all capabilities of a kind, in the order of the chain."""
        return [at for found, at in self.capabilities if found == cap_id]

    def asks_for_reset(self, offset: int, data: bytes) -> bool:
        """Return whether to write ``data`` at ``offset`` resets the function."""
        return any(
            offset <= at < offset + len(data) and data[at - offset] & bit
            for at, bit in self.reset_bits.items()
        )

    def _find_reset_bits(self, config: bytes | bytearray) -> Iterator[tuple[int, int]]:
        if express := self.find(pci.CAP_ID_EXPRESS):
            at = express + pci.EXP_DEVCAP
            if int.from_bytes(config[at : at + 4], "little") & pci.EXP_DEVCAP_FLR:
                yield express + pci.EXP_DEVCTL + 1, pci.EXP_DEVCTL_FLR >> 8
        advanced = self.find(pci.CAP_ID_AF)
        if advanced and config[advanced + pci.AF_CAP] & pci.AF_CAP_FLR:
            yield advanced + pci.AF_CTRL, pci.AF_CTRL_FLR

    def _find_msix(self, config: bytes | bytearray) -> tuple[BarPlace, ...]:
        at = self.find(pci.CAP_ID_MSIX)
        if at is None or at + _END_OF_MSIX > len(config):
            return ()
        control, table, pending = pci.MSIX.unpack_from(config, at + 2)
        vectors = (control & pci.MSIX_CTRL_TABLE_SIZE) + 1
        sizes = (vectors * pci.MSIX_ENTRY_SIZE, -(-vectors // 64) * 8)
        return tuple(
            BarPlace(
                place & pci.MSIX_PLACE_BAR,
                place & ~pci.MSIX_PLACE_BAR,
                (place & ~pci.MSIX_PLACE_BAR) + size,
            )
            for place, size in zip((table, pending), sizes, strict=True)
        )


class _Region(Protocol):
    """What is used of a region's description."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def flags(self) -> int:
        """``VFIO_REGION_INFO_FLAG_*``."""

    @property
    def areas(self) -> tuple[tuple[int, int], ...]:
        """(offset, size) of what can be mapped, all of it where there are none."""


def mappable_areas(
    bar: int, region: _Region, taken: Iterable[BarPlace]
) -> tuple[tuple[int, int], ...]:
    """Return (offset, size) of the parts of a BAR that may be mapped, whole pages each.

    The pages that hold what is ``taken`` may not. MSI-X's structures are always among
    that, though newer kernels would let them: the VMM has to see what a guest writes
    there.
    """
    if not region.flags & vfio.REGION_INFO_FLAG_MMAP:
        return ()
    page = page_size()
    ranges = [(at, at + size) for at, size in region.areas] or [(0, region.size)]
    for place in taken:
        if place.bar == bar:
            hole = place.start // page * page, -(-place.end // page) * page
            ranges = [piece for whole in ranges for piece in _without(whole, hole)]
    pages = [(-(-start // page) * page, end // page * page) for start, end in sorted(ranges)]
    return tuple((start, end - start) for start, end in pages if start < end)


def overlay(target: bytearray, target_at: int, at: int, data: bytes) -> None:
    """Copy ``data``, which begins at ``at``, over the part of ``target`` that is there."""
    start, end = max(at, target_at), min(at + len(data), target_at + len(target))
    if start < end:
        target[start - target_at : end - target_at] = data[start - at : end - at]


def _without(whole: tuple[int, int], hole: tuple[int, int]) -> list[tuple[int, int]]:
    pieces = (whole[0], min(whole[1], hole[0])), (max(whole[0], hole[1]), whole[1])
    return [(start, end) for start, end in pieces if start < end]


def _capabilities(config: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Yield id and offset of every capability in the chain."""
    status = int.from_bytes(config[pci.STATUS : pci.STATUS + 2], "little")
    at = config[pci.CAPABILITY_LIST] & ~3 if status & pci.STATUS_CAP_LIST else 0
    seen: set[int] = set()
    while at >= pci.HEADER_SIZE and at not in seen:  # a broken device's chain may be a ring
        seen.add(at)
        yield config[at], at
        at = config[at + 1] & ~3
