from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from viommu.ipc.packets import PacketSocket, discard, hung_up
from viommu.ipc.protocol import MAX_REQUEST, Packet
from viommu.vfio_user.connection import receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pair:
    def __init__(self) -> None:
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.setblocking(False)
        self.packets = PacketSocket(ours)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.packets.close()
    pair.peer.close()


def test_packets_stay_apart(pair: Pair) -> None:
    assert pair.packets.receive() is None
    pair.peer.send(b"one")
    pair.peer.send(b"two")

    assert [pair.packets.receive() for _ in range(3)] == [b"one", b"two", None]


def test_a_packet_that_is_too_long_can_be_told(pair: Pair) -> None:
    pair.peer.send(bytes(10 * MAX_REQUEST))
    data = pair.packets.receive()

    assert data is not None
    assert len(data) == MAX_REQUEST + 1
    assert pair.packets.receive() is None


def test_files_of_a_client_are_closed(pair: Pair) -> None:
    reader, writer = os.pipe()
    send(pair.peer, b"take this", [writer])
    os.close(writer)

    assert pair.packets.receive() == b"take this"
    assert os.read(reader, 1) == b""  # nobody has the other end
    os.close(reader)


@pytest.mark.parametrize("word", [b"", b"last"])
def test_the_end_comes_behind_what_was_sent(pair: Pair, word: bytes) -> None:
    if word:
        pair.peer.send(word)
    pair.peer.close()

    assert pair.packets.hung_up
    if word:
        assert pair.packets.receive() == word
    with pytest.raises(EOFError):
        pair.packets.receive()


def test_an_empty_packet_is_an_end_too(pair: Pair) -> None:
    pair.peer.send(b"")

    with pytest.raises(EOFError):
        pair.packets.receive()


def test_a_client_that_reset_the_connection_is_gone(pair: Pair) -> None:
    pair.packets.send([Packet(b"unread")])
    pair.peer.close()

    with pytest.raises(EOFError):
        pair.packets.receive()
    with pytest.raises(EOFError):
        pair.packets.send([Packet(b"more")])


def test_what_does_not_fit_waits(pair: Pair) -> None:
    sent = [bytes([n]) * 40_000 for n in range(20)]
    pair.packets.send(Packet(data) for data in sent)
    assert pair.packets.backlog

    got: list[bytes] = []
    while len(got) < len(sent):
        got.append(pair.peer.recv(1 << 16))
        pair.packets.flush()
    assert got == sent
    assert not pair.packets.backlog


def test_file_descriptors_are_closed_when_they_are_sent_and_when_they_are_not(pair: Pair) -> None:
    reader, writer = os.pipe()
    pair.packets.send([Packet(b"x", (writer,))])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(writer)
    data, fds, _ = receive(pair.peer, 10)
    assert data == b"x"
    pair.packets.send([Packet(bytes(40_000))] * 20)
    pair.packets.send([Packet(b"y", (fds[0],))])
    before = pair.packets.backlog
    pair.packets.say_no_more()
    assert (before, pair.packets.backlog) == (True, False)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_client_is_told_of_the_end_and_its_own_is_seen_unread(pair: Pair) -> None:
    pair.packets.say_no_more()
    assert pair.peer.recv(10) == b""
    pair.peer.send(b"but")
    before = pair.packets.hung_up
    pair.peer.close()
    assert (before, pair.packets.hung_up) == (False, True)
    pair.packets.say_no_more()


def test_what_goes_nowhere_is_closed() -> None:
    reader, writer = os.pipe()
    discard([Packet(b"", (writer,)), Packet(b"")])

    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_socket_whose_peer_is_there() -> None:
    one, other = socket.socketpair()
    assert not hung_up(one)
    other.close()
    assert hung_up(one)
    one.close()
