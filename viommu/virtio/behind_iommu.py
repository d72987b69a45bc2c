"""Features of a virtio device of others that is behind an IOMMU, and was not made for that.

A driver gives a device guest physical addresses unless the device offers
ACCESS_PLATFORM; then it gives what the IOMMU translates. To the device both are just
addresses. So the feature is offered for it, and not passed on when the driver accepts
it. A disk's packed rings are not offered: nobody could end the requests in them when
the disk has died, see :mod:`viommu.virtio.undertaker`.

Source: virtio 1.2, 4.1.4.3 "Common configuration structure layout", 6 "Reserved
Feature Bits" (VIRTIO_F_ACCESS_PLATFORM).
"""

from __future__ import annotations

from typing import Any, Final

from viommu.pci.layout import overlay
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.virtio.structures import Structure, find_virtio, is_disk

__all__ = ["BehindIommu"]

_LAYOUT: Any = spec.CommonCfg
_WORD: Final = 4
_OFFERED_SELECT: Final[int] = _LAYOUT.device_feature_select.offset
_OFFERED: Final[int] = _LAYOUT.device_feature.offset
_ACCEPTED_SELECT: Final[int] = _LAYOUT.driver_feature_select.offset
_ACCEPTED: Final[int] = _LAYOUT.driver_feature.offset
_NO_STRUCTURE: Final = Structure(0, 0, 0)


class BehindIommu:
    """Implements :class:`~viommu.endpoints.remote.companions.AccessFilter`.

    Does nothing for a device that isn't virtio, or offers ACCESS_PLATFORM itself.
    """

    def __init__(self) -> None:
        self._common = _NO_STRUCTURE
        self._hidden = 0
        self._selects = {_OFFERED_SELECT: 0, _ACCEPTED_SELECT: 0}
        self._offered: dict[int, int] = {}  # words of features, as the device says

    def follow(self, config: bytes) -> None:
        """Get to know the device by its configuration space."""
        self._common = find_virtio(config).get(spec.CfgType.COMMON, _NO_STRUCTURE)
        self._hidden = 1 << Feature.RING_PACKED if is_disk(config) else 0
        self._offered.clear()

    def seen(self, region: int, offset: int, data: bytes) -> bytes:
        """Return what the driver sees of what the device answered to a read."""
        at = self._common.offset_of(region, offset, len(data))
        if at is None or not _covers(at, data, _OFFERED):
            return data
        word = self._selects[_OFFERED_SELECT]
        offered = _take(at, data, _OFFERED)
        self._offered[word] = offered
        features = (offered << 32 * word | 1 << Feature.ACCESS_PLATFORM) & ~self._hidden
        return _replace(at, data, _OFFERED, features >> 32 * word & 0xFFFFFFFF)

    def passed(self, region: int, offset: int, data: bytes) -> bytes:
        """Return what the device gets of what the driver writes."""
        at = self._common.offset_of(region, offset, len(data))
        if at is None:
            return data
        for select in self._selects:
            if _covers(at, data, select):
                self._selects[select] = min(_take(at, data, select), 4)
        if not _covers(at, data, _ACCEPTED):
            return data
        word = self._selects[_ACCEPTED_SELECT]
        accepted = _take(at, data, _ACCEPTED) << 32 * word
        added = 1 << Feature.ACCESS_PLATFORM & ~(self._offered.get(word, -1) << 32 * word)
        return _replace(at, data, _ACCEPTED, (accepted & ~added) >> 32 * word & 0xFFFFFFFF)


def _covers(at: int, data: bytes, register: int) -> bool:
    return at <= register and register + _WORD <= at + len(data)


def _take(at: int, data: bytes, register: int) -> int:
    return int.from_bytes(data[register - at : register - at + _WORD], "little")


def _replace(at: int, data: bytes, register: int, value: int) -> bytes:
    changed = bytearray(data)
    overlay(changed, at, register, value.to_bytes(_WORD, "little"))
    return bytes(changed)
