from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.vfio_user.raw_device import RawDevice
from tests.vfio_user.register_bank import RegisterBank
from viommu.loop import Loop
from viommu.memory import MappedFiles
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import Server
from viommu.vfio_user.connection import receive, send
from viommu.vfio_user.protocol import Message, MessageReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = 4096
HELLO = spec.VERSION.pack(0, 1)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Clock:
    """A monotonic clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """The raw end of a client: sends any bytes, and lets the server's loop turn.

    It connects to ``server``, which is that or a connected socket.
    """

    def __init__(self, server: Server | socket.socket, loop: Loop) -> None:
        self.loop = loop
        if isinstance(server, socket.socket):
            self.socket = server
        else:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.connect(os.fspath(server.path))
        self.socket.setblocking(False)
        self.reader = MessageReader()
        self.id = 100
        self.turn()

    def turn(self, count: int = 2) -> None:
        for _ in range(count):
            self.loop.turn(0)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        assert send(self.socket, data, fds) == len(data)
        self.turn()

    def post(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
    ) -> None:
        self.id += 1
        total = spec.HEADER_SIZE + len(payload) if size is None else size
        self.send_bytes(spec.HEADER.pack(self.id, command, total, flags, 0) + payload, fds)

    def receive(self) -> Message | None:
        """The next message, ``None`` if there is none; EOFError once disconnected."""
        while True:
            try:
                data, fds, truncated = receive(self.socket, self.reader.wanted)
            except BlockingIOError:
                return None
            except ConnectionError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            if message := self.reader.feed(data, fds, truncated=truncated):
                return message

    def request(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
    ) -> Message:
        """Send a command and return its reply."""
        self.post(command, payload, fds, flags=flags, size=size)
        message = self.receive()
        assert message is not None, "no reply"
        assert (message.id, message.command) == (self.id, command)
        assert message.kind == spec.F_TYPE_REPLY
        return message

    def ok(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a command, return the payload of its reply, which is a success."""
        message = self.request(command, payload, fds)
        assert message.flags == spec.F_TYPE_REPLY, os.strerror(message.error)
        assert not message.fds
        return message.payload

    def refused(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
    ) -> int:
        """Send a command, return the errno of its reply, which is an error and only a header."""
        message = self.request(command, payload, fds, flags=flags, size=size)
        assert message.flags == spec.F_TYPE_REPLY | spec.F_ERROR
        assert message.payload == b""
        return message.error

    def closed(self) -> bool:
        """Whether the server has closed the connection and left nothing to read."""
        try:
            message = self.receive()
        except EOFError:
            return True
        assert message is None
        return False

    def close(self) -> None:
        self.socket.close()
        self.turn()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    loop = Loop(clock)
    yield loop
    loop.close()


@pytest.fixture
def files() -> MappedFiles:
    return MappedFiles()


@pytest.fixture
def bank() -> Iterator[RegisterBank]:
    bank = RegisterBank()
    yield bank
    bank.close()


@pytest.fixture
def server(
    loop: Loop,
    bank: RegisterBank,
    files: MappedFiles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Server]:
    caplog.set_level(logging.INFO, "viommu.vfio_user")
    server = Server(loop, bank, tmp_path / "bank.sock", files)
    yield server
    server.close()
    assert not server.path.exists()
    assert bank.memory.regions() == []
    assert len(files) == 0


@pytest.fixture
def connect(server: Server, loop: Loop) -> Iterator[Callable[[], Peer]]:
    """A function that makes raw clients, which are closed at the end."""
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Peer(server, loop))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(connect: Callable[[], Peer]) -> Peer:
    """A raw client that has negotiated."""
    peer = connect()
    peer.ok(Command.VERSION, HELLO)
    return peer


@pytest.fixture
def memfd() -> Iterator[Callable[..., int]]:
    """A function that makes memfds, which are closed at the end."""
    made: list[int] = []

    def make(size: int = 16 * PAGE) -> int:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        made.append(fd)
        os.ftruncate(fd, size)
        return fd

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def eventfd() -> Iterator[Callable[..., int]]:
    """A function that makes eventfds, which are closed at the end."""
    made: list[int] = []

    def make(value: int = 0, flags: int = os.EFD_CLOEXEC | os.EFD_NONBLOCK) -> int:
        made.append(os.eventfd(value, flags))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def make_device(loop: Loop) -> Iterator[Callable[..., RawDevice]]:
    """A function that makes devices with a client each; at the end no fd is left open."""
    before = open_fds()
    made: list[RawDevice] = []

    def device(*, agreed: bool = True, **options: Any) -> RawDevice:
        made.append(RawDevice(loop, **options))
        if agreed:
            made[-1].agree()
            assert made[-1].agreed()
        return made[-1]

    yield device
    for one in made:
        one.client.close()
        one.close()
    loop.turn(0)
    assert open_fds() == before


@pytest.fixture
def device(make_device: Callable[..., RawDevice]) -> RawDevice:
    return make_device()
