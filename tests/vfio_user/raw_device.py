"""The raw end of a device: a client is made to its socket, and sees any bytes that a test sends."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

import pytest

from viommu.errors import PeerError
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.vfio_user import LoopClient, requests
from viommu.vfio_user.connection import close_fds, receive, send
from viommu.vfio_user.protocol import Capabilities, Message, MessageReader, encode_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.deferred import Deferred
    from viommu.loop import Loop

THEIRS = Capabilities(8, write_multiple=True)


def reply_to(
    message: Message,
    payload: bytes = b"",
    *,
    ident: int | None = None,
    command: int | None = None,
    size: int | None = None,
    flags: int = spec.F_TYPE_REPLY,
    error: int = 0,
) -> bytes:
    """The reply to ``message``, with what is wrong with it."""
    return (
        spec.HEADER.pack(
            message.id if ident is None else ident,
            message.command if command is None else command,
            spec.HEADER_SIZE + len(payload) if size is None else size,
            flags,
            error,
        )
        + payload
    )


def error_to(message: Message, number: int, payload: bytes = b"") -> bytes:
    """The reply that ``message`` failed."""
    return reply_to(message, payload, flags=spec.F_TYPE_REPLY | spec.F_ERROR, error=number)


class RawDevice:
    """A client, and the other end of its socket."""

    def __init__(self, loop: Loop, **options: Any) -> None:
        self.loop = loop
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.reader = MessageReader()
        self.ends: list[PeerError] = []
        self.client = LoopClient(loop, ours, on_closed=self.ends.append, **options)
        self.hello = self.next()

    def turn(self, count: int = 3) -> None:
        for _ in range(count):
            self.loop.turn(0)

    def agree(self, capabilities: Capabilities = THEIRS, minor: int = 1) -> None:
        """Answer the client's VERSION."""
        self.send(reply_to(self.hello, encode_version(minor, capabilities)))

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        assert send(self.socket, data, fds) == len(data)
        self.turn()

    def ask(self, command: int, payload: bytes, fds: Sequence[int] = (), *, flags: int = 0) -> None:
        """Send a command of the device."""
        size = spec.HEADER_SIZE + len(payload)
        self.send(spec.HEADER.pack(9, command, size, flags, 0) + payload, fds)

    def look(self) -> Message | None:
        """The next message of the client, if there is one, without turning the loop."""
        while True:
            try:
                data, fds, _ = receive(self.socket, self.reader.wanted, self.reader.wanted_fds)
            except BlockingIOError:
                return None
            assert data, "the client has closed the connection"
            if (message := self.reader.feed(data, fds)) is not None:
                return message

    def next(self) -> Message:
        """The next message of the client, with file descriptors that are the test's to close."""
        for _ in range(10):  # a large one comes in several pieces
            self.turn()
            if (message := self.look()) is not None:
                return message
        raise AssertionError("the client sends nothing")

    def agreed(self) -> bool:
        return self.client.negotiated.done

    def has_backlog(self) -> bool:
        return self.client.sending

    def close(self) -> None:
        close_fds(self.reader.take_fds())
        self.socket.close()
        self.turn()


def refusal(deferred: Deferred[Any]) -> int:
    """The errno with which a request was refused."""
    assert deferred.done
    with pytest.raises(PeerError) as caught:
        deferred.result()
    return caught.value.errno


def ended(device: RawDevice, number: int) -> bool:
    """Whether the connection has ended with this errno, and its owner was told once."""
    client = device.client
    assert client.closed
    assert client.ended is not None
    assert client.fileno() == -1
    assert client.outstanding == 0
    assert [error.errno for error in device.ends] == [client.ended.errno]
    assert refusal(client.submit(requests.reset())) == errno.ENOTCONN
    assert client.post(requests.reset()) is not None
    return client.ended.errno == number


def region(argsz: int, *areas: tuple[int, int]) -> bytes:
    """DEVICE_GET_REGION_INFO's reply for region 1."""
    if not areas:
        return vfio.REGION_INFO.pack(argsz, 7, 1, 0, 0x8000, 0x100)
    caps = vfio.SPARSE_MMAP.pack(1, 1, 0, len(areas), 0)
    caps += b"".join(vfio.SPARSE_MMAP_AREA.pack(*area) for area in areas)
    return vfio.REGION_INFO.pack(argsz, 15, 1, 32, 0x8000, 0x100) + caps
