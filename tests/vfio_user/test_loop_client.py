from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import PAGE, Clock
from tests.vfio_user.raw_device import (
    THEIRS,
    RawDevice,
    ended,
    error_to,
    refusal,
    region,
    reply_to,
)
from viommu.deferred import Deferred
from viommu.errors import PeerError, UsageError, ViommuError
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import ClientLimits, LoopClient, RegionInfo, dial, requests, wait
from viommu.vfio_user.connection import close_fds
from viommu.vfio_user.protocol import Capabilities, decode_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from viommu.loop import Loop

INFO = spec.DEVICE_INFO.pack(16, 3, 9, 5)
READ = spec.DMA_ACCESS.pack(0, 4)


# --- negotiation


def test_it_negotiates_at_once(make_device: Callable[..., RawDevice]) -> None:
    device = make_device(agreed=False)
    assert device.hello.command == Command.VERSION
    minor, ours = decode_version(device.hello.payload)
    assert minor == spec.VERSION_MINOR
    assert ours == Capabilities(16, write_multiple=True)
    assert not ours.serves_dma
    assert not device.agreed()
    device.agree(Capabilities(8), minor=0)
    assert device.agreed()
    assert (device.client.minor, device.client.capabilities) == (0, Capabilities(8))
    assert device.client.fileno() >= 0


def test_one_who_serves_memory_says_what_qemu_says(make_device: Callable[..., RawDevice]) -> None:
    device = make_device(memory=GuestMemory())
    assert decode_version(device.hello.payload)[1].serves_dma


def test_more_can_be_transferred_where_both_say_so(make_device: Callable[..., RawDevice]) -> None:
    size = 2 << 20
    device = make_device(offers=Capabilities(16, size), agreed=False)
    device.agree(Capabilities(8, 4 << 20))
    deferred = device.client.submit(requests.region_read(0, 0, size))
    message = device.next()
    data = reply_to(message, message.payload + bytes(size))
    while data:
        data = data[device.socket.send(data) :]
        device.turn(1)
    assert deferred.result() == bytes(size)


def test_offers_can_be_chosen(make_device: Callable[..., RawDevice]) -> None:
    offers = Capabilities(3, max_data_xfer_size=PAGE)
    device = make_device(offers=offers)
    assert decode_version(device.hello.payload)[1] == offers
    assert device.client.capabilities == Capabilities(8, max_data_xfer_size=PAGE)


def test_requests_wait_for_the_version(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    device = make_device(agreed=False)
    fd = os.dup(memfd())
    mapped = device.client.submit(requests.dma_map(0, PAGE, fd=fd))
    asked = device.client.submit(requests.device_info())
    assert device.client.post(requests.region_write(0, 0, b"1234")) is None
    os.close(fd)  # it is the client's own by now
    device.turn()
    assert device.look() is None
    assert device.client.outstanding == 4
    order: list[int] = []
    device.client.negotiated.then(
        lambda _: order.append(device.client.submit(requests.reset()).done)
    )
    device.agree()
    first, second, third, last = (device.next() for _ in range(4))
    assert (first.command, len(first.fds)) == (Command.DMA_MAP, 1)
    close_fds(first.fds)
    assert (second.command, third.command) == (Command.DEVICE_GET_INFO, Command.REGION_WRITE)
    assert third.no_reply
    assert last.command == Command.DEVICE_RESET, "later than those that waited"
    device.send(reply_to(first))
    device.send(reply_to(second, INFO))
    assert mapped.done
    assert asked.result().num_regions == 9


def test_what_waited_is_compared_with_what_the_device_takes(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    device = make_device(agreed=False)
    deferred = device.client.submit(requests.dma_map(0, PAGE, fd=memfd()))
    device.agree(Capabilities(0))
    with pytest.raises(UsageError, match="the server takes 0"):
        deferred.result()
    device.turn()
    assert device.look() is None
    assert not device.client.closed


def test_closing_when_the_first_is_refused(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    device = make_device(agreed=False)
    refused = device.client.submit(requests.dma_map(0, PAGE, fd=memfd()))
    refused.then(lambda _: device.client.close())
    other = device.client.submit(requests.dma_map(0, PAGE, fd=memfd()))
    device.agree(Capabilities(0))
    with pytest.raises(UsageError):
        refused.result()
    assert refusal(other) == errno.ENOTCONN
    assert refusal(device.client.negotiated) == errno.ENOTCONN


VERSIONS = {
    "another major": spec.VERSION.pack(1, 0) + b"{}\0",
    "higher minor": spec.VERSION.pack(0, 2) + b"{}\0",
    "no NUL": spec.VERSION.pack(0, 0) + b"{}",
    "nothing": b"",
}


@pytest.mark.parametrize("payload", VERSIONS.values(), ids=VERSIONS)
def test_a_version_that_was_not_offered(
    make_device: Callable[..., RawDevice], payload: bytes
) -> None:
    device = make_device(agreed=False)
    waiting = device.client.submit(requests.reset())
    device.send(reply_to(device.hello, payload))
    assert ended(device, errno.EPROTO)
    assert refusal(device.client.negotiated) == errno.EPROTO
    assert refusal(waiting) == errno.EPROTO


def test_a_device_that_refuses_to_talk(make_device: Callable[..., RawDevice]) -> None:
    device = make_device(agreed=False)
    device.send(error_to(device.hello, errno.EINVAL))
    assert ended(device, errno.EINVAL)
    assert refusal(device.client.negotiated) == errno.EINVAL


def test_a_device_that_says_nothing(
    make_device: Callable[..., RawDevice], clock: Clock, memfd: Callable[..., int]
) -> None:
    device = make_device(agreed=False, timeout=2)
    waiting = device.client.submit(requests.dma_map(0, PAGE, fd=memfd()), timeout=99)
    clock.now = 2
    device.turn()
    assert ended(device, errno.ETIMEDOUT)
    assert refusal(device.client.negotiated) == errno.ETIMEDOUT
    assert refusal(waiting) == errno.ETIMEDOUT


def test_a_device_that_has_gone_before_we_came(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    ends: list[PeerError] = []
    client = LoopClient(loop, ours, on_closed=ends.append)
    assert not client.closed, "nothing is told before the loop turns"
    assert client.sending
    loop.turn(0)
    assert refusal(client.negotiated) == errno.ECONNRESET
    assert [error.errno for error in ends] == [errno.ECONNRESET]
    assert not client.sending


# --- requests and replies


def test_replies_come_in_any_order(device: RawDevice) -> None:
    deferreds = [device.client.submit(requests.region_read(0, n, 1)) for n in range(5)]
    assert device.client.outstanding == 5
    messages = [device.next() for _ in range(5)]
    assert len({message.id for message in messages}) == 5
    for number in (3, 0, 4, 1, 2):
        head = messages[number].payload
        device.send(reply_to(messages[number], head + bytes([number])))
        assert deferreds[number].result() == bytes([number])
    assert device.client.outstanding == 0


def test_an_error_ends_nothing(device: RawDevice) -> None:
    first, second = (device.client.submit(requests.region_read(0, n, 4)) for n in range(2))
    message, other = device.next(), device.next()
    # libvfio-user answers a short access so: an error with a payload.
    device.send(error_to(message, errno.EINVAL, message.payload + b"1234"))
    device.send(reply_to(other, other.payload + b"data"))
    assert refusal(first) == errno.EINVAL
    assert second.result() == b"data"
    assert device.ends == []


def test_posted_requests_are_not_waited_for(device: RawDevice) -> None:
    assert device.client.post(requests.region_write(0, 0x80, b"1234")) is None
    message = device.next()
    assert message.no_reply
    assert message.payload == spec.REGION_ACCESS.pack(0x80, 0, 4) + b"1234"
    assert device.client.outstanding == 0


def test_files_are_not_posted(device: RawDevice, memfd: Callable[..., int]) -> None:
    refusal = device.client.post(requests.dma_map(0, PAGE, fd=memfd()))
    assert isinstance(refusal, UsageError)


def test_more_than_the_device_takes_is_not_sent(device: RawDevice) -> None:
    deferred = device.client.submit(requests.region_read(0, 0, (1 << 20) + 1))
    with pytest.raises(UsageError, match="1048577"):
        deferred.result()
    assert isinstance(device.client.post(requests.region_write(0, 0, bytes(1 << 21))), UsageError)
    device.turn()
    assert device.look() is None
    assert not device.client.closed


def test_whoever_is_told_may_ask_again(device: RawDevice) -> None:
    answers: list[bytes] = []

    def again(deferred: Deferred[bytes]) -> None:
        answers.append(deferred.result())
        if len(answers) < 3:
            device.client.submit(requests.region_read(0, len(answers), 1)).then(again)

    device.client.submit(requests.region_read(0, 0, 1)).then(again)
    for _ in range(3):
        message = device.next()
        device.send(reply_to(message, message.payload + message.payload[:1]))
    assert answers == [b"\0", b"\1", b"\2"]


def test_whoever_is_told_may_close(device: RawDevice) -> None:
    device.client.submit(requests.reset()).then(lambda _: device.client.close())
    other = device.client.submit(requests.reset())
    messages = [device.next(), device.next()]
    device.send(b"".join(map(reply_to, messages)))
    assert device.client.closed
    assert refusal(other) == errno.ENOTCONN
    assert device.ends == [], "its owner knows"


def test_a_device_that_is_given_up_is_lost_as_any_other(device: RawDevice) -> None:
    deferred = device.client.submit(requests.reset())
    why = PeerError(errno.EPROTO, "it keeps what was taken from it")
    device.client.give_up(why)
    assert refusal(deferred) == errno.EPROTO
    assert device.ends == [], "its owner may be who has given it up"
    device.turn()
    assert device.ends == [why]
    device.client.give_up(why)
    assert ended(device, errno.EPROTO)


def test_a_message_in_pieces(device: RawDevice) -> None:
    deferred = device.client.submit(requests.device_info())
    data = reply_to(device.next(), INFO)
    for index in range(len(data)):
        assert not deferred.done
        device.send(data[index : index + 1])
    assert deferred.result() == (3, 9, 5)


# --- descriptions


def test_a_region_that_needs_more_room(device: RawDevice, memfd: Callable[..., int]) -> None:
    fd = memfd()
    deferred = device.client.region_info(1)
    message = device.next()
    assert vfio.REGION_INFO.unpack(message.payload)[0] == 32
    device.send(reply_to(message, region(64)), [fd])  # too early, but harmless
    message = device.next()
    assert vfio.REGION_INFO.unpack(message.payload)[0] == 64
    device.send(reply_to(message, region(64, (0, 0x1000))), [fd])
    info = deferred.result()
    assert info.fd is not None
    assert os.fstat(info.fd).st_ino == os.fstat(fd).st_ino
    os.close(info.fd)
    assert info._replace(fd=None) == RegionInfo(0x8000, 7, None, 0x100, ((0, 0x1000),))


@pytest.mark.parametrize("needed", [[64, 65], [2**32 - 1]], ids=["grows", "huge"])
def test_a_region_that_never_fits(
    device: RawDevice, memfd: Callable[..., int], needed: list[int]
) -> None:
    deferred = device.client.region_info(1)
    for size in needed:
        device.send(reply_to(device.next(), region(size)), [memfd()])
    assert ended(device, errno.EPROTO)
    assert refusal(deferred) == errno.EPROTO


def test_a_region_that_is_refused(device: RawDevice) -> None:
    deferred = device.client.region_info(99)
    device.send(error_to(device.next(), errno.EINVAL))
    assert refusal(deferred) == errno.EINVAL
    assert not device.client.closed


def test_parts_of_a_region(device: RawDevice, eventfd: Callable[..., int]) -> None:
    fds = [eventfd(), eventfd()]
    deferred = device.client.region_io_fds(1)
    head = struct.pack("<IIII", 112, 0, 1, 2)
    device.send(reply_to(device.next(), head))  # libvfio-user says how many there are
    message = device.next()
    assert struct.unpack("<IIII", message.payload) == (112, 0, 1, 0)
    rows = b"".join(struct.pack("<QQIIIIQQ", 4 * n, 4, n, 0, 0, 0, 0, n) for n in range(2))
    device.send(reply_to(message, head + rows), fds)
    reply = deferred.result()
    for part, fd in zip(reply.parts, reply.fds, strict=True):
        os.eventfd_write(fd, part.data + 1)
        os.close(fd)
    assert [os.eventfd_read(fd) for fd in fds] == [1, 2]


@pytest.mark.parametrize("needed", [[56, 57], [2**32 - 1]], ids=["grows", "huge"])
def test_parts_that_never_fit(
    device: RawDevice, eventfd: Callable[..., int], needed: list[int]
) -> None:
    deferred = device.client.region_io_fds(1)
    part = struct.pack("<QQIIIIQ", 0, 4, 0, 0, 0, 0, 0)
    for size in needed:
        message = device.next()
        room = struct.unpack_from("<I", message.payload)[0]
        head = struct.pack("<IIII", size, 0, 1, 1)
        device.send(reply_to(message, (head + part)[:room]), [eventfd()])  # none may stay open
    assert ended(device, errno.EPROTO)
    assert refusal(deferred) == errno.EPROTO


# --- the device's memory


@pytest.fixture
def memory(memfd: Callable[..., int], files: MappedFiles) -> Iterator[GuestMemory]:
    memory = GuestMemory()
    file = files.get(memfd(1 << 20), 0, 1 << 20, writable=True)
    memory.map(0, 1 << 20, readable=True, writable=True, file=file)
    yield memory
    memory.close()


def test_memory_is_served_at_any_moment(
    make_device: Callable[..., RawDevice], memory: GuestMemory
) -> None:
    device = make_device(agreed=False, memory=memory)
    memory.write(0, b"data")
    device.ask(Command.DMA_READ, READ)  # before anything was agreed upon
    message = device.next()
    assert (message.id, message.flags, message.payload) == (9, spec.F_TYPE_REPLY, READ + b"data")
    device.agree()
    deferred = device.client.submit(requests.reset())
    reset = device.next()
    device.ask(Command.DMA_WRITE, READ + b"news")
    assert device.next().payload == READ
    device.ask(Command.DMA_WRITE, READ + b"post", flags=spec.F_NO_REPLY)
    assert memory.read(0, 4) == b"post"
    device.ask(Command.DMA_READ, spec.DMA_ACCESS.pack(1 << 30, 4))
    assert (message := device.next()).error == errno.ENODEV
    assert message.payload == b""
    assert not deferred.done
    device.send(reply_to(reset))
    deferred.result()
    dma = device.client.dma
    assert (dma.commands, dma.reads, dma.writes, dma.refused) == (4, 1, 2, 1)


def test_files_in_a_command_are_closed(
    make_device: Callable[..., RawDevice], memory: GuestMemory, memfd: Callable[..., int]
) -> None:
    device = make_device(memory=memory)
    device.ask(Command.DMA_READ, READ, [memfd(), memfd()])
    assert device.next().error == errno.EINVAL


def flood(device: RawDevice, message: bytes) -> int:
    """Send a message until no more is taken; return how often."""
    sent = 0
    while True:
        try:
            device.socket.send(message)
        except BlockingIOError:
            return sent
        sent += 1
        device.turn(1)


def test_a_device_that_asks_and_does_not_listen(
    make_device: Callable[..., RawDevice], memory: GuestMemory
) -> None:
    """What it may have coming is bounded; then it isn't read from until it takes some."""
    limits = ClientLimits(max_queued_bytes=1 << 16)
    device = make_device(memory=memory, limits=limits)
    half = spec.DMA_ACCESS.pack(0, 1 << 19)
    message = spec.HEADER.pack(9, Command.DMA_READ, 32, 0, 0) + half
    asked = flood(device, message)
    served = device.client.dma.reads
    assert (1 << 20) // (1 << 19) < served < 8 < asked
    assert not device.client.has_room_for(requests.reset())
    assert refusal(device.client.submit(requests.reset())) == errno.ENOBUFS
    for _ in range(asked):
        assert len(device.next().payload) == 16 + (1 << 19)
    assert device.client.dma.reads == asked
    assert not device.has_backlog()


def test_it_is_read_from_while_it_only_does_not_take_requests(
    make_device: Callable[..., RawDevice], memory: GuestMemory
) -> None:
    """A device that is busy with writing to us must be able to finish."""
    device = make_device(memory=memory, limits=ClientLimits(max_queued_bytes=1 << 20))
    while not device.has_backlog():
        assert device.client.post(requests.region_write(0, 0, bytes(1 << 16))) is None
    memory.write(0, b"data")
    device.ask(Command.DMA_READ, READ)
    assert device.client.dma.reads == 1


# --- the end


def test_closing(device: RawDevice) -> None:
    deferreds = [device.client.submit(requests.reset()) for _ in range(2)]
    device.client.close()
    device.client.close()
    assert [refusal(deferred) for deferred in deferreds] == [errno.ENOTCONN] * 2
    assert device.ends == []
    assert refusal(device.client.region_info(0)) == errno.ENOTCONN
    device.turn()


def test_closing_before_the_version(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    device = make_device(agreed=False)
    waiting = device.client.submit(requests.dma_map(0, PAGE, fd=memfd()))
    device.client.post(requests.reset())
    device.client.close()
    assert refusal(waiting) == errno.ENOTCONN
    assert refusal(device.client.negotiated) == errno.ENOTCONN


def test_closing_with_something_to_send(device: RawDevice, memfd: Callable[..., int]) -> None:
    while not device.has_backlog():
        device.client.post(requests.region_write(0, 0, bytes(1 << 12)))
    deferred = device.client.submit(requests.dma_map(0, PAGE, fd=memfd()))
    device.client.close()
    assert refusal(deferred) == errno.ENOTCONN
    device.turn()


def test_closing_is_quiet_when_the_device_has_gone(device: RawDevice) -> None:
    device.socket.close()
    device.client.post(requests.reset())
    device.client.close()
    device.turn()
    assert device.ends == []


# --- connecting and waiting


def test_dialling(tmp_path: Path, loop: Loop) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        client = LoopClient(loop, dial(path))
        theirs, _ = listener.accept()
        with theirs:
            assert theirs.recv(4096)[16:20] == spec.VERSION.pack(0, 1)
        client.close()


def test_dialling_in_vain(tmp_path: Path) -> None:
    paths: list[tuple[Path, int]] = [
        (tmp_path / "missing", errno.ENOENT),
        (tmp_path / ("x" * 200), errno.ENAMETOOLONG),
        (tmp_path / "file", errno.ECONNREFUSED),
        (tmp_path / "busy", errno.EAGAIN),
    ]
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(os.fspath(tmp_path / "busy"))
        listener.listen(0)
        other.connect(os.fspath(tmp_path / "busy"))
        for path, number in paths:
            with pytest.raises(PeerError, match="can't connect to") as caught:
                dial(path)
            assert caught.value.errno == number


def test_waiting(loop: Loop, clock: Clock) -> None:
    deferred: Deferred[int] = Deferred()
    loop.call_soon(lambda: loop.call_soon(lambda: deferred.resolve(5)))
    assert wait(loop, deferred) == 5
    assert wait(loop, deferred, 0) == 5


def test_waiting_in_vain(loop: Loop, clock: Clock) -> None:
    def later() -> None:
        clock.now += 1
        loop.call_soon(later)

    later()
    with pytest.raises(PeerError) as caught:
        wait(loop, Deferred[int](), timeout=3)
    assert caught.value.errno == errno.ETIMEDOUT
    refused: Deferred[int] = Deferred()
    refused.refuse(ViommuError("no"))
    with pytest.raises(ViommuError, match="no"):
        wait(loop, refused)


def test_what_theirs_stands_for() -> None:
    assert THEIRS.write_multiple
    assert THEIRS.max_msg_fds == 8
