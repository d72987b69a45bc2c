"""Reads and writes of a region of a device, in as many messages as it needs."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, TypeVar

from viommu.deferred import Deferred, all_done
from viommu.errors import PeerError, ViommuError
from viommu.vfio_user import requests

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.vfio_user.loop_client import LoopClient

__all__ = ["read_region", "write_region"]

T = TypeVar("T")

# For one access. As many as configuration space has bytes, for a device that takes one
# at a time; what a VMM may ask for at once, 1 MiB, would keep the loop busy for seconds.
_MAX_MESSAGES: Final = 4096


def read_region(client: LoopClient, index: int, offset: int, count: int) -> Deferred[bytes]:
    """Read ``count`` bytes; refused as a whole when one message is.

    It is refused with E2BIG, and nothing is sent, if it needs too many messages.
    """
    if _is_too_much(client, count):
        return _refused(count)
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
    """Write ``data``; refused when one message is, though others are not, or as a read."""
    if _is_too_much(client, len(data)):
        return _refused(len(data))
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


def _step(client: LoopClient) -> int:
    return max(1, client.capabilities.max_data_xfer_size)


def _is_too_much(client: LoopClient, count: int) -> bool:
    return count > _MAX_MESSAGES * _step(client)


def _refused(count: int) -> Deferred[T]:
    refused: Deferred[T] = Deferred()
    refused.refuse(PeerError(errno.E2BIG, f"{count} bytes in more than {_MAX_MESSAGES} messages"))
    return refused


def _pieces(client: LoopClient, offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of what goes into one message."""
    step = _step(client)
    for start in range(offset, offset + count, step):
        yield start, min(step, offset + count - start)
