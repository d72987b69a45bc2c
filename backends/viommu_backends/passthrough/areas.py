"""The parts of a host device's BARs that others may map, and who does.

They are mapped from the device's own file, as the kernel lays it out: by the VMM,
for the guest's CPUs, and for the DMA of other devices.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.errors import PeerError
from viommu.memory.mmap_table import MmapTable
from viommu.pci.layout import mappable_areas
from viommu.spec import vfio
from viommu_backends.bar_file import BarFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from viommu.memory.mmap_table import MmapArea, MmapMapping, MmapOwner
    from viommu.pci.layout import BarPlace
    from viommu_backends.vfio_device import VfioDevice

__all__ = ["BarAreas"]

_log: Final = logging.getLogger(__name__)


class BarAreas:
    """What is offered of ``device``'s BARs, without the pages in ``taken``.

    Nobody tells when a VMM maps or unmaps what it was offered, so it counts as mapped
    from :meth:`connect` to :meth:`disconnect`.

    Raises:
        PeerError: EEXIST, the kernel names the same pages twice.
    """

    def __init__(self, device: VfioDevice, taken: Iterable[BarPlace]) -> None:
        self._device = device
        self._table = MmapTable()
        self._bars: list[MmapOwner] = []
        self._by_vmm: list[MmapMapping] = []
        self._files: dict[MmapArea, _AreaFile] = {}
        taken = tuple(taken)
        for bar, host in enumerate(device.regions[: vfio.PCI_NUM_BARS]):
            owner = self._table.add_owner(f"BAR {bar}")
            for start, size in mappable_areas(bar, host, taken):
                self._table.offer(owner, start, size, offset=host.offset + start)
            self._bars.append(owner)

    def of(self, bar: int) -> Sequence[MmapArea]:
        """Return the areas of a BAR: from ``base`` in it, at ``offset`` of the device's file."""
        return self._bars[bar].areas

    def memory(self, area: MmapArea) -> BarFile:
        """Return the file for the DMA of others to an area, with a use that is the caller's.

        Raises:
            PeerError: EBADF, nothing is offered any more; or the device's file can't
                be duplicated.
        """
        file = self._files.get(area)
        if file is not None and file.uses:
            # The same one: a device that didn't let go of it need not map it again.
            return file.retain()
        mapping = self._table.map(area.offset, area.length)
        try:
            file = self._files[area] = _AreaFile(self._device, mapping)
        except BaseException:
            mapping.unmap()
            raise
        return file

    def connect(self) -> None:
        """Expect a VMM to map everything that is offered."""
        self._by_vmm = [self._table.map(a.offset, a.length) for a in self._table.areas()]

    def disconnect(self) -> None:
        """Expect the VMM to have unmapped everything."""
        for mapping in self._by_vmm:
            mapping.unmap()
        self._by_vmm.clear()

    def holders(self) -> dict[str, list[str]]:
        """Return who may have mapped some of a BAR, by its number."""
        held: dict[str, list[str]] = {}
        for bar, owner in enumerate(self._bars):
            vmm = any(mapping.area.owner is owner for mapping in self._by_vmm)
            dma = any(file.uses for area, file in self._files.items() if area.owner is owner)
            if owner.users:
                held[str(bar)] = [who for who, maps in (("VMM", vmm), ("DMA", dma)) if maps]
        return held

    def close(self) -> None:
        """Offer nothing any more, whoever has mapped what; closing twice is harmless.

        The kernel keeps the device in use for those who have: that is logged.
        """
        if self._table.closed:
            return
        held = self.holders()
        busy: list[str] = []
        for bar, owner in enumerate(self._bars):
            try:
                self._table.destroy(owner)
            except PeerError:
                busy.append(f"BAR {bar} ({', '.join(held[str(bar)])})")
        self._table.close()
        if busy:
            what = ", ".join(busy)
            _log.warning("%s: in use as long as somebody maps %s", self._device.name, what)


class _AreaFile(BarFile):
    """The device's file for those who map one area, which they let go of with its last use."""

    def __init__(self, device: VfioDevice, mapping: MmapMapping) -> None:
        super().__init__(device)
        self._mapping = mapping

    def _free(self) -> None:
        super()._free()
        self._mapping.unmap()
