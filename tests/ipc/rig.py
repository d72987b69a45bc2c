"""An export server among the real parts, a clock that tests turn, and a client byte by byte."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu.basic import BasicMemoryMapper
from viommu.errors import Access
from viommu.ipc import protocol
from viommu.ipc.peer import PeerProcess
from viommu.ipc.protocol import Kind
from viommu.ipc.server import ExportServer
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory import GuestMemory, MappedFiles
from viommu.vfio_user.connection import receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from viommu.errors import TranslationFault
    from viommu.events import Event
    from viommu.ipc.conversation import ExportLimits
    from viommu.ipc.hold import HoldPolicy

__all__ = ["PAGE", "RAM", "RW", "Answer", "RawClient", "Rig", "make_memory", "make_rig", "me"]

PAGE: Final = 4096
RAM: Final = 1 << 20
RW: Final = Access.READ | Access.WRITE


def make_memory(files: MappedFiles, *gpas: int) -> GuestMemory:
    """Guest memory of RAM bytes in one file at each of these addresses."""
    memory = GuestMemory()
    for gpa in gpas:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RAM)
        file = files.get(fd, 0, RAM, writable=True)
        os.close(fd)
        memory.map(gpa, RAM, readable=True, writable=True, file=file)
    return memory


def me() -> PeerProcess:
    """This process, as the client of itself."""
    return PeerProcess(os.getpid(), os.geteuid(), -1)


class Answer(NamedTuple):
    """An answer, decoded as far as all have it in common."""

    kind: Kind
    ident: int
    error: int
    body: bytes
    fds: list[int]


class RawClient:
    """A client that sends what it likes; the server's loop is turned by hand."""

    def __init__(self, loop: Loop, sock: socket.socket, *, greet: bool = True) -> None:
        self.loop = loop
        self.socket = sock
        self.socket.setblocking(False)
        self.next_id = 1
        if greet:
            self.ask(Kind.HELLO, protocol.HELLO.pack(protocol.TAG, *protocol.VERSION))

    def turn(self) -> None:
        """Let the server do what there is to do now."""
        for _ in range(4):
            self.loop.turn(0)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one packet, and let the server look at it."""
        assert send(self.socket, data, fds) == len(data)
        self.turn()

    def tell(self, kind: Kind, body: bytes = b"") -> None:
        """Send what is not answered."""
        self.send(protocol.encode_request(kind, 0, body))

    def request(self, kind: Kind, body: bytes = b"") -> None:
        """Send what is answered, and leave the answer where it is."""
        self.send(protocol.encode_request(kind, self.next_id, body))
        self.next_id += 1

    def receive(self) -> Answer | None:
        """Return the next answer, ``None`` if there is none; EOFError at the end."""
        try:
            data, fds, _ = receive(self.socket, protocol.MAX_PACKET, protocol.MAX_FDS)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        return Answer(*protocol.decode_reply(data), fds)

    def ask(self, kind: Kind, body: bytes = b"") -> Answer:
        """Send a request and return its answer."""
        self.request(kind, body)
        answer = self.receive()
        assert answer is not None, f"{kind.name} was not answered"
        assert (answer.kind, answer.ident) == (kind, self.next_id - 1)
        return answer

    def start(self) -> socket.socket:
        """Start a session; return its fault event, as the socket that it is."""
        answer = self.ask(Kind.START)
        assert not answer.error
        (fd,) = answer.fds
        return socket.socket(fileno=fd)

    def export(self, iova: int, size: int) -> Answer:
        """Export a range."""
        return self.ask(Kind.EXPORT, protocol.RANGE.pack(iova, size))

    def release(self, iova: int, size: int) -> None:
        """Release a range, without waiting for anything."""
        self.tell(Kind.RELEASE, protocol.RANGE.pack(iova, size))

    @property
    def cut_off(self) -> bool:
        """Whether the server has hung up."""
        with contextlib.suppress(OSError):
            while self.socket.recv(1 << 16):
                pass
            return True
        return False

    def close(self) -> None:
        """Leave without a word."""
        self.socket.close()
        self.turn()


class Rig:
    """A server, on a path if there is one, with memory at 0, and IOVA 0x10000 mapped to 0x4000."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        policy: HoldPolicy | None = None,
        limits: ExportLimits | None = None,
    ) -> None:
        self.now = 1000.0
        self.loop = Loop(clock=lambda: self.now)
        self.files = MappedFiles()
        self.memory = make_memory(self.files, 0)
        self.mapper = BasicMemoryMapper()
        self.map(0x10000, 0x4000, 4 * PAGE)
        self.faults: list[TranslationFault] = []
        self.gone: list[str] = []
        self.server = ExportServer(
            self.loop,
            "00:09.0",
            self.mapper,
            self.memory,
            self.faults.append,
            path=path,
            policy=policy,
            limits=limits,
            on_gone=self.gone.append,
        )
        self._clients: list[RawClient] = []
        self._resolutions: list[Event] = []

    def connect(self, process: PeerProcess | None = None, *, greet: bool = True) -> RawClient:
        """A client, by default this process, on a socket pair."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.server.admit(ours, process or me())
        except BaseException:
            theirs.close()
            raise
        client = RawClient(self.loop, theirs, greet=greet)
        self._clients.append(client)
        return client

    def dial(self, *, greet: bool = True) -> RawClient:
        """A client that connects to the server's path."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(self.server.path))
        client = RawClient(self.loop, sock, greet=greet)
        client.turn()
        self._clients.append(client)
        return client

    def map(self, iova: int, gpa: int, size: int, prot: Access = RW) -> None:
        """Map as the guest would."""
        self.mapper.add_map(MappingInfo(iova, gpa, size, prot))

    def unmap(self, iova: int, size: int) -> Event | None:
        """Unmap as the guest would; return what its reply waits for."""
        result = self.mapper.remove_map(iova, size)
        assert result.ok
        if result.resolution is not None and result.resolution not in self._resolutions:
            self._resolutions.append(result.resolution)
        self.turn()
        return result.resolution

    def turn(self) -> None:
        """Run what is due."""
        for _ in range(4):
            self.loop.turn(0)

    def advance(self, seconds: float) -> None:
        """Let time pass, then run what is due."""
        self.now += seconds
        self.turn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.close()
        for client in self._clients:
            client.socket.close()
        self.memory.close()
        self.loop.close()
        for event in self._resolutions:
            event.close()


@contextlib.contextmanager
def make_rig(path: Path | None = None) -> Iterator[Rig]:
    """A rig, found without a leaked export at the end."""
    with Rig(path) as rig:
        yield rig
        rig.server.close()
        assert not rig.mapper.exports.total
        rig.mapper._check()
