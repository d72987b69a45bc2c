from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from viommu.spec import vfio_user as spec
from viommu.vfio_user.connection import (
    Connection,
    close_fds,
    peer_process,
    receive,
    send,
)
from viommu.vfio_user.protocol import MessageSizeError, command_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.setblocking(False)
    connection = Connection(ours, spec.MAX_MESSAGE)
    yield connection, theirs
    connection.close()
    theirs.close()


Pair = tuple[Connection, socket.socket]


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_nothing_yet(pair: Pair) -> None:
    connection, _ = pair
    assert connection.receive() is None
    assert not connection.hung_up
    assert not connection.unread


def test_what_has_arrived_is_known_without_taking_it(pair: Pair) -> None:
    connection, theirs = pair
    theirs.send(command_message(1, 9, b""))
    assert connection.unread
    assert connection.unread
    assert connection.receive() is not None
    assert not connection.unread


@pytest.fixture
def impatient() -> Iterator[None]:
    """What blocks fails."""

    def too_late(*_: object) -> None:
        raise AssertionError("it blocks")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("impatient")
def test_a_peer_that_has_our_socket_too_can_not_make_it_wait() -> None:
    """As the device that sends a twin socket may."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    other_holder = ours.dup()
    with theirs, other_holder, contextlib.closing(Connection(ours, spec.MAX_MESSAGE)) as connection:
        os.set_blocking(other_holder.fileno(), True)

        assert connection.receive() is None
        while not connection.backlog:
            connection.send(bytes(1 << 16))
        connection.flush()
        assert connection.backlog


def test_messages_in_pieces(pair: Pair) -> None:
    connection, theirs = pair
    data = command_message(1, 9, b"payload") + command_message(2, 9, b"")
    for at in range(len(data) - 1):
        theirs.send(data[at : at + 1])
        message = connection.receive()
        assert (message is None) == (at != 22)
    theirs.send(data[-1:])
    message = connection.receive()
    assert message is not None
    assert message.id == 2


def test_fds_stay_with_their_message(pair: Pair, memfd: Callable[..., int]) -> None:
    """Even when the kernel has several messages and could glue them together."""
    connection, theirs = pair
    fds = [memfd() for _ in range(3)]
    theirs.send(command_message(1, 9, b"none"))
    send(theirs, command_message(2, 9, b"two"), fds[:2])
    theirs.send(command_message(3, 9, b""))
    # With its second half, of which nobody should think.
    message = command_message(4, 9, b"late")
    theirs.send(message[:18])
    send(theirs, message[18:], fds[2:])
    for expected in ([], fds[:2], [], fds[2:]):
        received = connection.receive()
        assert received is not None
        inodes = [os.fstat(fd).st_ino for fd in received.fds]
        assert inodes == [os.fstat(fd).st_ino for fd in expected]
        for fd in received.fds:
            assert not os.get_inheritable(fd)
            os.close(fd)


def test_too_many_fds_are_closed_and_told(pair: Pair, memfd: Callable[..., int]) -> None:
    connection, theirs = pair
    fd = memfd()
    send(theirs, command_message(1, 9, b""), [fd] * 17)
    message = connection.receive()
    assert message is not None
    assert message.truncated
    assert len(message.fds) <= 16
    for each in message.fds:
        os.close(each)


def test_a_message_in_pieces_brings_no_more_fds_than_one_in_one(
    pair: Pair, memfd: Callable[..., int]
) -> None:
    """A client must not be able to take every file descriptor that this process may have."""
    connection, theirs = pair
    fd = memfd()
    data = command_message(1, 9, bytes(20))
    before = open_fds()
    for at in range(len(data) - 1):
        send(theirs, data[at : at + 1], [fd] * 7)
        assert connection.receive() is None
    assert open_fds() == before + 16
    theirs.send(data[-1:])
    message = connection.receive()
    assert message is not None
    assert message.truncated
    assert len(message.fds) == 16
    close_fds(message.fds)
    assert open_fds() == before


def test_a_file_that_fails_to_close_keeps_no_other_open(memfd: Callable[..., int]) -> None:
    """The files are a client's: closing one may run code of a file system of its own."""
    broken, sound = os.dup(memfd()), os.dup(memfd())
    os.close(broken)
    before = open_fds()
    fds = [broken, sound]

    close_fds(fds)

    assert fds == []
    assert open_fds() == before - 1


def test_fds_of_half_a_message_are_closed(pair: Pair, memfd: Callable[..., int]) -> None:
    connection, theirs = pair
    send(theirs, command_message(1, 9, b"abc")[:-1], [memfd()])
    assert connection.receive() is None
    connection.close()  # the test fails if an fd is left


@pytest.mark.parametrize("sent", [b"", b"half a header"])
def test_the_end_is_told(pair: Pair, sent: bytes) -> None:
    connection, theirs = pair
    theirs.send(sent)
    theirs.close()
    assert connection.hung_up
    with pytest.raises(EOFError, match="halfway" if sent else "closed by the peer$"):
        connection.receive()


def test_a_reset_is_the_end(pair: Pair) -> None:
    connection, theirs = pair
    connection.send(command_message(1, 9, b""))
    theirs.close()  # with our message unread
    with pytest.raises(EOFError):
        connection.receive()
    with pytest.raises(EOFError):
        connection.send(command_message(2, 9, b""))


def test_an_impossible_size_is_told(pair: Pair) -> None:
    connection, theirs = pair
    theirs.send(spec.HEADER.pack(1, 9, 3, 0, 0))
    with pytest.raises(MessageSizeError):
        connection.receive()


def test_headers_are_never_split(pair: Pair) -> None:
    """However full the socket is, and wherever it stops: a header arrives in one piece."""
    connection, theirs = pair
    sent = [command_message(i, 9, bytes([i & 0xFF]) * (i * 37 % 5000)) for i in range(400)]
    pending = list(sent)
    received = b""
    while pending or connection.backlog or len(received) < sum(map(len, sent)):
        while pending and not connection.backlog:
            connection.send(pending.pop(0))
        header = theirs.recv(16)
        assert len(header) == 16, "what QEMU's one readv would get"
        size = spec.HEADER.unpack(header)[2] - 16
        body = b""
        while len(body) < size:
            connection.flush()
            body += theirs.recv(size - len(body))
        received += header + body
        connection.flush()
    assert received == b"".join(sent)


def test_one_message_waits_for_a_peer_that_does_not_read(
    pair: Pair, memfd: Callable[..., int]
) -> None:
    connection, theirs = pair
    message = command_message(1, 9, bytes(1 << 20))
    connection.send(message, (memfd(),))
    assert connection.backlog
    connection.send(command_message(2, 9, b""))
    theirs.setblocking(True)
    data, fds, _ = receive(theirs, 1 << 16)
    assert len(fds) == 1
    os.close(fds[0])
    total = len(data)
    while total < len(message) + 16:
        connection.flush()
        data, fds, _ = receive(theirs, 1 << 16)
        assert fds == [], "they are sent once"
        total += len(data)
    assert not connection.backlog


def test_files_that_wait_are_copies(pair: Pair, memfd: Callable[..., int]) -> None:
    connection, theirs = pair
    fd = os.dup(memfd())
    inode = os.fstat(fd).st_ino
    while not connection.backlog:
        connection.send(bytes(1 << 16))
    assert 0 < connection.queued_bytes <= 1 << 16
    before = open_fds()
    connection.send(b"with a file", [fd, fd])
    connection.send(b"without")
    assert open_fds() == before + 2
    os.close(fd)
    taken = b""
    fds: list[int] = []
    while connection.queued_bytes:
        data, some, _ = receive(theirs, 1 << 16)
        taken, fds = taken + data, fds + some
        connection.flush()
    while not taken.endswith(b"with a filewithout"):
        data, some, _ = receive(theirs, 1 << 16)
        taken, fds = taken + data, fds + some
    assert [os.fstat(one).st_ino for one in fds] == [inode] * 2
    close_fds(fds)
    assert open_fds() == before - 1


def test_files_that_still_wait_at_the_end_are_closed(pair: Pair, memfd: Callable[..., int]) -> None:
    connection, _ = pair
    while not connection.backlog:
        connection.send(bytes(1 << 16))
    connection.send(b"with a file", [memfd()])
    before = open_fds()
    connection.close()
    assert open_fds() == before - 2
    assert connection.queued_bytes == 0


def test_files_that_can_not_wait_end_the_connection(
    pair: Pair, memfd: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, _ = pair
    while not connection.backlog:
        connection.send(bytes(1 << 16))
    real, fd, before = os.dup, memfd(), open_fds()
    left = [1]

    def dup(fd: int) -> int:
        if not left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        left.pop()
        return real(fd)

    monkeypatch.setattr(os, "dup", dup)
    with pytest.raises(EOFError, match="can't wait"):
        connection.send(b"with files", [fd, fd])
    assert open_fds() == before


def test_the_peer_s_process_is_known(pair: Pair) -> None:
    _, theirs = pair
    assert peer_process(theirs) == os.getpid()
