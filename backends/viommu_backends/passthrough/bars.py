"""The BARs of a host device, where they are in guest memory.

A BAR that the guest has placed is a region of guest memory, so other devices
reach it: peer-to-peer DMA. Ranges are half-open.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.errors import BackendError, PeerError
from viommu.memory.dma_target import AddressRange, MemoryKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from viommu.memory.region import Region
    from viommu.memory.regions import RegionManager
    from viommu_backends.passthrough.areas import BarAreas
    from viommu_backends.vfio_device import HostRegion

__all__ = ["BarRegions"]

_log: Final = logging.getLogger(__name__)


class BarRegions:
    """The placed BARs of one device as regions of ``manager``.

    Args:
        name: What messages call the device.
        host: What the kernel says of each BAR.
        areas: What may be mapped of them.
        manager: Who tells other devices.
    """

    def __init__(
        self,
        name: str,
        host: Sequence[HostRegion],
        areas: BarAreas,
        manager: RegionManager,
    ) -> None:
        self._name = name
        self._host = host
        self._areas = areas
        self._manager = manager
        self._placed: dict[int, Region] = {}

    @property
    def placed(self) -> dict[int, int]:
        """The guest physical address of every BAR that others can reach."""
        return {bar: region.where.start for bar, region in self._placed.items()}

    def keep(self, wanted: Mapping[int, int]) -> None:
        """Take away every BAR that ``wanted`` has not at the same address.

        A device that can't be made to let go of it is logged: the BAR's file stays
        open until it does.
        """
        for bar, region in list(self._placed.items()):
            if wanted.get(bar) == region.where.start:
                continue
            del self._placed[bar]
            try:
                self._manager.remove_region(region)
            except BackendError as error:
                _log.error("%s: a device can still reach BAR %d: %s", self._name, bar, error)

    def add(self, wanted: Mapping[int, int]) -> None:
        """Add the BARs of ``wanted``, by address, that aren't there.

        One that lies across other memory, or in pages that aren't its own, is logged
        and left out of the reach of other devices; the guest's CPU isn't affected.
        """
        for bar, address in wanted.items():
            if bar in self._placed or not self._areas.of(bar):
                continue
            try:
                self._placed[bar] = self._add(bar, address)
            except (BackendError, PeerError) as error:
                _log.warning("%s: no device can reach BAR %d: %s", self._name, bar, error)

    def _add(self, bar: int, address: int) -> Region:
        where = AddressRange(address, address + self._host[bar].size)
        name = f"BAR {bar} of {self._name}"
        region = self._manager.add_region(name, where, MemoryKind.DEVICE)
        try:
            for area in self._areas.of(bar):
                memory = self._areas.memory(area)
                try:
                    within = AddressRange(area.base, area.base + area.length)
                    self._manager.add_mapping(region, within, memory, area.offset)
                except BaseException:
                    memory.close()
                    raise
            self._manager.enable(region)
        except BaseException:
            self._manager.remove_region(region)
            raise
        return region
