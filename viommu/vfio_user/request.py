"""One command of a vfio-user client: what to send, and how to read the reply. No I/O.

:mod:`~viommu.vfio_user.requests` and :mod:`~viommu.vfio_user.ioas_requests` make them.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

from viommu.errors import PeerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.vfio_user.protocol import Capabilities, Message

__all__ = ["Request", "at_most", "exactly", "nonsense", "order", "pack"]

T = TypeVar("T")


class Request(NamedTuple, Generic[T]):
    """One command, and how its reply becomes a ``T``.

    ``fds`` go with it and stay the caller's. A reply that is no error may bring up
    to ``max_fds``; ``decode`` takes those that it keeps out of ``message.fds``, and
    raises PeerError when the reply is nonsense. ``transfer`` is how many bytes of
    data there are in the request or the reply, besides their fixed parts. ``needs``
    is the capability without which a server doesn't know the command as it is.
    """

    command: int
    payload: bytes
    decode: Callable[[Message], T]
    fds: tuple[int, ...] = ()
    max_fds: int = 0
    transfer: int = 0
    needs: Literal["", "fixed_iova", "iommufd", "write_multiple"] = ""

    def check(self, theirs: Capabilities) -> None:
        """Compare with what the device can take.

        Raises:
            UsageError: It can't take this, and would end the connection or worse.
        """
        if self.transfer > theirs.max_data_xfer_size:
            limit = theirs.max_data_xfer_size
            raise UsageError(
                f"{self.transfer} bytes can't be transferred, the server takes {limit}"
            )
        if len(self.fds) > theirs.max_msg_fds:
            limit = theirs.max_msg_fds
            raise UsageError(f"{len(self.fds)} file descriptors, the server takes {limit}")
        if self.needs and not getattr(theirs, self.needs):
            raise UsageError(f"the server has no {self.needs}, command {self.command} needs it")


def order(
    command: int,
    payload: bytes,
    fds: tuple[int, ...] = (),
    *,
    transfer: int = 0,
    needs: Literal["", "iommufd"] = "",
) -> Request[None]:
    """Return a request whose reply says nothing but that it was done."""
    limit = len(payload)

    def decode(message: Message) -> None:
        at_most(message, limit)

    return Request(command, payload, decode, fds, transfer=transfer, needs=needs)


def pack(codec: struct.Struct, *values: int | bytes) -> bytes:
    """Return a payload.

    Raises:
        UsageError: A number that no message can hold.
    """
    try:
        return codec.pack(*values)
    except struct.error as error:
        raise UsageError(f"{values} can't be sent: {error}") from error


def exactly(message: Message, size: int) -> bytes:
    """Return the payload of a reply, which must have ``size`` bytes."""
    if len(message.payload) != size:
        raise nonsense(f"it has {len(message.payload)} bytes instead of {size}")
    return message.payload


def at_most(message: Message, size: int) -> bytes:
    """Return the payload of a reply, for which there are ``size`` bytes of room."""
    if len(message.payload) > size:
        raise nonsense(f"it has {len(message.payload)} bytes, {size} were accepted")
    return message.payload


def nonsense(why: str) -> PeerError:
    """Return the error that a reply can't be, which ends the connection."""
    return PeerError(errno.EPROTO, why)
