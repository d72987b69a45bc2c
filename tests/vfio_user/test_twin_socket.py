"""A device that asks for memory on a socket of its own, as libvfio-user's do."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import PAGE, Clock, open_fds
from tests.vfio_user.raw_device import RawDevice, ended, refusal, reply_to
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import requests
from viommu.vfio_user.connection import receive
from viommu.vfio_user.protocol import Capabilities, decode_version, encode_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ = spec.HEADER.pack(9, Command.DMA_READ, 32, 0, 0) + spec.DMA_ACCESS.pack(0, 4)
ANSWER = spec.VERSION.pack(0, 0) + (
    b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true,"fd_index":0}}}\0'
)


@pytest.fixture
def memory(memfd: Callable[..., int], files: MappedFiles) -> Iterator[GuestMemory]:
    memory = GuestMemory()
    file = files.get(memfd(), 0, PAGE, writable=True)
    memory.map(0, PAGE, readable=True, writable=True, file=file)
    memory.write(0, b"data")
    yield memory
    memory.close()


@pytest.fixture
def untold(make_device: Callable[..., RawDevice], memory: GuestMemory) -> RawDevice:
    """A device that has not answered the client's VERSION."""
    return make_device(memory=memory, agreed=False)


@pytest.fixture
def twin() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's end, which a device closes when it has sent it, and the device's."""
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    with theirs, ours:
        yield theirs, ours


Twin = tuple[socket.socket, socket.socket]


def agree(device: RawDevice, twin: Twin) -> socket.socket:
    """Answer the VERSION with a twin socket; return the device's end of it."""
    theirs, ours = twin
    device.send(reply_to(device.hello, ANSWER), [theirs.fileno()])
    theirs.close()
    assert device.agreed()
    return ours


def test_it_is_offered_by_whoever_serves_memory(
    untold: RawDevice, make_device: Callable[..., RawDevice]
) -> None:
    assert decode_version(untold.hello.payload)[1].twin_socket
    assert not decode_version(make_device().hello.payload)[1].twin_socket


def test_a_device_that_has_none(untold: RawDevice) -> None:
    untold.send(reply_to(untold.hello, encode_version(0, Capabilities(8))))
    assert untold.agreed()
    untold.send(READ)
    assert untold.next().payload == spec.DMA_ACCESS.pack(0, 4) + b"data"


def test_answers_go_where_the_question_came_from(untold: RawDevice, twin: Twin) -> None:
    ours = agree(untold, twin)
    assert untold.client.capabilities.twin_socket
    deferred = untold.client.submit(requests.reset())
    reset = untold.next()
    ours.send(READ)
    untold.turn()
    assert ours.recv(99)[16:] == spec.DMA_ACCESS.pack(0, 4) + b"data"
    assert untold.look() is None, "the other socket is for the client's requests"
    untold.send(reply_to(reset))
    deferred.result()
    untold.send(READ)  # not forbidden
    assert untold.next().payload == spec.DMA_ACCESS.pack(0, 4) + b"data"
    assert untold.client.dma.reads == 2


def test_what_does_not_fit_is_sent_later(
    untold: RawDevice, twin: Twin, memory: GuestMemory, memfd: Callable[..., int]
) -> None:
    size = 1 << 20
    file = MappedFiles().get(memfd(size), 0, size, writable=True)
    memory.map(1 << 30, size, readable=True, writable=True, file=file)
    ours = agree(untold, twin)
    ours.send(READ[:16] + spec.DMA_ACCESS.pack(1 << 30, size))
    untold.turn()
    assert untold.has_backlog()
    got = 0
    while untold.has_backlog():
        got += len(receive(ours, 1 << 16).data)
        untold.turn()
    while got < 32 + size:
        got += len(receive(ours, 1 << 16).data)


def test_files_in_a_question_are_closed(
    untold: RawDevice, twin: Twin, memfd: Callable[..., int]
) -> None:
    ours = agree(untold, twin)
    before = open_fds()
    socket.send_fds(ours, [READ], [memfd()])
    untold.turn()
    assert ours.recv(99)[12] == errno.EINVAL
    assert open_fds() == before + 1


def test_a_reply_there_is_nonsense(untold: RawDevice, twin: Twin) -> None:
    ours = agree(untold, twin)
    deferred = untold.client.submit(requests.reset())
    ours.send(reply_to(untold.next()))
    untold.turn()
    assert refusal(deferred) == errno.EPROTO
    assert ended(untold, errno.EPROTO)


def test_a_message_that_can_not_be_there(untold: RawDevice, twin: Twin) -> None:
    agree(untold, twin).send(b"\xff" * 16)
    untold.turn()
    assert ended(untold, errno.EPROTO)


def test_both_end_together(untold: RawDevice, twin: Twin) -> None:
    ours = agree(untold, twin)
    ours.close()
    untold.turn()
    assert ended(untold, errno.ECONNRESET)


def test_the_twin_is_closed_with_the_other(untold: RawDevice, twin: Twin, clock: Clock) -> None:
    ours = agree(untold, twin)
    untold.client.submit(requests.reset())
    clock.now = 9
    untold.turn()
    assert ended(untold, errno.ETIMEDOUT)
    assert ours.recv(1) == b""


def test_none_comes(untold: RawDevice) -> None:
    untold.send(reply_to(untold.hello, ANSWER))
    assert ended(untold, errno.EPROTO)


def test_too_many_come(untold: RawDevice, memfd: Callable[..., int]) -> None:
    untold.send(reply_to(untold.hello, ANSWER), [memfd(), memfd()])
    assert ended(untold, errno.EPROTO)


def test_no_socket_comes(untold: RawDevice, memfd: Callable[..., int]) -> None:
    untold.send(reply_to(untold.hello, ANSWER), [memfd()])
    assert ended(untold, errno.EPROTO)
    assert "twin socket" in str(untold.client.ended)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_another_kind_of_socket_comes(untold: RawDevice, kind: socket.SocketKind) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other:
        untold.send(reply_to(untold.hello, ANSWER), [one.fileno()])
    assert ended(untold, errno.EPROTO)
