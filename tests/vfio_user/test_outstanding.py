from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from viommu.deferred import Deferred
from viommu.errors import PeerError, UsageError
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user import requests
from viommu.vfio_user.outstanding import Outstanding
from viommu.vfio_user.protocol import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.vfio_user.requests import DeviceInfo

INFO = spec.DEVICE_INFO.pack(16, 3, 9, 5)


@pytest.fixture
def outstanding() -> Outstanding:
    return Outstanding()


def info(outstanding: Outstanding, deadline: float = 1.0) -> tuple[int, Deferred[DeviceInfo]]:
    deferred: Deferred[DeviceInfo] = Deferred()
    return outstanding.add(requests.device_info(), deferred, deadline), deferred


def reply(
    ident: int,
    payload: bytes = INFO,
    *,
    command: int = Command.DEVICE_GET_INFO,
    flags: int = spec.F_TYPE_REPLY,
    error: int = 0,
    fds: list[int] | None = None,
    truncated: bool = False,
) -> Message:
    return Message(ident, command, flags, error, payload, fds or [], truncated)


def test_replies_come_in_any_order(outstanding: Outstanding) -> None:
    first, second, third = (info(outstanding) for _ in range(3))
    assert len({first[0], second[0], third[0]}) == 3
    for number, (ident, deferred) in enumerate((third, first, second)):
        tell = outstanding.take(reply(ident, spec.DEVICE_INFO.pack(16, 3, number, 5)))
        assert not deferred.done, "whoever waits is told when the reply is dealt with"
        tell()
        assert deferred.result().num_regions == number
    assert len(outstanding) == 0


def test_files_under_way_are_counted(outstanding: Outstanding) -> None:
    idents = [
        outstanding.add(requests.set_irqs(2, 0x24, 0, n, fds=[0] * n), Deferred(), 1.0)
        for n in range(3)
    ]
    assert outstanding.fds == 3
    message = reply(idents[1], b"", command=Command.DEVICE_SET_IRQS)
    outstanding.take(message)
    assert outstanding.fds == 2
    outstanding.refuse_all(errno.ECONNRESET, "it has gone")
    assert outstanding.fds == 0


def test_there_are_only_so_many_ids(outstanding: Outstanding) -> None:
    idents = {info(outstanding)[0] for _ in range(1 << 16)}
    assert len(idents) == 1 << 16
    with pytest.raises(UsageError, match="65536"):
        outstanding.fresh_id()
    outstanding.take(reply(77))()
    assert info(outstanding)[0] == 77


def test_an_id_that_is_waited_for_is_not_given_again(outstanding: Outstanding) -> None:
    kept, _ = info(outstanding)
    others = [outstanding.fresh_id() for _ in range((1 << 16) - 1)]
    assert kept not in others
    assert len(set(others)) == len(others)
    assert outstanding.fresh_id() == others[0]


def test_the_earliest_deadline(outstanding: Outstanding) -> None:
    assert outstanding.deadline() is None
    info(outstanding, 3.0)
    ident, _ = info(outstanding, 1.0)
    info(outstanding, 2.0)
    assert outstanding.deadline() == 1.0
    outstanding.take(reply(ident))
    assert outstanding.deadline() == 2.0


@pytest.mark.parametrize(
    ("number", "seen"),
    [
        (errno.ENXIO, errno.ENXIO),
        (4095, 4095),
        (0, errno.EIO),
        (4096, errno.EIO),
        (2**32 - 1, errno.EIO),
    ],
)
@pytest.mark.parametrize("payload", [b"", b"some more"], ids=["header", "payload"])
def test_an_error_refuses_one_request(
    outstanding: Outstanding, number: int, seen: int, payload: bytes
) -> None:
    ident, deferred = info(outstanding)
    other = info(outstanding)[1]
    flags = spec.F_TYPE_REPLY | spec.F_ERROR
    outstanding.take(reply(ident, payload, flags=flags, error=number))()
    with pytest.raises(PeerError, match=f"command {Command.DEVICE_GET_INFO:d} failed") as caught:
        deferred.result()
    assert caught.value.errno == seen
    assert not other.done


NONSENSE: dict[str, Callable[[int], Message]] = {
    "another id": lambda ident: reply(ident + 1),
    "another command": lambda ident: reply(ident, command=Command.DEVICE_GET_IRQ_INFO),
    "too short": lambda ident: reply(ident, INFO[1:]),
    "too long": lambda ident: reply(ident, INFO + b"\0"),
    "a file": lambda ident: reply(ident, fds=[0]),
    "a file that was lost": lambda ident: reply(ident, truncated=True),
    "an error with a file": lambda ident: reply(
        ident, b"", flags=spec.F_TYPE_REPLY | spec.F_ERROR, error=5, fds=[0]
    ),
    "neither command nor reply": lambda ident: reply(ident, flags=2),
}


@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE)
def test_nonsense(outstanding: Outstanding, make: Callable[[int], Message]) -> None:
    ident, deferred = info(outstanding)
    with pytest.raises(PeerError) as caught:
        outstanding.take(make(ident))
    assert caught.value.errno == errno.EPROTO
    assert not deferred.done, "it is refused with all others"
    assert len(outstanding) == 1


def test_a_reply_is_taken_once(outstanding: Outstanding) -> None:
    ident, _ = info(outstanding)
    outstanding.take(reply(ident))
    with pytest.raises(PeerError, match=f"a reply to message {ident} unasked"):
        outstanding.take(reply(ident))


def test_no_room_for_a_file_refuses_one_request(outstanding: Outstanding) -> None:
    deferred: Deferred[requests.RegionReply] = Deferred()
    ident = outstanding.add(requests.region_info(0), deferred, 1.0)
    message = reply(ident, bytes(32), command=Command.DEVICE_GET_REGION_INFO, truncated=True)
    outstanding.take(message)()
    with pytest.raises(PeerError) as caught:
        deferred.result()
    assert caught.value.errno == errno.EMFILE


def test_all_are_refused_and_may_ask_again(outstanding: Outstanding) -> None:
    deferreds = [info(outstanding)[1] for _ in range(3)]
    order: list[int] = []
    for number, deferred in enumerate(deferreds):
        deferred.then(lambda _, number=number: order.append(number))  # type: ignore[misc]
    deferreds[0].then(lambda _: order.append(info(outstanding)[0]))
    outstanding.refuse_all(errno.ECONNRESET, "it has gone")
    assert order == [0, 3, 1, 2]
    assert len(outstanding) == 1
    for deferred in deferreds:
        with pytest.raises(PeerError, match="it has gone") as caught:
            deferred.result()
        assert caught.value.errno == errno.ECONNRESET
