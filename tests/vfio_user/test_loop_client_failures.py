"""A device that is slow, deaf, gone, or lies."""

from __future__ import annotations

import errno
import math
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.vfio_user.conftest import PAGE, Clock
from tests.vfio_user.raw_device import RawDevice, ended, refusal, region, reply_to
from viommu.errors import PeerError
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import ClientLimits, requests
from viommu.vfio_user.connection import close_fds

if TYPE_CHECKING:
    from collections.abc import Callable


INFO = spec.DEVICE_INFO.pack(16, 3, 9, 5)


# --- time-outs


def test_a_request_has_its_own_time(device: RawDevice, clock: Clock) -> None:
    slow = device.client.submit(requests.reset(), timeout=60)
    quick = device.client.submit(requests.device_info(), timeout=1)
    usual = device.client.submit(requests.device_info())
    messages = [device.next() for _ in range(3)]
    clock.now = 0.9
    device.send(reply_to(messages[1], INFO))
    assert quick.done
    clock.now = 4.9  # the quick one's timer finds nothing, the usual one has 5 s
    device.turn()
    device.send(reply_to(messages[2], INFO))
    assert usual.done
    clock.now = 59
    device.turn()
    assert not slow.done
    clock.now = 60
    device.turn()
    assert refusal(slow) == errno.ETIMEDOUT
    assert ended(device, errno.ETIMEDOUT)


def test_what_has_arrived_is_not_too_late(device: RawDevice, clock: Clock) -> None:
    """Whoever has kept the loop busy, the device is not to blame."""
    deferred = device.client.submit(requests.device_info())
    message = device.next()
    clock.now = 99
    device.send(reply_to(message, INFO))
    assert deferred.result() == (3, 9, 5)
    device.turn()
    assert not device.client.closed


def test_more_than_is_read_at_a_time_is_not_too_late(device: RawDevice, clock: Clock) -> None:
    for _ in range(2):
        deferreds = [device.client.submit(requests.device_info()) for _ in range(100)]
        for message in [device.next() for _ in deferreds]:
            device.socket.send(reply_to(message, INFO))
        clock.now += 99
        device.turn(5)
        assert [deferred.result() for deferred in deferreds] == [(3, 9, 5)] * 100
    later = device.client.submit(requests.reset())
    clock.now += 5
    device.turn(1)
    assert refusal(later) == errno.ETIMEDOUT


def test_a_device_that_only_asks_does_not_answer(device: RawDevice, clock: Clock) -> None:
    deferred = device.client.submit(requests.device_info())
    flags = spec.F_TYPE_COMMAND | spec.F_NO_REPLY
    question = spec.HEADER.pack(1, Command.DMA_READ, spec.HEADER_SIZE, flags, 0)
    device.socket.sendall(500 * question)
    clock.now = 5
    device.turn(2)
    assert not deferred.done
    clock.now += 1
    device.turn(1)
    assert refusal(deferred) == errno.ETIMEDOUT
    assert ended(device, errno.ETIMEDOUT)


def test_no_time_passes_when_nothing_is_asked(device: RawDevice, clock: Clock) -> None:
    clock.now = 1e6
    device.turn()
    device.client.submit(requests.reset())
    device.turn()
    assert not device.client.closed


def test_one_may_wait_for_ever(device: RawDevice, clock: Clock) -> None:
    deferred = device.client.submit(requests.reset(), timeout=math.inf)
    message = device.next()
    clock.now = 1e9
    device.turn()
    device.send(reply_to(message))
    assert deferred.done


def test_all_are_refused_when_one_is_late(device: RawDevice, clock: Clock) -> None:
    deferreds = [device.client.submit(requests.reset(), timeout=n) for n in (9, 3, 6)]
    clock.now = 3
    device.turn()
    assert [refusal(deferred) for deferred in deferreds] == [errno.ETIMEDOUT] * 3
    assert ended(device, errno.ETIMEDOUT)


# --- back-pressure


def test_no_more_than_the_limit_is_outstanding(make_device: Callable[..., RawDevice]) -> None:
    device = make_device(limits=ClientLimits(max_outstanding=2))
    deferreds = [device.client.submit(requests.reset()) for _ in range(3)]
    assert refusal(deferreds[2]) == errno.ENOBUFS
    assert isinstance(device.client.post(requests.reset()), PeerError)
    device.send(reply_to(device.next()))
    assert not device.client.submit(requests.reset()).done
    assert not device.client.closed


def test_what_waits_before_the_version_is_limited_as_well(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    fd = memfd()
    limits = ClientLimits(max_outstanding=5, max_fds=1, max_queued_bytes=100)
    device = make_device(agreed=False, limits=limits)
    client = device.client
    assert not client.submit(requests.dma_map(0, PAGE, fd=fd)).done
    assert refusal(client.submit(requests.dma_map(0, PAGE, fd=fd))) == errno.ENOBUFS
    assert refusal(client.submit(requests.region_write(0, 0, bytes(64)))) == errno.ENOBUFS
    assert not client.submit(requests.dma_map(0, PAGE)).done
    assert not client.submit(requests.reset()).done
    assert not client.submit(requests.reset()).done
    assert refusal(client.submit(requests.reset())) == errno.ENOBUFS
    device.agree()
    for _ in range(4):
        message = device.next()
        close_fds(message.fds)
        device.send(reply_to(message))
    assert not client.submit(requests.dma_map(0, PAGE, fd=fd)).done, "there is room again"
    close_fds(device.next().fds)
    assert not client.submit(requests.region_write(0, 0, bytes(64))).done


def test_files_under_way_are_limited(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    device = make_device(limits=ClientLimits(max_fds=4))
    fd = os.dup(memfd())
    submit = device.client.submit
    waiting = [submit(requests.dma_map(0, PAGE, fd=fd)) for _ in range(4)]
    assert refusal(submit(requests.dma_map(0, PAGE, fd=fd))) == errno.ENOBUFS
    assert not submit(requests.dma_map(0, PAGE)).done
    message = device.next()
    close_fds(message.fds)
    device.send(reply_to(message))  # it has been received
    assert waiting[0].done
    assert not submit(requests.dma_map(0, PAGE, fd=fd)).done
    os.close(fd)
    while (left := device.look()) is not None:
        close_fds(left.fds)


def test_files_wait_with_what_waits(
    make_device: Callable[..., RawDevice], memfd: Callable[..., int]
) -> None:
    device = make_device()
    while not device.has_backlog():
        device.client.post(requests.region_write(0, 0, bytes(1 << 12)))
    fd = os.dup(memfd())
    inode = os.fstat(fd).st_ino
    deferred = device.client.submit(requests.dma_map(0, PAGE, fd=fd))
    os.close(fd)
    while (message := device.next()).command != Command.DMA_MAP:
        assert message.fds == []
    assert [os.fstat(one).st_ino for one in message.fds] == [inode]
    close_fds(message.fds)
    device.send(reply_to(message))
    assert deferred.done


def test_bytes_that_wait_are_limited(make_device: Callable[..., RawDevice]) -> None:
    device = make_device(limits=ClientLimits(max_queued_bytes=1 << 20))
    sent = 0
    while device.client.post(requests.region_write(0, 0, bytes(1 << 16))) is None:
        sent += 1
    assert 16 <= sent < 64
    assert device.has_backlog()
    for _ in range(sent):
        assert len(device.next().payload) == 16 + (1 << 16)
    assert not device.has_backlog()
    assert device.client.post(requests.region_write(0, 0, bytes(1 << 16))) is None


def test_no_file_descriptor_left_refuses_one_request(
    make_device: Callable[..., RawDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device(agreed=False)

    def dup(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", dup)
    deferred = device.client.submit(requests.dma_map(0, PAGE, fd=0))
    assert refusal(deferred) == errno.EMFILE
    device.agree()
    assert not device.client.closed


# --- a device that dies, or lies


def test_a_device_that_goes_away(device: RawDevice) -> None:
    deferreds = [device.client.submit(requests.reset()) for _ in range(3)]
    device.close()
    assert [refusal(deferred) for deferred in deferreds] == [errno.ECONNRESET] * 3
    assert ended(device, errno.ECONNRESET)


def test_what_it_has_answered_before_it_went_is_taken(device: RawDevice) -> None:
    first = device.client.submit(requests.device_info())
    data = reply_to(device.next(), INFO)
    device.socket.send(data)
    device.socket.close()
    second = device.client.submit(requests.reset())  # can't be sent, and must not tell at once
    assert not second.done
    device.turn()
    assert first.result() == (3, 9, 5)
    assert refusal(second) == errno.ECONNRESET
    assert ended(device, errno.ECONNRESET)


def test_posting_to_a_device_that_has_gone(device: RawDevice) -> None:
    device.socket.close()
    for _ in range(3):
        assert device.client.post(requests.reset()) is None
    assert device.has_backlog()
    assert device.ends == []
    device.turn()
    assert ended(device, errno.ECONNRESET)


def test_a_device_that_does_not_listen_any_more(device: RawDevice) -> None:
    device.socket.shutdown(socket.SHUT_RD)
    deferred = device.client.submit(requests.reset())
    device.turn()
    assert refusal(deferred) == errno.ECONNRESET
    assert ended(device, errno.ECONNRESET)


def test_a_device_that_goes_with_much_to_read(device: RawDevice) -> None:
    while not device.has_backlog():
        device.client.post(requests.region_write(0, 0, bytes(1 << 16)))
    device.close()
    assert ended(device, errno.ECONNRESET)


def test_half_a_message_with_files(device: RawDevice, memfd: Callable[..., int]) -> None:
    deferred = device.client.submit(requests.reset())
    device.send(reply_to(device.next())[:15], [memfd()])
    device.close()
    assert refusal(deferred) == errno.ECONNRESET


LIES: dict[str, Callable[[Any], bytes]] = {
    "another id": lambda m: reply_to(m, INFO, ident=m.id + 1),
    "another command": lambda m: reply_to(m, INFO, command=Command.VERSION),
    "short": lambda m: reply_to(m, INFO[1:]),
    "long": lambda m: reply_to(m, INFO + b"\0"),
    "answered twice": lambda m: reply_to(m, INFO) * 2,
    "of no kind": lambda m: reply_to(m, INFO, flags=2),
    "size 0": lambda m: reply_to(m, size=0),
    "size 15": lambda m: reply_to(m, size=15),
    "oversized": lambda m: reply_to(m, size=spec.MAX_MESSAGE + 1),
    "far too large": lambda m: reply_to(m, size=2**32 - 1),
    "garbage": lambda m: b"\xff" * 16,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_nonsense_ends_the_connection(
    device: RawDevice, lie: Callable[[Any], bytes], memfd: Callable[..., int], request: Any
) -> None:
    deferred = device.client.submit(requests.device_info())
    other = device.client.submit(requests.reset())
    message = device.next()
    device.send(lie(message), [memfd()] if "size" in request.node.callspec.id else [])
    assert ended(device, errno.EPROTO)
    if "twice" in request.node.callspec.id:
        assert deferred.result() == (3, 9, 5)
    else:
        assert refusal(deferred) == errno.EPROTO
    assert refusal(other) == errno.EPROTO


@pytest.mark.parametrize("count", [1, 2, 16, 40])
def test_files_nobody_asked_for(device: RawDevice, memfd: Callable[..., int], count: int) -> None:
    deferred = device.client.submit(requests.device_info())
    device.send(reply_to(device.next(), INFO), [memfd()] * count)
    assert refusal(deferred) == errno.EPROTO
    assert ended(device, errno.EPROTO)


def test_two_files_for_a_region(device: RawDevice, memfd: Callable[..., int]) -> None:
    deferred = device.client.region_info(1)
    device.send(reply_to(device.next(), region(32)), [memfd()] * 2)
    assert refusal(deferred) == errno.EPROTO
    assert ended(device, errno.EPROTO)


def test_a_reply_that_nobody_asked_for(device: RawDevice) -> None:
    device.send(reply_to(device.hello))
    assert ended(device, errno.EPROTO)


def test_a_posted_request_is_not_to_be_answered(device: RawDevice) -> None:
    device.client.post(requests.reset())
    device.send(reply_to(device.next()))
    assert ended(device, errno.EPROTO)
