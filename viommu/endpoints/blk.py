"""``blk``: a virtio-blk disk on a file, behind the IOMMU.

Source: virtio 1.2, 5.2 "Block Device". One request queue; cache mode write-back
with FLUSH, write-through for a driver without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from viommu.endpoints.blk_requests import BlkLimits, BlkRequests
from viommu.endpoints.disk_file import DiskFile
from viommu.errors import UsageError
from viommu.spec import virtio_blk as spec
from viommu.spec.virtio_blk import Feature, RequestType
from viommu.virtio.device import VirtioDevice
from viommu.virtio.runner import QueueRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.endpoints.dma import EndpointDma
    from viommu.loop import Loop
    from viommu.pci.function import ResetKind
    from viommu.virtio.device import Transport
    from viommu.virtio.ring import SplitQueue

__all__ = ["BlkDevice"]

_CLASS_SCSI_STORAGE: Final = 0x010000  # what QEMU's virtio-blk-pci says it is

_QUEUE_SIZE: Final = 128

# Requests handled before others have their turn; each may move megabytes.
_BUDGET: Final = 16

# Everything up to the secure erase fields, which belong to a feature we don't have.
_CONFIG_SIZE: Final = 60

# Guests align partitions and file system blocks to pages of the host's cache.
_PAGE_EXPONENT: Final = 3
_PAGE_SECTORS: Final = 1 << _PAGE_EXPONENT

_ALWAYS: Final = (
    Feature.SIZE_MAX,
    Feature.SEG_MAX,
    Feature.BLK_SIZE,
    Feature.TOPOLOGY,
    Feature.FLUSH,
)
_OPTIONAL: Final = {
    Feature.DISCARD: RequestType.DISCARD,
    Feature.WRITE_ZEROES: RequestType.WRITE_ZEROES,
}


class BlkDevice(VirtioDevice):
    """A disk whose every access to memory goes through ``dma``.

    The image stays open and locked until :meth:`close`; its size is the disk's.
    ``serial`` is what GET_ID answers, by default the file's name; at most 20
    ASCII characters.

    Raises:
        UsageError: The image can't be used, see
            :class:`~viommu.endpoints.disk_file.DiskFile`, or ``serial`` can't.
    """

    device_type = spec.DEVICE_ID
    class_code = _CLASS_SCSI_STORAGE
    queue_sizes: tuple[int, ...] = (_QUEUE_SIZE,)
    behind_iommu = True
    config_size = _CONFIG_SIZE

    def __init__(
        self,
        path: Path | str,
        dma: EndpointDma,
        loop: Loop,
        *,
        read_only: bool = False,
        serial: str | None = None,
        limits: BlkLimits = BlkLimits(),  # noqa: B008 - a constant: it can't be changed
    ) -> None:
        path = Path(path)
        identifier = _identifier(path, serial)
        self.disk = DiskFile(path, read_only=read_only)
        self.features = _mask((*_ALWAYS, *((Feature.RO,) if read_only else _OPTIONAL)))
        self._dma = dma
        self._loop = loop
        self._requests = BlkRequests(self.disk, dma, identifier, limits)
        self._config = bytes(_configuration(self.disk.size, limits))[:_CONFIG_SIZE]
        self._runner: QueueRunner | None = None
        self._scheduled = False

    def read_config(self, offset: int, size: int) -> bytes:
        """Return device configuration; nothing of it is ever changed."""
        return self._config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore a write: no field is writable without CONFIG_WCE."""

    def start(
        self, transport: Transport, features: int, queues: Sequence[SplitQueue | None]
    ) -> None:
        """Serve a driver with the features that it accepted."""
        self._requests.configure(
            write_through=not features >> Feature.FLUSH & 1,
            optional=frozenset(
                kind for feature, kind in _OPTIONAL.items() if features >> feature & 1
            ),
        )
        queue = queues[spec.REQUEST_QUEUE]
        if queue is not None:
            self._runner = QueueRunner(queue, transport, self._requests.handle)

    def notify(self, index: int) -> None:
        """Carry out requests, a bounded number in one turn of the loop."""
        del index
        if not self._scheduled:
            self._serve()

    def reset(self, kind: ResetKind) -> bool:
        """Forget the driver; no request is ever left unfinished, so this is done at once."""
        del kind
        self._runner = None
        self._dma.drop_views()
        return True

    def on_bus_master(self, *, enabled: bool) -> None:
        """Open or close the DMA port."""
        self._dma.enabled = enabled

    def close(self) -> None:
        """Close the image, which unlocks it; closing twice is harmless."""
        self.disk.close()

    def _serve(self) -> None:
        self._scheduled = self._runner is not None and self._runner.serve(_BUDGET)
        if self._scheduled:
            self._loop.call_soon(self._serve)


def _configuration(size: int, limits: BlkLimits) -> spec.Config:
    return spec.Config(
        capacity=size // spec.SECTOR_SIZE,
        size_max=limits.segment_size,
        seg_max=limits.segments,
        blk_size=spec.SECTOR_SIZE,
        physical_block_exp=_PAGE_EXPONENT,
        min_io_size=_PAGE_SECTORS,
        num_queues=1,
        max_discard_sectors=limits.discard_sectors,
        max_discard_seg=limits.discard_segments,
        discard_sector_alignment=_PAGE_SECTORS,
        max_write_zeroes_sectors=limits.zero_sectors,
        max_write_zeroes_seg=limits.zero_segments,
        write_zeroes_may_unmap=1,
    )


def _identifier(path: Path, serial: str | None) -> bytes:
    if serial is None:
        return path.name.encode("ascii", "replace")[: spec.ID_SIZE]
    if not serial.isascii() or not serial.isprintable() or len(serial) > spec.ID_SIZE:
        raise UsageError(
            f"serial {serial!r} is not up to {spec.ID_SIZE} printable ASCII characters"
        )
    return serial.encode()


def _mask(features: Sequence[Feature]) -> int:
    return sum(1 << feature for feature in features)
