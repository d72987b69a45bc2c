from __future__ import annotations

import errno
import struct
from dataclasses import replace

import pytest

from viommu.errors import PeerError, UsageError
from viommu.spec import vfio_user as spec
from viommu.vfio_user.protocol import Capabilities, Message
from viommu.vfio_user.request import Request, at_most, exactly, nonsense, order, pack

THEIRS = Capabilities(2, max_data_xfer_size=64)


def reply(payload: bytes) -> Message:
    return Message(1, 7, spec.F_TYPE_REPLY, 0, payload, [])


@pytest.mark.parametrize("needs", ["fixed_iova", "iommufd", "write_multiple"])
def test_a_server_must_have_what_a_command_needs(needs: str) -> None:
    request: Request[bytes] = Request(7, b"", lambda message: message.payload, needs=needs)  # type: ignore[arg-type] # one of the literals

    with pytest.raises(UsageError, match=needs):
        request.check(THEIRS)
    request.check(replace(THEIRS, **{needs: True}))


def test_a_server_must_take_what_a_command_brings() -> None:
    request = order(7, b"", (1, 2), transfer=64)

    request.check(THEIRS)
    with pytest.raises(UsageError, match="65"):
        request._replace(transfer=65).check(THEIRS)
    with pytest.raises(UsageError, match="3 file descriptors"):
        request._replace(fds=(1, 2, 3)).check(THEIRS)


def test_the_reply_to_an_order_says_nothing() -> None:
    request = order(7, b"1234")

    for payload in (b"", b"1", b"1234"):
        request.decode(reply(payload))
    with pytest.raises(PeerError) as caught:
        request.decode(reply(b"12345"))
    assert caught.value.errno == errno.EPROTO


def test_a_payload_has_the_size_that_it_must_have() -> None:
    assert exactly(reply(b"1234"), 4) == at_most(reply(b"1234"), 4) == b"1234"
    assert at_most(reply(b""), 4) == b""
    with pytest.raises(PeerError, match="3"):
        exactly(reply(b"123"), 4)
    with pytest.raises(PeerError, match="5"):
        at_most(reply(b"12345"), 4)
    assert nonsense("why").errno == errno.EPROTO


def test_a_number_that_no_message_can_hold() -> None:
    assert pack(struct.Struct("<I"), 1) == b"\1\0\0\0"
    for number in (-1, 1 << 32):
        with pytest.raises(UsageError, match=str(number)):
            pack(struct.Struct("<I"), number)
