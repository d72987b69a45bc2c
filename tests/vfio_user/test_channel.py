from __future__ import annotations

import errno
import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from viommu.errors import PeerError
from viommu.spec import vfio_user as spec
from viommu.vfio_user.channel import Channel
from viommu.vfio_user.connection import send
from viommu.vfio_user.protocol import command_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A channel that gives up after 10 ms, and the server's end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen()
        channel = Channel(tmp_path / "s", timeout=0.01)
        server, _ = listener.accept()
        with server:
            yield channel, server
        channel.close()


def fails(call: Callable[[], object], number: int) -> None:
    with pytest.raises(PeerError) as caught:
        call()
    assert caught.value.errno == number


def soon() -> float:
    return time.monotonic() + 0.01


def test_messages_go_both_ways(pair: Pair, memfd: Callable[..., int]) -> None:
    channel, server = pair
    message = command_message(1, 9, b"question")
    channel.send(message)
    assert server.recv(99) == message
    server.send(command_message(2, 9, b"ans"))
    send(server, command_message(3, 9, b""), [memfd()])
    assert channel.receive(soon()).payload == b"ans"
    received = channel.receive(soon())
    assert len(received.fds) == 1
    os.close(received.fds[0])


def test_what_has_arrived_is_taken_after_the_deadline(pair: Pair) -> None:
    channel, server = pair
    server.send(command_message(1, 9, b""))
    assert channel.receive(time.monotonic() - 1).id == 1


@pytest.mark.parametrize("sent", [b"", b"header", command_message(1, 9, b"body")[:-1]])
def test_silence_closes(pair: Pair, sent: bytes) -> None:
    channel, server = pair
    server.send(sent)
    fails(lambda: channel.receive(soon()), errno.ETIMEDOUT)
    assert channel.fileno() == -1
    fails(lambda: channel.receive(soon()), errno.ENOTCONN)
    fails(lambda: channel.send(b"x"), errno.ENOTCONN)


def test_a_deaf_peer_closes(pair: Pair) -> None:
    channel, _ = pair
    fails(lambda: channel.send(bytes(1 << 24)), errno.ETIMEDOUT)
    assert channel.fileno() == -1


@pytest.mark.parametrize("size", [0, 15, spec.MAX_MESSAGE + 1, 2**32 - 1])
def test_an_impossible_size_closes(pair: Pair, memfd: Callable[..., int], size: int) -> None:
    channel, server = pair
    send(server, spec.HEADER.pack(1, 9, size, 1, 0), [memfd()])
    fails(lambda: channel.receive(soon()), errno.EPROTO)
    assert channel.fileno() == -1


@pytest.mark.parametrize("sent", [b"", b"half"])
def test_a_peer_that_leaves_closes(pair: Pair, sent: bytes) -> None:
    channel, server = pair
    server.send(sent)
    server.close()
    fails(lambda: channel.receive(soon()), errno.ECONNRESET)


def test_a_peer_that_left_cannot_be_sent_to(pair: Pair) -> None:
    channel, server = pair
    server.close()
    fails(lambda: channel.send(b"x"), errno.ECONNRESET)


def test_fds_of_half_a_message_are_closed(pair: Pair, memfd: Callable[..., int]) -> None:
    channel, server = pair
    send(server, b"half", [memfd()])
    fails(lambda: channel.receive(soon()), errno.ETIMEDOUT)


def test_nobody_accepts(tmp_path: Path) -> None:
    path = tmp_path / "busy"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(os.fspath(path))
        listener.listen(0)
        other.connect(os.fspath(path))
        fails(lambda: Channel(path, timeout=0.01), errno.EAGAIN)
