"""Memory by messages: the client's answers are in its socket before it is asked."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import open_fds
from viommu.errors import GuestMemoryError
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user.connection import Connection, send
from viommu.vfio_user.message_port import MessagePort
from viommu.vfio_user.protocol import MessageReader, command_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.vfio_user.protocol import Message

GPA = 0x1000
KIB = 1 << 10


class Line:
    """A port, and the other end of its connection."""

    def __init__(self, timeout: float = 20) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.reader = MessageReader()
        self.noticed = 0
        self.lost: list[str] = []
        self.connection = Connection(ours, spec.MAX_MESSAGE)
        self.port = MessagePort(
            self.connection,
            itertools.count(7).__next__,
            timeout,
            noticed=self._notice,
            lost=self.lost.append,
        )

    def _notice(self) -> None:
        self.noticed += 1

    def reply(
        self, ident: int, command: int, payload: bytes = b"", *, error: int | None = None
    ) -> None:
        """Send an answer."""
        flags = spec.F_TYPE_REPLY | (0 if error is None else spec.F_ERROR)
        size = spec.HEADER_SIZE + len(payload)
        self.peer.send(spec.HEADER.pack(ident, command, size, flags, error or 0) + payload)

    def data(self, ident: int, gpa: int, data: bytes) -> None:
        """Answer a read."""
        self.reply(ident, Command.DMA_READ, spec.DMA_ACCESS.pack(gpa, len(data)) + data)

    def asked(self) -> Message | None:
        """Return the next command that was sent."""
        while True:
            try:
                data = self.peer.recv(self.reader.wanted)
            except BlockingIOError:
                return None
            if message := self.reader.feed(data):
                return message

    def close(self) -> None:
        self.port.end("closed")
        self.connection.close()
        self.peer.close()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def test_reads(line: Line) -> None:
    line.data(7, GPA, b"data")
    assert line.port.read(GPA, 4) == b"data"
    asked = line.asked()
    assert asked is not None
    assert (asked.id, asked.command, asked.flags) == (7, Command.DMA_READ, 0)
    assert asked.payload == spec.DMA_ACCESS.pack(GPA, 4)
    assert line.asked() is None


@pytest.mark.parametrize("payload", [b"", spec.DMA_ACCESS.pack(GPA, 4)], ids=["header", "whole"])
def test_writes(line: Line, payload: bytes) -> None:
    line.reply(7, Command.DMA_WRITE, payload)
    line.port.write(GPA, memoryview(b"data"))
    asked = line.asked()
    assert asked is not None
    assert (asked.id, asked.command) == (7, Command.DMA_WRITE)
    assert asked.payload == spec.DMA_ACCESS.pack(GPA, 4) + b"data"


def test_nothing_is_nothing(line: Line) -> None:
    assert line.port.read(GPA, 0) == b""
    line.port.write(GPA, b"")
    assert line.asked() is None


@pytest.mark.parametrize(
    ("limit", "size", "chunks"),
    [
        (64 * KIB, 64 * KIB, [64 * KIB]),
        (64 * KIB, 64 * KIB + 1, [64 * KIB, 1]),
        (4 * KIB, 9 * KIB, [4 * KIB, 4 * KIB, KIB]),
        (1, 3, [1, 1, 1]),
    ],
)
def test_no_more_at_a_time_than_the_client_takes(
    line: Line, limit: int, size: int, chunks: list[int]
) -> None:
    line.port.max_transfer = limit
    data = os.urandom(size)
    at = 0
    for number, count in enumerate(chunks):
        line.data(7 + number, GPA + at, data[at : at + count])
        at += count
    assert line.port.read(GPA, size) == data
    at = 0
    for number, count in enumerate(chunks):
        asked = line.asked()
        assert asked is not None
        assert asked.payload == spec.DMA_ACCESS.pack(GPA + at, count)
        line.reply(7 + len(chunks) + number, Command.DMA_WRITE)
        at += count
    line.port.write(GPA, data)
    arrived = [message.payload[16:] for message in iter(line.asked, None)]
    assert [len(part) for part in arrived] == chunks
    assert b"".join(arrived) == data


def test_a_refusal_is_an_error_and_no_more(line: Line) -> None:
    line.reply(7, Command.DMA_READ, error=errno.ENODEV)
    line.reply(8, Command.DMA_WRITE, error=0)
    line.data(9, GPA, b"data")
    with pytest.raises(GuestMemoryError, match=r"\[0x1000, 0x1004\).*No such device"):
        line.port.read(GPA, 4)
    with pytest.raises(GuestMemoryError, match="without a number"):
        line.port.write(GPA, b"data")
    assert line.port.read(GPA, 4) == b"data"
    assert line.lost == []
    assert not line.port.ended


def test_what_comes_meanwhile_waits_in_order(line: Line, memfd: Callable[..., int]) -> None:
    line.peer.send(command_message(1, Command.REGION_READ, b"first"))
    send(line.peer, command_message(2, Command.DMA_MAP, b"second"), [memfd()])
    line.reply(99, Command.DMA_READ, b"the answer to another question")
    line.data(7, GPA, b"data")
    assert line.port.read(GPA, 4) == b"data"
    assert line.noticed == 1
    taken = []
    while line.port.arrived:
        message = line.port.take()
        assert message is not None
        taken.append((message.id, len(message.fds)))
        for fd in message.fds:
            os.close(fd)
    assert taken == [(1, 0), (2, 1), (99, 0)]
    assert line.port.take() is None


def test_an_answer_to_another_command_is_no_answer(line: Line) -> None:
    line.reply(7, Command.DMA_WRITE)
    line.data(7, GPA, b"data")
    assert line.port.read(GPA, 4) == b"data"
    assert line.port.arrived


def test_what_nobody_takes_is_closed(line: Line, memfd: Callable[..., int]) -> None:
    fd = memfd()
    before = open_fds()
    send(line.peer, command_message(1, Command.DMA_MAP, b""), [fd])
    line.data(7, GPA, b"data")
    line.port.read(GPA, 4)
    assert open_fds() == before + 1
    line.port.end("its client left")
    assert open_fds() == before
    with pytest.raises(GuestMemoryError, match="its client left"):
        line.port.read(GPA, 4)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (spec.DMA_ACCESS.pack(GPA, 4) + b"dat", "sent 19 bytes"),
        (spec.DMA_ACCESS.pack(GPA, 4) + b"data!", "sent 21 bytes"),
        (spec.DMA_ACCESS.pack(GPA + 1, 4) + b"data", "sent 20 bytes"),
        (b"", "sent 0 bytes"),
    ],
)
def test_nonsense_is_the_end(line: Line, answer: bytes, why: str) -> None:
    line.reply(7, Command.DMA_READ, answer)
    check_end(line, why)


def check_end(line: Line, why: str) -> None:
    with pytest.raises(GuestMemoryError, match=why):
        line.port.read(GPA, 4)
    assert len(line.lost) == 1
    assert why in line.lost[0]
    assert line.port.ended
    for _ in range(2):
        with pytest.raises(GuestMemoryError, match=why):
            line.port.write(GPA, b"data")
    assert len(line.lost) == 1


def test_a_client_that_goes_is_the_end(line: Line) -> None:
    line.peer.close()
    check_end(line, "Broken pipe")


def test_a_client_that_goes_after_it_was_asked_is_the_end(line: Line) -> None:
    line.peer.shutdown(socket.SHUT_WR)
    check_end(line, "closed by the peer")


def test_a_header_that_can_not_be_is_the_end(line: Line, memfd: Callable[..., int]) -> None:
    before = open_fds()
    send(line.peer, spec.HEADER.pack(7, Command.DMA_READ, 3, spec.F_TYPE_REPLY, 0), [memfd()])
    check_end(line, "a message of 3 bytes")
    assert open_fds() == before + 1


@pytest.mark.parametrize("timeout", [0.01, 0, -1])
def test_a_client_that_does_not_answer_is_the_end(timeout: float) -> None:
    line = Line(timeout)
    check_end(line, "did not answer")
    line.close()


def test_a_client_that_sends_for_ever_is_the_end(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viommu.vfio_user.message_port._MAX_ARRIVED", 3)
    for number in range(4):
        line.peer.send(command_message(number, Command.REGION_READ, b""))
    check_end(line, "too much")


def test_a_client_that_sends_very_much_is_the_end(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viommu.vfio_user.message_port._MAX_ARRIVED_BYTES", 100)
    line.peer.send(command_message(1, Command.REGION_WRITE, bytes(101)))
    check_end(line, "too much")


def test_an_answer_to_what_was_not_read_is_the_end(line: Line, memfd: Callable[..., int]) -> None:
    """Half a command would wait to be sent, and the client not be read from until it is."""
    line.port.max_transfer = 4 << 20
    before = open_fds()
    header = spec.HEADER.pack(7, Command.DMA_WRITE, 16, spec.F_TYPE_REPLY, 0)
    send(line.peer, header, [memfd()])
    with pytest.raises(GuestMemoryError, match="answered what it had not read"):
        line.port.write(GPA, bytes(4 << 20))
    assert line.lost == ["it answered what it had not read"]
    assert line.port.ended
    assert open_fds() == before + 1


def test_what_was_taken_counts_no_more(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viommu.vfio_user.message_port._MAX_ARRIVED_BYTES", 100)
    for ident in range(7, 10):
        line.peer.send(command_message(1, Command.REGION_WRITE, bytes(60)))
        line.data(ident, GPA, b"data")
        assert line.port.read(GPA, 4) == b"data"
        assert line.port.take() is not None
    assert line.port.take() is None


def test_files_of_an_answer_are_closed(line: Line, memfd: Callable[..., int]) -> None:
    fd = memfd()
    before = open_fds()
    send(line.peer, spec.HEADER.pack(7, Command.DMA_WRITE, 16, spec.F_TYPE_REPLY, 0), [fd])
    line.port.write(GPA, b"data")
    assert open_fds() == before


def test_a_command_that_does_not_fit_the_socket_is_sent_in_pieces(line: Line) -> None:
    """The client reads and answers in a thread of its own."""
    line.port.max_transfer = 4 << 20
    data = os.urandom(4 << 20)
    received: list[bytes] = []

    def client() -> None:
        line.peer.setblocking(True)
        while (message := line.reader.feed(line.peer.recv(line.reader.wanted))) is None:
            pass
        received.append(message.payload[16:])
        line.reply(7, Command.DMA_WRITE)

    line.reader = MessageReader(8 << 20)
    thread = threading.Thread(target=client)
    thread.start()
    line.port.write(GPA, data)
    thread.join()
    assert received == [data]
