"""Reads and writes of a region of a device, in as many messages as it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.deferred import Deferred, all_done
from viommu.errors import ViommuError
from viommu.vfio_user import requests

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.vfio_user.loop_client import LoopClient

__all__ = ["read_region", "write_region"]


def read_region(client: LoopClient, index: int, offset: int, count: int) -> Deferred[bytes]:
    """Read ``count`` bytes; refused as a whole when one message is."""
    pieces = [
        client.submit(requests.region_read(index, start, size))
        for start, size in _pieces(client, offset, count)
    ]
    if len(pieces) == 1:
        return pieces[0]
    whole: Deferred[bytes] = Deferred()

    def join(_: Deferred[None]) -> None:
        try:
            whole.resolve(b"".join(piece.result() for piece in pieces))
        except ViommuError as error:
            whole.refuse(error)

    all_done(pieces).then(join)
    return whole


def write_region(client: LoopClient, index: int, offset: int, data: bytes) -> Deferred[None]:
    """Write ``data``; refused when one message is, though others are not."""
    pieces = [
        client.submit(requests.region_write(index, start, data[start - offset :][:size]))
        for start, size in _pieces(client, offset, len(data))
    ]
    if len(pieces) == 1:
        return pieces[0]
    whole: Deferred[None] = Deferred()

    def join(_: Deferred[None]) -> None:
        try:
            for piece in pieces:
                piece.result()
        except ViommuError as error:
            whole.refuse(error)
        else:
            whole.resolve(None)

    all_done(pieces).then(join)
    return whole


def _pieces(client: LoopClient, offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of what goes into one message."""
    step = max(1, client.capabilities.max_data_xfer_size)
    for start in range(offset, offset + count, step):
        yield start, min(step, offset + count - start)
