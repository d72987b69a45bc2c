"""A disk whose author has never heard of IOMMUs: it does not offer ACCESS_PLATFORM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from viommu.endpoints import BlkDevice, EndpointKind, Option
from viommu.virtio.pci import VirtioPciFunction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from viommu.endpoints import Place

__all__ = ["KIND"]


class _PlainDisk(BlkDevice):
    behind_iommu = False


def _make(place: Place, options: Mapping[str, Any]) -> VirtioPciFunction:
    disk = _PlainDisk(options["path"], place.dma, place.loop)
    return VirtioPciFunction(place.name, place.memory, disk, place.dma)


KIND: Final = EndpointKind(
    "a virtio disk for addresses of guest memory only",
    {"path": Option(Path, "the disk image", required=True)},
    _make,
)
