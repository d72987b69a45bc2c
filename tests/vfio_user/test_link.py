from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import open_fds
from viommu.spec import vfio_user as spec
from viommu.vfio_user.connection import receive, send
from viommu.vfio_user.link import Link
from viommu.vfio_user.protocol import command_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.errors import PeerError
    from viommu.loop import Loop
    from viommu.vfio_user.protocol import Message

MAX_QUEUED = 1 << 20


class End:
    """A link, and the other end of its socket."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.taken: list[Message] = []
        self.lost: list[PeerError] = []
        self.more = True
        self.link = Link(
            loop,
            ours,
            take=self.take,
            lost=self.lost.append,
            max_message=spec.MAX_MESSAGE,
            max_queued=MAX_QUEUED,
            messages_per_turn=4,
            bytes_per_turn=1000,
        )

    def take(self, message: Message) -> bool:
        self.taken.append(message)
        return self.more

    def turn(self) -> None:
        self.loop.turn(0)

    def fill(self) -> int:
        """Send until something has to wait; return how much was sent."""
        sent = 0
        while not self.link.queued_bytes:
            self.link.send(bytes(1 << 16))
            sent += 1 << 16
        return sent

    def read(self) -> int:
        """Read what is there; return how much that was."""
        total = 0
        while True:
            try:
                data, fds, _ = receive(self.socket, 1 << 16)
            except BlockingIOError:
                return total
            for fd in fds:
                os.close(fd)
            total += len(data)


@pytest.fixture
def end(loop: Loop) -> Iterator[End]:
    before = open_fds()
    end = End(loop)
    yield end
    end.link.close()
    end.link.close()
    end.socket.close()
    loop.turn(0)
    assert open_fds() == before


def messages(count: int) -> bytes:
    return b"".join(command_message(n, 1, bytes(n)) for n in range(count))


def test_messages_come_in_order(end: End) -> None:
    end.socket.send(messages(3))
    end.turn()
    assert [(m.id, len(m.payload)) for m in end.taken] == [(0, 0), (1, 1), (2, 2)]
    assert end.lost == []


def test_others_have_their_turn(end: End) -> None:
    end.socket.send(messages(10))
    end.turn()
    assert len(end.taken) == 4
    end.turn()
    end.turn()
    assert len(end.taken) == 10


def test_large_messages_have_fewer_in_a_turn(end: End) -> None:
    end.socket.send(command_message(1, 1, bytes(600)) * 4)
    end.turn()
    assert len(end.taken) == 2
    end.turn()
    assert len(end.taken) == 4


def test_whoever_expects_no_more_has_the_rest_later(end: End) -> None:
    end.more = False
    end.socket.send(messages(2))
    end.turn()
    assert len(end.taken) == 1
    end.turn()
    assert len(end.taken) == 2


def test_files_that_are_not_taken_are_closed(end: End, memfd: Callable[..., int]) -> None:
    before = open_fds()
    send(end.socket, messages(1), [memfd()])
    end.turn()
    assert end.taken[0].fds == []
    assert open_fds() == before + 1


def test_a_link_may_be_closed_by_what_it_brings(end: End) -> None:
    def take(message: Message) -> bool:
        end.taken.append(message)
        end.link.close()
        return True

    end.link._take = take
    end.socket.send(messages(3))
    end.turn()
    assert len(end.taken) == 1
    assert end.link.fileno() == -1
    end.link.send(b"nobody")
    end.turn()
    assert end.lost == []


def test_what_does_not_fit_is_sent_later(end: End, memfd: Callable[..., int]) -> None:
    sent = end.fill()
    assert end.link.sending
    end.link.send(b"with a file", [memfd()])
    got = 0
    while got < sent + len(b"with a file"):
        got += end.read()
        end.turn()
    assert end.link.queued_bytes == 0
    end.turn()


def test_a_peer_that_does_not_read_is_read_from(end: End) -> None:
    end.fill()
    end.socket.send(messages(2))
    end.turn()
    assert len(end.taken) == 2


def test_a_peer_that_has_too_much_coming_must_read_first(end: End) -> None:
    sent = end.fill()
    end.link.send(bytes(MAX_QUEUED))
    end.socket.send(messages(2))
    end.turn()
    end.turn()
    assert end.taken == []
    got = 0
    while got < sent + MAX_QUEUED:
        got += end.read()
        end.turn()
    end.turn()
    assert len(end.taken) == 2


def test_a_peer_that_had_too_much_coming_may_go(end: End) -> None:
    end.fill()
    end.link.send(bytes(MAX_QUEUED))
    end.socket.send(messages(1))
    end.turn()
    end.socket.close()
    end.turn()
    assert [error.errno for error in end.lost] == [errno.ECONNRESET]


def test_the_end_is_told_once_and_by_the_loop(end: End) -> None:
    end.socket.send(messages(1))
    end.socket.close()
    end.link.send(b"1")
    end.link.send(b"2")
    assert end.link.sending
    assert end.lost == []
    end.turn()
    assert len(end.taken) == 1
    assert [error.errno for error in end.lost] == [errno.ECONNRESET]
    assert "the server has gone" in str(end.lost[0])


@pytest.mark.parametrize("size", [0, 15, spec.MAX_MESSAGE + 1, 2**32 - 1])
def test_what_is_no_message(end: End, memfd: Callable[..., int], size: int) -> None:
    send(end.socket, spec.HEADER.pack(1, 9, size, 1, 0), [memfd()])
    end.turn()
    assert [error.errno for error in end.lost] == [errno.EPROTO]
