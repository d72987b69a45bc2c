"""What one virtio-blk request does: from a descriptor chain to a used length.

Header, segments and status are reached by DMA; data goes straight between the
file and the exported guest memory. Everything a request touches is exported,
and every range checked, before the first byte moves.

Source: virtio 1.2, 5.2.6 "Device Operation".
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import Access, ExportError, GuestMemoryError, TranslationFault
from viommu.spec.virtio_blk import (
    HEADER,
    ID_SIZE,
    SECTOR_SIZE,
    SEGMENT,
    STATUS_SIZE,
    WRITE_ZEROES_F_UNMAP,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.endpoints.disk_file import DiskFile
    from viommu.endpoints.dma import EndpointDma
    from viommu.virtio.ring import Chain

__all__ = ["BlkLimits", "BlkRequests"]

_log = logging.getLogger(__name__)

_DMA_ERRORS: Final = (TranslationFault, GuestMemoryError, ExportError)


class BlkLimits(NamedTuple):
    """What one request may ask for; the configuration space tells the driver.

    ``segment_size`` and ``segments`` bound the data of a read or write: the file
    is read and written in the loop, where a longer request would keep others
    waiting. Zeroes may have to be written out, so ``zero_sectors`` is of that order.
    """

    segment_size: int = 128 << 10
    segments: int = 126
    discard_sectors: int = (1 << 30) // SECTOR_SIZE
    discard_segments: int = 16
    zero_sectors: int = (16 << 20) // SECTOR_SIZE
    zero_segments: int = 1


class _RequestError(Exception):
    """A request that ends with this status and has changed nothing."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class _Request(NamedTuple):
    sector: int
    payload: list[tuple[int, int]]  # device-readable after the header: (address, size)
    buffer: list[tuple[int, int]]  # device-writable before the status
    exports: ExitStack


class BlkRequests:
    """Carries requests out on ``disk``, reaching memory through ``dma`` only.

    ``serial`` is what GET_ID answers, at most 20 bytes.
    """

    def __init__(
        self,
        disk: DiskFile,
        dma: EndpointDma,
        serial: bytes,
        limits: BlkLimits,
    ) -> None:
        self._disk = disk
        self._dma = dma
        self._serial = serial.ljust(ID_SIZE, b"\0")
        self._limits = limits
        self._logged: set[int | None] = set()
        self.configure(write_through=True, optional=frozenset())

    def configure(self, *, write_through: bool, optional: frozenset[RequestType]) -> None:
        """Follow the features that the driver accepted.

        ``write_through`` makes every write stable before it completes, as the device
        must when the driver has no FLUSH. ``optional`` are the request types whose
        feature was negotiated.
        """
        self._write_through = write_through
        self._optional = optional

    def handle(self, chain: Chain) -> int:
        """Carry one request out and return its used length.

        The used length counts what was written from the start of the writable
        part without a gap. It is 0 when the header or the status byte can't be
        reached: nothing was done then.
        """
        buffer_size = chain.writable_size - STATUS_SIZE
        if buffer_size < 0:
            return 0
        with ExitStack() as exports:
            try:
                kind, sector = self._header(chain)
                (status,) = self._export(
                    exports, _cut(chain.writable, buffer_size, STATUS_SIZE), Access.WRITE
                )
            except _DMA_ERRORS:
                return 0
            request = _Request(
                sector,
                _cut(chain.readable, HEADER.size, chain.readable_size - HEADER.size),
                _cut(chain.writable, 0, buffer_size),
                ExitStack(),
            )
            status[0], written = self._attempt(kind, request)
        return written + STATUS_SIZE if written == buffer_size else written

    def _header(self, chain: Chain) -> tuple[int | None, int]:
        if chain.readable_size < HEADER.size:
            return None, 0
        kind, sector = HEADER.unpack(self._gather(_cut(chain.readable, 0, HEADER.size)))
        return kind, sector

    def _attempt(self, kind: int | None, request: _Request) -> tuple[Status, int]:
        """Return the status and how much of the buffer was written."""
        try:
            # What was exported is released before the status says that all went well:
            # memory that is reached by messages is written then, and may fail.
            with request.exports:
                written = self._execute(kind, request)
        except _RequestError as error:
            return error.status, 0
        except _DMA_ERRORS:
            return Status.IOERR, 0
        except OSError as error:
            # A host that is out of space fails every write: say it once.
            if error.errno not in self._logged:
                self._logged.add(error.errno)
                _log.error("%s: I/O error: %s", self._disk.path, error.strerror)
            return Status.IOERR, 0
        return Status.OK, written

    def _execute(self, kind: int | None, request: _Request) -> int:
        match kind:
            case RequestType.IN:
                return self._read(request)
            case RequestType.OUT:
                self._write(request)
            case RequestType.FLUSH:
                self._disk.flush()
            case RequestType.GET_ID:
                return self._get_id(request)
            case RequestType.DISCARD if kind in self._optional:
                self._discard(request)
            case RequestType.WRITE_ZEROES if kind in self._optional:
                self._write_zeroes(request)
            case None:  # no room for a header
                raise _RequestError(Status.IOERR)
            case _:
                raise _RequestError(Status.UNSUPP)
        return 0

    def _read(self, request: _Request) -> int:
        offset, size = self._data_extent(request.sector, request.buffer)
        views = self._export(request.exports, request.buffer, Access.WRITE)
        self._disk.read_into(views, offset)
        return size

    def _write(self, request: _Request) -> None:
        # "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request
        # if the VIRTIO_BLK_F_RO feature if offered, and MUST NOT write any data."
        if self._disk.read_only:
            raise _RequestError(Status.IOERR)
        offset, _ = self._data_extent(request.sector, request.payload)
        views = self._export(request.exports, request.payload, Access.READ)
        self._disk.write_from(views, offset)
        self._stabilize()

    def _get_id(self, request: _Request) -> int:
        views = self._export(request.exports, _cut(request.buffer, 0, ID_SIZE), Access.WRITE)
        written = 0
        for view in views:
            view[:] = self._serial[written : written + len(view)]
            written += len(view)
        return written

    def _discard(self, request: _Request) -> None:
        limits = self._limits
        extents = self._segments(request, limits.discard_segments, limits.discard_sectors, flags=0)
        for offset, size, _ in extents:
            self._disk.discard(offset, size)

    def _write_zeroes(self, request: _Request) -> None:
        limits = self._limits
        extents = self._segments(
            request, limits.zero_segments, limits.zero_sectors, flags=WRITE_ZEROES_F_UNMAP
        )
        for offset, size, unmap in extents:
            self._disk.write_zeroes(offset, size, unmap=bool(unmap))
        self._stabilize()

    def _segments(
        self, request: _Request, max_segments: int, max_sectors: int, *, flags: int
    ) -> list[tuple[int, int, int]]:
        """Return (offset, size, flags) of every segment, all of them checked."""
        size = _total(request.payload)
        if not size or size % SEGMENT.size or size > max_segments * SEGMENT.size:
            raise _RequestError(Status.IOERR)
        segments = list(SEGMENT.iter_unpack(self._gather(request.payload)))
        # "The device MUST set the status byte to VIRTIO_BLK_S_UNSUPP [...] if any unknown
        # flag is set", and for a discard with ``unmap``.
        if any(found & ~flags for _, _, found in segments):
            raise _RequestError(Status.UNSUPP)
        extents = []
        for sector, count, found in segments:
            if count > max_sectors:
                raise _RequestError(Status.IOERR)
            extents.append((*self._extent(sector, count * SECTOR_SIZE), found))
        return extents

    def _data_extent(self, sector: int, pieces: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return where on the disk the data of a read or write belongs."""
        size = _total(pieces)
        if size > self._limits.segments * self._limits.segment_size:
            raise _RequestError(Status.IOERR)
        return self._extent(sector, size)

    def _extent(self, sector: int, size: int) -> tuple[int, int]:
        """Return offset and size in bytes of a range of the disk, if it is one."""
        offset = sector * SECTOR_SIZE
        if size % SECTOR_SIZE or offset + size > self._disk.size:
            raise _RequestError(Status.IOERR)
        return offset, size

    def _stabilize(self) -> None:
        if self._write_through:
            self._disk.flush()

    def _gather(self, pieces: Sequence[tuple[int, int]]) -> bytes:
        return b"".join([self._dma.read(address, size) for address, size in pieces])

    def _export(
        self, exports: ExitStack, pieces: Sequence[tuple[int, int]], access: Access
    ) -> list[memoryview]:
        """Export every piece until ``exports`` is closed and return their views in order."""
        views: list[memoryview] = []
        for address, size in pieces:
            region = exports.enter_context(self._dma.export(address, size, access))
            views += region.views()
        return views


def _cut(pieces: Sequence[tuple[int, int]], offset: int, size: int) -> list[tuple[int, int]]:
    """Return ``[offset, offset + size)`` of the concatenated pieces, neighbours merged.

    A driver's buffers are often contiguous IOVAs: merged they are one export.
    """
    cut: list[tuple[int, int]] = []
    end = offset + size
    base = 0
    for address, length in pieces:
        low, high = max(offset, base), min(end, base + length)
        if low < high:
            start = address + low - base
            if cut and cut[-1][0] + cut[-1][1] == start:
                cut[-1] = (cut[-1][0], cut[-1][1] + high - low)
            else:
                cut.append((start, high - low))
        base += length
    return cut


def _total(pieces: Sequence[tuple[int, int]]) -> int:
    return sum(size for _, size in pieces)
