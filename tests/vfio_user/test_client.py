from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import PAGE
from tests.vfio_user.raw_device import reply_to as reply
from tests.vfio_user.register_bank import (
    BAR,
    BIG,
    CONFIG,
    DMA_ADDRESS,
    DMA_START,
    DOORBELL,
    MAPPABLE,
    REFUSED,
    RW,
    RegisterBank,
)
from viommu.errors import PeerError, UsageError
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.testing.serving import LoopThread
from viommu.vfio_user import Client, IrqInfo, RegionInfo, Server, ServerLimits, requests
from viommu.vfio_user.connection import receive, send
from viommu.vfio_user.protocol import (
    Capabilities,
    Message,
    MessageReader,
    encode_version,
    reply_message,
)
from viommu.vfio_user.requests import RegionWrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# --- against the real server


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    with LoopThread() as thread:
        yield thread


@pytest.fixture
def served(
    thread: LoopThread, bank: RegisterBank, files: MappedFiles, tmp_path: Path
) -> Iterator[Server]:
    path = tmp_path / "bank.sock"
    server = thread.call(lambda: Server(thread.loop, bank, path, files))
    yield server
    thread.call(server.close)


@pytest.fixture
def client(served: Server) -> Iterator[Client]:
    with Client(served.path) as client:
        yield client


def test_negotiation(client: Client, bank: RegisterBank) -> None:
    assert client.minor == 1
    assert client.capabilities == Capabilities(8, 1 << 20)
    assert client.fileno() >= 0
    assert bank.irqs is not None


def test_infos(client: Client, bank: RegisterBank) -> None:
    info = client.device_info()
    assert info == (vfio.DEVICE_FLAGS_PCI | vfio.DEVICE_FLAGS_RESET, 9, 5)
    assert client.region_info(CONFIG) == RegionInfo(4096, RW)
    assert client.region_info(5) == RegionInfo(0, 0)
    mappable = client.region_info(MAPPABLE)
    assert mappable.fd is not None
    assert os.fstat(mappable.fd).st_ino == os.fstat(bank.store).st_ino
    os.close(mappable.fd)
    assert mappable._replace(fd=bank.store) == bank.infos[MAPPABLE]
    assert client.irq_info(2) == IrqInfo(2048, vfio.IRQ_INFO_EVENTFD)
    assert client.irq_info(1).count == 0


def test_registers(client: Client) -> None:
    client.region_write(BAR, 0x80, b"hello")
    assert client.region_read(BAR, 0x80, 5) == b"hello"
    client.region_write(BAR, 0x80, b"HE", posted=True)
    assert client.region_read(BAR, 0x80, 5) == b"HEllo"
    assert client.region_read(BAR, 0x80, 0) == b""
    client.region_write(BIG, 0, b"x" * (1 << 20))
    assert client.region_read(BIG, 1, 1 << 20) == b"x" * ((1 << 20) - 1) + b"\0"


def test_too_much_at_a_time(client: Client) -> None:
    with pytest.raises(UsageError, match="1048577"):
        client.region_read(BIG, 0, (1 << 20) + 1)
    with pytest.raises(UsageError):
        client.region_write(BIG, 0, bytes((1 << 20) + 1))


def test_an_error_reply_ends_nothing(client: Client) -> None:
    for call in (
        lambda: client.region_read(BAR, REFUSED, 4),
        lambda: client.region_write(BAR, REFUSED, b"1234"),
    ):
        with pytest.raises(PeerError, match="No such device or address") as caught:
            call()
        assert caught.value.errno == errno.ENXIO
    with pytest.raises(PeerError) as caught:
        client.region_info(9)
    assert caught.value.errno == errno.EINVAL
    client.region_write(BAR, REFUSED, b"1234", posted=True)
    client.reset()


def test_interrupts(client: Client, eventfd: Callable[..., int]) -> None:
    fds = [eventfd() for _ in range(20)]
    client.assign_irqs(2, 10, fds)  # in chunks of what the server takes
    for vector in (10, 17, 18, 29):
        client.region_write(BAR, DOORBELL, vector.to_bytes(4, "little"))
        assert os.eventfd_read(fds[vector - 10]) == 1
    flags = vfio.IRQ_SET_DATA_BOOL | vfio.IRQ_SET_ACTION_TRIGGER
    client.set_irqs(2, flags, 10, 2, bools=b"\0\1")
    assert os.eventfd_read(fds[1]) == 1
    client.disable_irqs(2)
    client.region_write(BAR, DOORBELL, (10).to_bytes(4, "little"))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fds[0])


def test_no_more_interrupts_at_a_time_than_a_message_can_bring(
    thread: LoopThread,
    bank: RegisterBank,
    files: MappedFiles,
    tmp_path: Path,
    eventfd: Callable[..., int],
) -> None:
    path, limits = tmp_path / "bank.sock", ServerLimits(max_msg_fds=1024)
    server = thread.call(lambda: Server(thread.loop, bank, path, files, limits))
    fds = [eventfd() for _ in range(20)]
    with Client(path) as client:
        client.assign_irqs(2, 0, fds)
        client.region_write(BAR, DOORBELL, (19).to_bytes(4, "little"))
    assert os.eventfd_read(fds[19]) == 1
    thread.call(server.close)


def test_memory(client: Client, bank: RegisterBank, memfd: Callable[..., int]) -> None:
    fd = memfd()
    client.dma_map(0x10000, 2 * PAGE, fd=fd, offset=PAGE)
    client.dma_map(0x20000, PAGE, fd=fd, writable=False)
    client.dma_map(0x30000, PAGE, readable=False)
    regions = bank.memory.regions()
    assert [(r.gpa, r.size, r.offset) for r in regions] == [
        (0x10000, 2 * PAGE, PAGE),
        (0x20000, PAGE, 0),
        (0x30000, PAGE, 0),
    ]
    assert [(r.readable, r.writable, r.shared) for r in regions] == [
        (True, True, True),
        (True, False, True),
        (False, True, False),
    ]
    client.region_write(BAR, DMA_ADDRESS, (0x10010).to_bytes(8, "little"))
    client.region_write(BAR, DMA_START, b"beef")
    assert os.pread(fd, 4, PAGE + 16) == b"beef"
    client.dma_unmap(0x20000, PAGE)
    with pytest.raises(PeerError) as caught:
        client.dma_unmap(0x20000, PAGE)
    assert caught.value.errno == errno.ENOENT
    client.dma_unmap_all()
    assert bank.memory.regions() == []


def test_requests_are_pipelined(client: Client) -> None:
    client.region_write(BAR, 0x80, bytes(range(64)))
    answers = [client.submit(requests.region_read(BAR, 0x80 + n, 1)) for n in range(64)]
    assert client.wait(answers[63]) == b"\x3f"
    assert all(answer.done for answer in answers)
    assert b"".join(client.wait(answer) for answer in answers) == bytes(range(64))
    assert client.call(requests.region_read(BAR, 0x82, 2)) == b"\2\3"


def test_commands_that_our_server_does_not_have(client: Client) -> None:
    assert client.region_io_fds(BAR) == (16, (), ())
    for call in (
        lambda: client.device_feature(1 << 16 | 1, argsz=16),
        lambda: client.mig_data_read(4),
        lambda: client.mig_data_write(b"data"),
        lambda: client.region_io_fds(5),
    ):
        with pytest.raises(PeerError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    for posted in (False, True):
        with pytest.raises(UsageError, match="write_multiple"):
            client.region_write_multi([RegionWrite(BAR, 0x80, b"1")], posted=posted)
    client.reset()


def test_reset(client: Client, bank: RegisterBank) -> None:
    client.reset()
    assert bank.resets == 1


def test_a_client_that_serves_memory_is_asked(
    thread: LoopThread, served: Server, files: MappedFiles, memfd: Callable[..., int]
) -> None:
    """share=off from end to end: the server compares, and ends the connection."""
    theirs, ours = memfd(), memfd()
    mine = MappedFiles()
    memory = GuestMemory()
    file = mine.get(ours, 0, PAGE, writable=True)
    memory.map(0, PAGE, readable=True, writable=True, file=file)
    memory.write(0, b"the guest wrote this")
    with Client(served.path, memory=memory) as client:
        client.dma_map(0, PAGE, fd=theirs)
        client.region_write(BAR, 0x80, b"kick", posted=True)
        with pytest.raises(PeerError, match="closed by the peer") as caught:
            client.serve(lambda: False)
        assert caught.value.errno == errno.ECONNRESET
    assert served.memory_refused is not None
    assert "share=on" in served.memory_refused
    memory.close()


def test_shared_memory_is_proved(
    thread: LoopThread, served: Server, memfd: Callable[..., int]
) -> None:
    fd = memfd()
    mine = MappedFiles()
    memory = GuestMemory()
    memory.map(0, PAGE, readable=True, writable=True, file=mine.get(fd, 0, PAGE, writable=True))
    memory.write(0, b"the guest wrote this")
    with Client(served.path, memory=memory) as client:
        client.dma_map(0, PAGE, fd=fd)
        thread.call(lambda: served.suspect_memory(0))
        client.region_read(BAR, 0, 4)  # the server's question is answered on the way
        client.reset()
        assert served.memory_refused is None
        assert served.connected
    memory.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="can't connect to") as caught:
        Client(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


def test_a_second_client_learns_that_it_is_not_wanted(client: Client, served: Server) -> None:
    with pytest.raises(PeerError) as caught:
        Client(served.path)
    assert caught.value.errno == errno.ECONNRESET


def test_nothing_is_to_be_served(client: Client) -> None:
    client.serve(lambda: True)


def test_a_closed_client(client: Client) -> None:
    client.close()
    client.close()
    assert client.fileno() == -1
    for call in (client.reset, client.device_info, lambda: client.serve(lambda: False)):
        with pytest.raises(PeerError) as caught:
            call()
        assert caught.value.errno == errno.ENOTCONN


def test_a_server_that_goes_away(client: Client, thread: LoopThread, served: Server) -> None:
    thread.call(served.close)
    with pytest.raises(PeerError) as caught:
        client.reset()
    assert caught.value.errno == errno.ECONNRESET
    with pytest.raises(PeerError) as caught:
        client.reset()
    assert caught.value.errno == errno.ENOTCONN


# --- against servers that lie


class Liar:
    """A server that negotiates honestly, and then does what ``script`` says with each message."""

    def __init__(self, path: Path, script: Callable[[Liar, Message], None]) -> None:
        self.path = path
        self.script = script
        self.heard: list[Message] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.fspath(path))
        self.listener.listen()
        self.socket: socket.socket | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        self.socket, _ = self.listener.accept()
        reader = MessageReader()
        with self.socket:
            while True:
                try:
                    data, fds, _ = receive(self.socket, reader.wanted)
                except ConnectionError:
                    return
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
                message = reader.feed(data)
                if message is not None:
                    self.heard.append(message)
                    try:
                        self.script(self, message)
                    except BrokenPipeError:
                        return

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        assert self.socket is not None
        send(self.socket, data, fds or [])

    def ask(self, command: int, payload: bytes, *, flags: int = 0) -> None:
        self.send(spec.HEADER.pack(9, command, 16 + len(payload), flags, 0) + payload)


@pytest.fixture
def lie(tmp_path: Path) -> Iterator[Callable[..., Liar]]:
    liars: list[Liar] = []

    def make(
        script: Callable[[Liar, Message], None],
        *,
        negotiate: bool = True,
        write_multiple: bool = False,
    ) -> Liar:
        capabilities = Capabilities(8, write_multiple=write_multiple)

        def play(liar: Liar, message: Message) -> None:
            if message.command == Command.VERSION and negotiate:
                liar.send(reply_message(message, encode_version(0, capabilities)))
            else:
                script(liar, message)

        liars.append(Liar(tmp_path / f"liar{len(liars)}", play))
        return liars[-1]

    yield make
    for liar in liars:
        liar.thread.join()
        liar.listener.close()


@contextmanager
def broken(number: int) -> Iterator[None]:
    """The block raises PeerError with this errno."""
    with pytest.raises(PeerError) as caught:
        yield
    assert caught.value.errno == number


VERSIONS = {
    "empty": b"",
    "another major": spec.VERSION.pack(1, 0) + b"{}\0",
    "higher minor": spec.VERSION.pack(0, 2) + b"{}\0",
    "no NUL": spec.VERSION.pack(0, 0) + b"{}",
    "not JSON": spec.VERSION.pack(0, 0) + b"{\0",
}


@pytest.mark.parametrize("payload", VERSIONS.values(), ids=VERSIONS)
def test_a_version_that_was_not_offered(lie: Callable[..., Liar], payload: bytes) -> None:
    liar = lie(lambda liar, m: liar.send(reply_message(m, payload)), negotiate=False)
    with broken(errno.EPROTO):
        Client(liar.path)


LIES: dict[str, Callable[[Message], bytes]] = {
    "another id": lambda m: reply(m, bytes(16), ident=77),
    "another command": lambda m: reply(m, bytes(16), command=1),
    "short": lambda m: reply(m, bytes(15)),
    "long": lambda m: reply(m, bytes(17)),
    "size 0": lambda m: reply(m, size=0),
}


@pytest.mark.parametrize("make", LIES.values(), ids=LIES)
def test_nonsense_closes_the_connection(
    lie: Callable[..., Liar], make: Callable[[Message], bytes]
) -> None:
    liar = lie(lambda liar, message: liar.send(make(message)))
    with Client(liar.path) as client:
        with broken(errno.EPROTO):
            client.device_info()
        with broken(errno.ENOTCONN):
            client.device_info()


def test_fds_nobody_asked_for_close_the_connection(
    lie: Callable[..., Liar], memfd: Callable[..., int]
) -> None:
    fd = memfd()
    liar = lie(lambda liar, message: liar.send(reply(message, bytes(16)), [fd]))
    with Client(liar.path) as client, broken(errno.EPROTO):
        client.device_info()


def test_two_fds_for_a_region_close_the_connection(
    lie: Callable[..., Liar], memfd: Callable[..., int]
) -> None:
    fd = memfd()
    info = vfio.REGION_INFO.pack(32, 0, 0, 0, 0, 0)
    liar = lie(lambda liar, message: liar.send(reply(message, info), [fd, fd]))
    with Client(liar.path) as client, broken(errno.EPROTO):
        client.region_info(0)


def test_a_region_that_never_fits_closes_the_connection(
    lie: Callable[..., Liar], memfd: Callable[..., int]
) -> None:
    fd = memfd()

    def grow(liar: Liar, message: Message) -> None:
        more = vfio.REGION_INFO.unpack(message.payload)[0] + 1
        liar.send(reply(message, vfio.REGION_INFO.pack(more, 0, 0, 0, 0, 0)), [fd])

    liar = lie(grow)
    with Client(liar.path) as client, broken(errno.EPROTO):
        client.region_info(0)


def test_a_region_with_nonsense_closes_the_connection(
    lie: Callable[..., Liar], memfd: Callable[..., int]
) -> None:
    fd = memfd()
    liar = lie(lambda liar, message: liar.send(reply(message, bytes(8)), [fd]))
    with Client(liar.path) as client, broken(errno.EPROTO):
        client.region_info(0)


def test_an_error_without_errno_is_an_error(lie: Callable[..., Liar]) -> None:
    flags = spec.F_TYPE_REPLY | spec.F_ERROR
    liar = lie(lambda liar, message: liar.send(reply(message, flags=flags)))
    with Client(liar.path) as client:
        for _ in range(2):
            with broken(errno.EIO):
                client.reset()


def test_a_silent_server(lie: Callable[..., Liar]) -> None:
    liar = lie(lambda _liar, _message: None)
    with Client(liar.path, timeout=0.01) as client:
        with broken(errno.ETIMEDOUT):
            client.reset()
        with broken(errno.ENOTCONN):
            client.reset()


def test_commands_that_others_have(lie: Callable[..., Liar]) -> None:
    heard: dict[int, bytes] = {}

    def script(liar: Liar, message: Message) -> None:
        heard[message.command] = message.payload
        if message.no_reply:
            return
        match message.command:
            case Command.REGION_WRITE_MULTI:
                liar.send(reply(message, message.payload[:8]))
            case Command.MIG_DATA_READ:
                liar.send(reply(message, spec.MIG_DATA.pack(11, 3) + b"abc"))
            case Command.DEVICE_FEATURE:
                liar.send(reply(message, message.payload))
            case _:
                liar.send(reply(message))

    liar = lie(script, write_multiple=True)
    with Client(liar.path) as client:
        client.region_write_multi([RegionWrite(0, 8, b"12"), RegionWrite(0, 16, b"34")])
        assert len(heard[Command.REGION_WRITE_MULTI]) == 8 + 2 * 24
        client.region_write_multi([RegionWrite(0, 8, b"12")], posted=True)
        assert client.mig_data_read(16) == b"abc"
        client.mig_data_write(b"state")
        assert client.device_feature(1 << 17 | 2, b"12345678").data == b"12345678"
    assert heard[Command.MIG_DATA_WRITE] == spec.MIG_DATA.pack(13, 5) + b"state"
    assert len(heard[Command.REGION_WRITE_MULTI]) == 8 + 24


def test_a_deaf_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "deaf"))
        listener.listen()
        thread = threading.Thread(target=lambda: accepted.append(agree_and_sleep(listener)))
        accepted: list[socket.socket] = []
        thread.start()
        with Client(tmp_path / "deaf", timeout=0.05) as client:
            thread.join()
            with broken(errno.ETIMEDOUT):
                for _ in range(64):
                    client.region_write(0, 0, bytes(1 << 20), posted=True)
            with broken(errno.ENOTCONN):
                client.region_write(0, 0, b"1", posted=True)
        accepted[0].close()


def agree_and_sleep(listener: socket.socket) -> socket.socket:
    """Accept a client, answer its VERSION, and read nothing more."""
    peer, _ = listener.accept()
    ident, command, *_ = spec.HEADER.unpack_from(peer.recv(4096))
    hello = Message(ident, command, 0, 0, b"", [])
    peer.send(reply_message(hello, encode_version(0, Capabilities(8))))
    return peer


def test_a_posted_write_to_a_server_that_has_gone(
    client: Client, thread: LoopThread, served: Server
) -> None:
    thread.call(served.close)
    with broken(errno.ECONNRESET):
        client.region_write(BAR, 0x80, b"1", posted=True)
    with broken(errno.ENOTCONN):
        client.region_write(BAR, 0x80, b"1", posted=True)


def test_serving_a_silent_server(lie: Callable[..., Liar]) -> None:
    liar = lie(lambda _liar, _message: None)
    with Client(liar.path, timeout=0.01) as client:
        with broken(errno.ETIMEDOUT):
            client.serve(lambda: False)
        with broken(errno.ENOTCONN):
            client.serve(lambda: False)


def test_an_unasked_reply_while_serving(lie: Callable[..., Liar]) -> None:
    def script(liar: Liar, message: Message) -> None:
        liar.send(reply(message))
        liar.send(reply(message))

    liar = lie(script)
    with Client(liar.path) as client:
        client.reset()
        with broken(errno.EPROTO):
            client.serve(lambda: False)


class TestDma:
    """What the client answers to a server that wants its memory."""

    @pytest.fixture
    def memory(self, memfd: Callable[..., int]) -> Iterator[GuestMemory]:
        files = MappedFiles()
        memory = GuestMemory()
        for gpa, writable in ((0, True), (PAGE, False)):
            file = files.get(memfd(), 0, PAGE, writable=writable)
            memory.map(gpa, PAGE, readable=True, writable=writable, file=file)
        yield memory
        memory.close()

    def exchange(
        self,
        lie: Callable[..., Liar],
        memory: GuestMemory | None,
        command: int,
        payload: bytes,
        *,
        flags: int = 0,
    ) -> list[Message]:
        """Ask while the client waits for a reply; return what it says besides."""

        def script(liar: Liar, message: Message) -> None:
            if message.command == Command.DEVICE_RESET:
                liar.ask(command, payload, flags=flags)
                liar.send(reply(message))

        liar = lie(script)
        with Client(liar.path, memory=memory) as client:
            client.reset()
        liar.thread.join()
        return liar.heard[2:]

    def test_read(self, lie: Callable[..., Liar], memory: GuestMemory) -> None:
        memory.write(PAGE - 4, b"data")
        head = spec.DMA_ACCESS.pack(PAGE - 4, 8)
        (answer,) = self.exchange(lie, memory, Command.DMA_READ, head)
        assert (answer.id, answer.flags) == (9, spec.F_TYPE_REPLY)
        assert answer.payload == head + b"data" + bytes(4)

    def test_write(self, lie: Callable[..., Liar], memory: GuestMemory) -> None:
        head = spec.DMA_ACCESS.pack(16, 4)
        (answer,) = self.exchange(lie, memory, Command.DMA_WRITE, head + b"data")
        assert answer.payload == head
        assert memory.read(16, 4) == b"data"

    def test_posted_write(self, lie: Callable[..., Liar], memory: GuestMemory) -> None:
        head = spec.DMA_ACCESS.pack(16, 4)
        flags = spec.F_NO_REPLY
        assert self.exchange(lie, memory, Command.DMA_WRITE, head + b"data", flags=flags) == []
        assert memory.read(16, 4) == b"data"

    @pytest.mark.parametrize(
        ("command", "payload", "number"),
        [
            (Command.DMA_READ, spec.DMA_ACCESS.pack(1 << 40, 4), errno.ENODEV),
            (Command.DMA_WRITE, spec.DMA_ACCESS.pack(PAGE, 4) + b"data", errno.ENODEV),
            (Command.DMA_READ, spec.DMA_ACCESS.pack(0, 2**64 - 1), errno.E2BIG),
            (Command.DMA_WRITE, spec.DMA_ACCESS.pack(0, 5) + b"data", errno.E2BIG),
            (Command.DMA_WRITE, spec.DMA_ACCESS.pack(0, 3) + b"data", errno.EINVAL),
            (Command.DMA_READ, bytes(15), errno.EINVAL),
            (Command.REGION_READ, bytes(16), errno.ENOSYS),
        ],
        ids=["no memory", "read-only", "too much", "too few", "too many", "short", "not served"],
    )
    def test_refused(
        self,
        lie: Callable[..., Liar],
        memory: GuestMemory,
        command: int,
        payload: bytes,
        number: int,
    ) -> None:
        (answer,) = self.exchange(lie, memory, command, payload)
        assert (answer.flags, answer.error) == (spec.F_TYPE_REPLY | spec.F_ERROR, number)
        assert answer.payload == b""

    def test_without_memory(self, lie: Callable[..., Liar]) -> None:
        head = spec.DMA_ACCESS.pack(0, 4)
        (answer,) = self.exchange(lie, None, Command.DMA_READ, head)
        assert answer.error == errno.ENOSYS
