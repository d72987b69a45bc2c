"""What a device in another process says of itself, and what of it can be said to a VMM."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from viommu.deferred import Deferred, all_done
from viommu.endpoints.remote.access import read_region
from viommu.errors import PeerError, ViommuError
from viommu.pci.layout import BarPlace, ConfigLayout, mappable_areas
from viommu.spec import pci, vfio
from viommu.spec.virtio_pci import CfgType
from viommu.vfio_user import IrqInfo, RegionInfo, requests
from viommu.vfio_user.connection import close_fds
from viommu.virtio.structures import find_virtio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.vfio_user.loop_client import LoopClient
    from viommu.vfio_user.requests import DeviceInfo

__all__ = ["Description", "read_description"]

T = TypeVar("T")

_CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
_ASKED: Final = (*range(vfio.PCI_NUM_BARS), _CONFIG)  # QEMU's list: others may not be answered
_NO_REGION: Final = RegionInfo(0, 0)
_NO_IRQ: Final = IrqInfo(0, 0)
# What PCI has at most of INTx, MSI, MSI-X, and of VFIO's two kinds, whatever a device says:
# somebody would have to go through them.
_MAX_IRQS: Final = (1, pci.MSI_MAX_VECTORS, pci.MSIX_MAX_VECTORS, 1, 1)
_READ_WRITE: Final = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE

_KIND: Final = 0x7F  # of header: without the bit for several functions

# What tells one device from another; half-open ranges of configuration space.
_IDENTITY: Final = (
    ("vendor and device", pci.VENDOR_ID, pci.COMMAND),
    ("revision and class", pci.REVISION_ID, pci.CACHE_LINE_SIZE),
    ("header type", pci.HEADER_TYPE, pci.HEADER_TYPE + 1),
    ("subsystem", pci.SUBSYSTEM_VENDOR_ID, pci.ROM_ADDRESS),
    ("interrupt pin", pci.INTERRUPT_PIN, pci.INTERRUPT_PIN + 1),
)


class Description:
    """A device as it is now; its files are owned, and given back by :meth:`close`.

    ``config`` is the beginning of configuration space, 256 bytes. Regions and
    interrupts that a PCI device has and this one doesn't are there, and empty.
    """

    def __init__(
        self,
        info: DeviceInfo,
        regions: dict[int, RegionInfo],
        irqs: dict[int, IrqInfo],
        config: bytes,
    ) -> None:
        self.can_reset = bool(info.flags & vfio.DEVICE_FLAGS_RESET)
        self.regions = [regions.get(index, _NO_REGION) for index in range(vfio.PCI_NUM_REGIONS)]
        kinds = [irqs.get(index, _NO_IRQ) for index in range(vfio.PCI_NUM_IRQS)]
        self.irqs = [
            IrqInfo(min(irq.count, most), irq.flags)
            for irq, most in zip(kinds, _MAX_IRQS, strict=True)
        ]
        self.config = config
        self.layout = ConfigLayout(config)
        self._not_mappable = (*self.layout.msix, *_followed(config))
        self.config_size = (
            pci.CONFIG_SPACE_SIZE
            if regions[_CONFIG].size >= pci.CONFIG_SPACE_SIZE
            else pci.LEGACY_CONFIG_SPACE_SIZE
        )

    def region_info(self, index: int, *, mappable: bool) -> RegionInfo:
        """Describe a region to a VMM: its BARs and configuration space, nothing else.

        What it may map are whole pages that lie in the file and hold nothing that
        somebody between has to see, such as MSI-X's table; if not ``mappable``, nothing.
        """
        if index == _CONFIG:
            return RegionInfo(self.config_size, _READ_WRITE)
        theirs = self.regions[index]
        if index >= vfio.PCI_NUM_BARS or not theirs.size:
            return _NO_REGION
        flags = theirs.flags & _READ_WRITE
        areas = self._mappable_areas(index) if mappable else ()
        if not areas:
            return RegionInfo(theirs.size, flags)
        whole = areas == ((0, theirs.size),)
        flags |= vfio.REGION_INFO_FLAG_MMAP
        return RegionInfo(theirs.size, flags, theirs.fd, theirs.offset, () if whole else areas)

    def change(self, other: Description) -> str | None:
        """Return in what ``other`` differs, so that a guest can't go on with it."""
        for what, start, end in _IDENTITY:
            before, now = self.config[start:end], other.config[start:end]
            if before != now:
                return f"its {what} is {now.hex()}, it was {before.hex()}"
        for index in range(vfio.PCI_NUM_REGIONS):
            had, has = self.regions[index].size, other.regions[index].size
            if had != has:
                return f"its region {index} has {has} bytes, it had {had}"
        for index in range(vfio.PCI_NUM_IRQS):
            had, has = self.irqs[index].count, other.irqs[index].count
            if had != has:
                return f"it has {has} interrupts of kind {index}, it had {had}"
        if self.layout != other.layout:
            return f"its capabilities are {other.layout}, they were {self.layout}"
        return None

    def other_file(self, other: Description) -> int | None:
        """Return a BAR that a VMM may have mapped, and that is not the same memory in ``other``."""
        for index in range(vfio.PCI_NUM_BARS):
            before = self.region_info(index, mappable=True)
            if before.fd is None:
                continue
            now = other.region_info(index, mappable=True)
            if now._replace(fd=before.fd) != before or now.fd is None:
                return index
            if not os.path.sameopenfile(before.fd, now.fd):
                return index
        return None

    def close(self) -> None:
        """Close the files of regions; closing twice is harmless."""
        close_fds([info.fd for info in self.regions if info.fd is not None])
        self.regions = [info._replace(fd=None) for info in self.regions]

    def _mappable_areas(self, index: int) -> tuple[tuple[int, int], ...]:
        info = self.regions[index]
        inside = [area for area in info.areas if sum(area) <= info.size]
        if info.fd is None or (info.areas and not inside):
            return ()
        found = mappable_areas(index, info._replace(areas=tuple(inside)), self._not_mappable)
        status = os.fstat(info.fd)
        if stat.S_ISREG(status.st_mode):
            # Memory behind the end of a file would end the VMM with a signal.
            found = tuple(area for area in found if info.offset + sum(area) <= status.st_size)
        return found


def read_description(client: LoopClient) -> Deferred[Description]:
    """Ask a device for everything that a VMM may ask.

    Refused with PeerError if it can't be served as a PCI device. A BAR or a kind of
    interrupt that it doesn't want to describe is one that it hasn't.
    """
    reader = _Reader(client)
    client.submit(requests.device_info()).then(reader.take_info)
    return reader.found


class _Reader:
    """Asks in three rounds: how many there are of what, what they are, and the configuration."""

    def __init__(self, client: LoopClient) -> None:
        self.found: Deferred[Description] = Deferred()
        self._client = client
        self._info: DeviceInfo
        self._regions: dict[int, RegionInfo] = {}
        self._irqs: dict[int, IrqInfo] = {}

    def take_info(self, answer: Deferred[DeviceInfo]) -> None:
        try:
            self._info = answer.result()
        except ViommuError as error:
            self._give_up(error)
            return
        if not self._info.flags & vfio.DEVICE_FLAGS_PCI or self._info.num_regions <= _CONFIG:
            self._give_up(_unusable(f"{self._info} is no PCI device"))
            return
        regions = {index: self._client.region_info(index) for index in _ASKED}
        count = min(self._info.num_irqs, vfio.PCI_NUM_IRQS)
        irqs = {index: self._client.submit(requests.irq_info(index)) for index in range(count)}
        for index, region in regions.items():
            region.then(partial(_keep, self._regions, index))
        for index, irq in irqs.items():
            irq.then(partial(_keep, self._irqs, index))
        all_done([*regions.values(), *irqs.values()]).then(self._read_config)

    def _read_config(self, _: object) -> None:
        size = self._regions.get(_CONFIG, _NO_REGION).size
        if size < pci.LEGACY_CONFIG_SPACE_SIZE:
            # If the connection is gone, why it is says more.
            why = self._client.ended or _unusable(f"{size} bytes of configuration space")
            self._give_up(why)
            return
        config = read_region(self._client, _CONFIG, 0, pci.LEGACY_CONFIG_SPACE_SIZE)
        config.then(self._take_config)

    def _take_config(self, answer: Deferred[bytes]) -> None:
        try:
            config = answer.result()
        except ViommuError as error:
            self._give_up(error)
            return
        if config[:2] == b"\xff\xff" or config[pci.HEADER_TYPE] & _KIND != pci.HEADER_TYPE_NORMAL:
            self._give_up(_unusable(f"its configuration begins with {config[:16].hex(' ')}"))
            return
        for index in range(vfio.PCI_NUM_BARS):
            size = self._regions.get(index, _NO_REGION).size
            if size & (size - 1):  # QEMU exits
                self._give_up(_unusable(f"BAR {index} has {size:#x} bytes, no power of two"))
                return
        self.found.resolve(Description(self._info, self._regions, self._irqs, config))

    def _give_up(self, error: ViommuError) -> None:
        close_fds([info.fd for info in self._regions.values() if info.fd is not None])
        self.found.refuse(error)


def _followed(config: bytes) -> Iterator[BarPlace]:
    """Yield where a driver of a virtio device does what others than the device must know of.

    Notifications are not among that: they come in any number, and can do without.
    """
    for kind, structure in find_virtio(config).items():
        if kind is not CfgType.NOTIFY:
            yield BarPlace(*structure)


def _keep(table: dict[int, T], index: int, answer: Deferred[T]) -> None:
    try:
        table[index] = answer.result()
    except ViommuError:
        return  # _read_config finds out whether it can do without


def _unusable(why: str) -> PeerError:
    return PeerError(errno.EPROTO, f"the device can't be used: {why}")
