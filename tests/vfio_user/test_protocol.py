from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import BackendError, GuestError, GuestMemoryError, PeerError, UsageError
from viommu.spec import vfio_user as spec
from viommu.vfio_user.loop_client import default_offers
from viommu.vfio_user.protocol import (
    Capabilities,
    Message,
    MessageReader,
    MessageSizeError,
    command_message,
    decode_version,
    encode_version,
    errno_of,
    error_reply,
    negotiate,
    reply_message,
)


def version(text: bytes | dict[str, object] = b"", *, major: int = 0, minor: int = 1) -> bytes:
    if isinstance(text, dict):
        text = json.dumps(text).encode() + b"\0"
    return spec.VERSION.pack(major, minor) + text


def capabilities(**values: object) -> bytes:
    return version({"capabilities": values})


def read_all(reader: MessageReader, data: bytes, step: int) -> list[Message]:
    messages = []
    while data:
        size = min(step, reader.wanted, len(data))
        if message := reader.feed(data[:size]):
            messages.append(message)
        data = data[size:]
    return messages


@given(
    st.lists(
        st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=40)),
        max_size=5,
    ),
    st.integers(1, 50),
)
def test_messages_come_out_as_they_went_in(sent: list[tuple[int, int, bytes]], step: int) -> None:
    stream = b"".join(command_message(*message) for message in sent)
    reader = MessageReader()
    received = read_all(reader, stream, step)
    assert [(m.id, m.command, m.payload) for m in received] == sent
    assert all(m.kind == spec.F_TYPE_COMMAND and not m.no_reply for m in received)
    assert reader.empty


def test_the_reader_says_how_much_it_wants() -> None:
    reader = MessageReader()
    data = command_message(1, 2, b"12345")
    assert reader.wanted == 16
    reader.feed(data[:10])
    assert reader.wanted == 6
    assert not reader.empty
    reader.feed(data[10:16])
    assert reader.wanted == 5
    assert not reader.empty
    with pytest.raises(UsageError):
        reader.feed(data[16:] + b"!")


def test_file_descriptors_belong_to_the_message_they_came_with() -> None:
    reader = MessageReader()
    first, second = command_message(1, 2, b"ab"), command_message(2, 2, b"")
    reader.feed(first[:16], [10])
    message = reader.feed(first[16:], [11, 12], truncated=True)
    assert message is not None
    assert message.fds == [10, 11, 12]
    assert message.truncated
    message = reader.feed(second)
    assert message is not None
    assert message.fds == []
    assert not message.truncated


def test_file_descriptors_of_half_a_message_can_be_taken() -> None:
    reader = MessageReader()
    reader.feed(b"abc", [10])
    assert reader.take_fds() == [10]
    assert reader.take_fds() == []


@pytest.mark.parametrize(
    ("size", "lost"), [(0, False), (15, False), (spec.MAX_MESSAGE + 1, True), (2**32 - 1, True)]
)
def test_an_impossible_size_is_told_with_the_header(size: int, *, lost: bool) -> None:
    reader = MessageReader()
    header = spec.HEADER.pack(7, 9, size, spec.F_NO_REPLY, 0)
    with pytest.raises(MessageSizeError, match=str(size)) as caught:
        reader.feed(header, [10])
    assert caught.value.lost == lost
    assert caught.value.message == Message(7, 9, spec.F_NO_REPLY, 0, b"", [10])
    assert reader.empty
    assert reader.wanted == 16


def test_the_largest_message_is_accepted() -> None:
    reader = MessageReader()
    reader.feed(spec.HEADER.pack(1, 10, spec.MAX_MESSAGE, 0, 0))
    assert reader.wanted == spec.MAX_MESSAGE - 16


def test_replies_echo_the_request() -> None:
    request = Message(0xFFFE, 9, 0, 0, b"", [])
    (reply,) = read_all(MessageReader(), reply_message(request, b"data"), 99)
    assert reply == Message(0xFFFE, 9, spec.F_TYPE_REPLY, 0, b"data", [])
    data = error_reply(request, errno.ENOENT)
    assert len(data) == 16
    (reply,) = read_all(MessageReader(), data, 99)
    assert (reply.id, reply.flags, reply.error) == (0xFFFE, 0x21, errno.ENOENT)


def test_only_commands_can_forbid_a_reply() -> None:
    assert Message(0, 1, spec.F_NO_REPLY, 0, b"", []).no_reply
    assert not Message(0, 1, spec.F_NO_REPLY | spec.F_TYPE_REPLY, 0, b"", []).no_reply


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (PeerError(errno.ENXIO, ""), errno.ENXIO),
        (PeerError(0, ""), errno.EIO),
        (PeerError(0xBEEF, ""), errno.EIO),
        (BackendError(errno.EBUSY, ""), errno.EBUSY),
        (GuestMemoryError(0, 1, ""), errno.EFAULT),
        (UsageError(""), errno.EINVAL),
        (GuestError(3, ""), errno.EIO),
    ],
)
def test_every_error_has_an_errno(error: Exception, number: int) -> None:
    assert errno_of(error) == number  # type: ignore[arg-type] # all are ViommuErrors


# The first names are libvfio-user's tests of the same.
IMPOSSIBLE = {
    "short_write": b"",
    "shorter than a version": b"\0\0\1",
    "invalid_major": version(major=999),
    "invalid_json_missing_NUL": version(b"{}"),
    "missing_closing_brace": version(b"{\0"),
    "missing_closing_quote": version(b'"\0'),
    "bad_capabilities_object": version({"capabilities": "23"}),
    "bad_max_fds": capabilities(max_msg_fds="foo"),
    "bad_max_fds2": capabilities(max_msg_fds=-1),
    "bad_max_fds3": capabilities(max_msg_fds=1025),
    "bad_migration_object": capabilities(migration="23"),
    "bad_pgsize": capabilities(migration={"pgsize": "foo"}),
    "bad_pgsize2": capabilities(migration={"pgsize": 4095}),
    "only NUL": version(b"\0"),
    "array": version(b"[]\0"),
    "number": version(b"3\0"),
    "not UTF-8": version(b"\xff\xfe\0"),
    "brackets": version(b"[" * 4000 + b"\0"),
    "nested": version(b"[" * 1000 + b"]" * 1000 + b"\0"),
    "nested capabilities": version(b'{"capabilities":' + b"[" * 900 + b"]" * 900 + b"}\0"),
    "endless number": version(b'{"capabilities":{"max_msg_fds":' + b"9" * 4040 + b"}}\0"),
    "too long": version(b" " * 5000 + b"{}\0"),
    "capabilities null": version({"capabilities": None}),
    "fds fraction": capabilities(max_msg_fds=1.5),
    "fds boolean": capabilities(max_msg_fds=True),
    "fds null": capabilities(max_msg_fds=None),
    "xfer array": capabilities(max_data_xfer_size=[]),
    "xfer negative": capabilities(max_data_xfer_size=-1),
    "maps string": capabilities(max_dma_maps="many"),
    "pgsizes string": capabilities(pgsizes="foo"),
    "pgsizes small": capabilities(pgsizes=4095),
    "pgsizes zero": capabilities(pgsizes=0),
    "pgsizes odd": capabilities(pgsizes=6000),
    "write_multiple number": capabilities(write_multiple=1),
    "iommufd boolean": capabilities(iommufd=True),
    "iommufd null": capabilities(iommufd=None),
    "iommufd supported number": capabilities(iommufd={"supported": 1}),
    "iommufd supported string": capabilities(iommufd={"supported": "true"}),
    "iommufd supported null": capabilities(iommufd={"supported": None}),
    "viommu array": capabilities(viommu=["fixed_iova"]),
    "viommu fixed_iova number": capabilities(viommu={"fixed_iova": 1}),
    "viommu message_dma string": capabilities(viommu={"message_dma": "on"}),
}


@pytest.mark.parametrize("payload", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_version_is_refused(payload: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        negotiate(payload, Capabilities())
    assert caught.value.errno == errno.EINVAL


QEMU = (
    b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,'
    b'"pgsizes":4096,"migration":{"pgsize":4096,"max_bitmap_size":268435456},'
    b'"write_multiple":true}}\0'
)
CLOUD_HYPERVISOR = (
    b'{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}\0'
)


POSSIBLE = {
    "valid_negotiate_no_json": (version(minor=1), 1, Capabilities(), False),
    "valid_negotiate_empty_json": (version(b"{}\0"), 1, Capabilities(), False),
    "valid_negotiate_json": (
        capabilities(max_msg_fds=1024, max_data_xfer_size=1 << 20),
        1,
        Capabilities(1024),
        False,
    ),
    "no capabilities": (version(b'{"capabilities":{}}\0'), 1, Capabilities(), False),
    "unknown": (version(b'{"capabilities":{"new":{"of":1}}}\0'), 1, Capabilities(), False),
    "QEMU": (version(QEMU, minor=0), 0, Capabilities(16, 1 << 20, 65535, 4096, True), True),
    "Cloud Hypervisor": (version(CLOUD_HYPERVISOR), 1, Capabilities(1, 1 << 20), False),
    "message DMA": (
        capabilities(viommu={"message_dma": True}),
        1,
        Capabilities(message_dma=True),
        True,
    ),
    "later minor": (version(minor=500), 1, Capabilities(), False),
}


@pytest.mark.parametrize(
    ("payload", "minor", "expected", "serves_dma"), POSSIBLE.values(), ids=POSSIBLE
)
def test_negotiation(
    payload: bytes, minor: int, expected: Capabilities, *, serves_dma: bool
) -> None:
    theirs, reply = negotiate(payload, Capabilities(8))
    assert theirs == expected
    assert theirs.serves_dma == serves_dma
    assert spec.VERSION.unpack_from(reply) == (0, minor)
    assert json.loads(reply[4:-1]) == {
        "capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1048576}
    }
    assert reply[-1:] == b"\0"


@pytest.mark.parametrize(
    ("payload", "forgets"),
    [
        (version(QEMU), True),
        (version(CLOUD_HYPERVISOR), False),
        (encode_version(1, default_offers(serves=True)), False),
        (encode_version(1, default_offers(serves=False)), False),
    ],
    ids=["QEMU", "Cloud Hypervisor", "ours with memory", "ours"],
)
def test_only_qemu_forgets_what_it_asked(payload: bytes, *, forgets: bool) -> None:
    theirs, _ = negotiate(payload, Capabilities(8))
    assert theirs.forgets == forgets


def test_the_reply_fits_into_qemu_s_buffer() -> None:
    _, reply = negotiate(version(QEMU), Capabilities(16, 1 << 26, 65535, 4096, True))
    assert 16 + len(reply) <= 214
    with pytest.raises(UsageError):
        negotiate(version(QEMU), Capabilities(10**50, 10**50, 10**50, 10**50))


NOTHING: dict[str, object] = {}
IOMMUFD: dict[str, object] = {"iommufd": {"supported": True}}
FIXED: dict[str, object] = {"viommu": {"fixed_iova": True}}
NOT_SUPPORTED: dict[str, object] = {"iommufd": {"supported": False}, **FIXED}


# What the client offers, whether the server has the commands and fixed IOVAs, and what both have.
@pytest.mark.parametrize(
    ("offered", "iommufd", "fixed_iova", "expected"),
    [
        (IOMMUFD | FIXED, True, True, IOMMUFD | FIXED),
        (IOMMUFD | FIXED, True, False, IOMMUFD),
        (IOMMUFD | FIXED, False, False, NOTHING),
        (IOMMUFD | FIXED, False, True, NOTHING),
        (IOMMUFD, True, True, IOMMUFD),
        (IOMMUFD, True, False, IOMMUFD),
        (IOMMUFD, False, False, NOTHING),
        (FIXED, True, True, NOTHING),
        (NOT_SUPPORTED, True, True, NOTHING),
        ({"iommufd": {}}, True, True, NOTHING),
        ({"iommufd": {"supported": True, "new": 5}}, True, True, IOMMUFD),
        (NOTHING, True, True, NOTHING),
        (NOTHING, False, False, NOTHING),
    ],
    ids=str,
)
def test_extensions_are_told_only_to_who_offered_them(
    offered: dict[str, object], *, iommufd: bool, fixed_iova: bool, expected: dict[str, object]
) -> None:
    ours = Capabilities(8, iommufd=iommufd, fixed_iova=fixed_iova)

    theirs, reply = negotiate(capabilities(**offered), ours)

    told = json.loads(reply[4:-1])["capabilities"]
    assert {key: told[key] for key in told.keys() - {"max_msg_fds", "max_data_xfer_size"}} == (
        expected
    )
    assert theirs.iommufd == ("iommufd" in expected)
    assert theirs.fixed_iova == ("viommu" in expected)


def test_a_reply_with_everything_would_fit_into_qemu_s_buffer() -> None:
    everything = Capabilities(16, 1 << 26, 65535, 4096, True, iommufd=True, fixed_iova=True)

    _, reply = negotiate(encode_version(1, everything), everything)

    assert decode_version(reply) == (1, everything)
    assert 16 + len(reply) <= 214


@given(
    st.builds(
        Capabilities,
        st.integers(0, 1024),
        st.integers(0, 2**40),
        st.none() | st.integers(0, 65535),
        st.none() | st.integers(1, 1024).map(lambda n: n * 4096),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        message_dma=st.booleans(),
    ),
    st.integers(0, 0xFFFF),
)
def test_what_is_encoded_is_decoded(ours: Capabilities, minor: int) -> None:
    assert decode_version(encode_version(minor, ours)) == (minor, ours)


@given(st.binary(max_size=64))
def test_noise_is_refused_or_understood(payload: bytes) -> None:
    try:
        negotiate(payload, Capabilities())
    except PeerError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017 - either is fine, nothing else is
