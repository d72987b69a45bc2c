"""A guest's virtio-blk driver in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from viommu.errors import UsageError
from viommu.spec import virtio_blk as spec
from viommu.spec.virtio_blk import RequestType, Status
from viommu.testing.driver import DEFAULT_TIMEOUT, VirtioPciDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.testing.guest_ram import DmaSpace
    from viommu.vfio_user.client import Client

__all__ = ["BlkDriver", "BlkError"]

_UNWRITTEN: Final = 0xEE
_HEADER_AT: Final = 0
_STATUS_AT: Final = 64
_CONTROL_SIZE: Final = 128


class BlkError(Exception):
    """A request that did not succeed; ``status`` is ``None`` if it was not even written."""

    def __init__(self, kind: int, status: int | None) -> None:
        super().__init__(f"request of type {kind} ended with status {status}")
        self.kind = kind
        self.status = status


class BlkDriver:
    """Drives the disk behind ``client``, one request at a time.

    Rings and buffers come from ``dma``. :meth:`request` takes any addresses, also
    such as are not mapped; the other methods use buffers of their own and raise
    :exc:`BlkError` for a status other than OK.
    """

    def __init__(self, client: Client, dma: DmaSpace, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.dma = dma
        self.virtio = VirtioPciDriver(client, dma, timeout=timeout)
        if self.virtio.device_type != spec.DEVICE_ID:
            raise UsageError(f"a virtio device of type {self.virtio.device_type} is no disk")
        self.virtio.negotiate()
        self.queue = self.virtio.add_queue(spec.REQUEST_QUEUE)
        self._control = dma.allocate(_CONTROL_SIZE)
        self.virtio.start()

    @property
    def capacity(self) -> int:
        """The size of the disk in sectors of 512 bytes."""
        return int.from_bytes(self.virtio.device_config(0, 8), "little")

    def read(self, sector: int, count: int) -> bytes:
        """Read ``count`` sectors."""
        return self._read_buffer(RequestType.IN, sector, count * spec.SECTOR_SIZE)

    def write(self, sector: int, data: bytes) -> None:
        """Write whole sectors."""
        self._write_buffer(RequestType.OUT, sector, data)

    def flush(self) -> None:
        """Make what was written stable."""
        self._check(RequestType.FLUSH, self.request(RequestType.FLUSH))

    def get_id(self) -> str:
        """Return the serial number."""
        data = self._read_buffer(RequestType.GET_ID, 0, spec.ID_SIZE)
        return data.rstrip(b"\0").decode("ascii")

    def discard(self, sector: int, count: int) -> None:
        """Tell the disk that these sectors are not needed."""
        self._write_buffer(RequestType.DISCARD, 0, spec.SEGMENT.pack(sector, count, 0))

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        """Have sectors read as zeroes."""
        segment = spec.SEGMENT.pack(sector, count, spec.WRITE_ZEROES_F_UNMAP if unmap else 0)
        self._write_buffer(RequestType.WRITE_ZEROES, 0, segment)

    def request(
        self,
        kind: int,
        sector: int = 0,
        *,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
    ) -> int | None:
        """Carry one request out with these ``(address, length)`` data buffers.

        Returns the status, ``None`` if the device did not write it.
        """
        control, memory = self._control.address, self.dma.memory
        memory.write(control + _HEADER_AT, spec.HEADER.pack(kind, sector))
        memory.write(control + _STATUS_AT, bytes([_UNWRITTEN]))
        ticket = self.queue.add(
            [(control + _HEADER_AT, spec.HEADER.size), *readable],
            [*writable, (control + _STATUS_AT, spec.STATUS_SIZE)],
        )
        self.queue.kick()
        self.queue.wait(ticket)
        status = memory.read(control + _STATUS_AT, 1)[0]
        return None if status == _UNWRITTEN else status

    def close(self) -> None:
        """Stop the device's DMA and interrupts; memory that it has stays mapped."""
        self.virtio.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_buffer(self, kind: int, sector: int, size: int) -> bytes:
        buffer = self.dma.allocate(size)
        try:
            status = self.request(kind, sector, writable=[(buffer.address, size)])
            self._check(kind, status)
            return self.dma.memory.read(buffer.address, size)
        finally:
            self.dma.free(buffer)

    def _write_buffer(self, kind: int, sector: int, data: bytes) -> None:
        buffer = self.dma.allocate(len(data))
        try:
            self.dma.memory.write(buffer.address, data)
            status = self.request(kind, sector, readable=[(buffer.address, len(data))])
            self._check(kind, status)
        finally:
            self.dma.free(buffer)

    def _check(self, kind: int, status: int | None) -> None:
        if status != Status.OK:
            raise BlkError(kind, status)
