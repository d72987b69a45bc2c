"""Packets: what is decoded is what was encoded, and anything else is nonsense."""

from __future__ import annotations

import contextlib
import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import (
    Access,
    ExportError,
    PeerError,
    SessionFaulted,
    TranslationFault,
    UsageError,
    ViommuError,
)
from viommu.ipc import protocol
from viommu.ipc.protocol import Kind, Request, Span
from viommu.mapper import MemRegion
from viommu.spec.virtio_iommu import FaultReason

U64 = st.integers(0, (1 << 64) - 1)
ACCESS = st.sampled_from([Access(value) for value in range(4)])
BODIES = {
    Kind.HELLO: protocol.HELLO.pack(protocol.TAG, 1, 0),
    Kind.START: b"",
    Kind.EXPORT: protocol.RANGE.pack(0x1000, 0x20),
    Kind.RELEASE: protocol.RANGE.pack(0x1000, 0x20),
    Kind.MEMORY: protocol.FIRST.pack(7),
    Kind.REPORT: protocol.REPORT.pack(0x1000, 2, 0),
    Kind.LEAVE: b"that's all",
}
UNANSWERED = {Kind.REPORT, Kind.LEAVE}


def packet(kind: Kind, ident: int | None = None) -> bytes:
    if ident is None:
        ident = 0 if kind in UNANSWERED else 5
    return protocol.encode_request(kind, ident, BODIES[kind])


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        (Kind.HELLO, (1, 0), ""),
        (Kind.START, (), ""),
        (Kind.EXPORT, (0x1000, 0x20), ""),
        (Kind.RELEASE, (0x1000, 0x20), ""),
        (Kind.MEMORY, (7,), ""),
        (Kind.REPORT, (0x1000, 2, 0), ""),
        (Kind.LEAVE, (), "that's all"),
    ],
)
def test_a_request_is_what_it_was(kind: Kind, values: tuple[int, ...], text: str) -> None:
    request = protocol.decode_request(packet(kind))

    assert request == Request(kind, 0 if kind in UNANSWERED else 5, values, text)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.LEAVE])
def test_a_request_has_exactly_its_fields(kind: Kind) -> None:
    for data in (packet(kind) + b"\0", packet(kind)[:-1]):
        with pytest.raises(PeerError) as caught:
            protocol.decode_request(data)
        assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        bytes(8),
        protocol.HEADER.pack(99, 0, 1),
        protocol.HEADER.pack(Kind.START | 0x8000, 0, 1),
        protocol.HEADER.pack(Kind.START, 1, 1),
        protocol.encode_request(Kind.HELLO, 1, protocol.HELLO.pack(b"HTTP", 1, 0)),
        packet(Kind.EXPORT, 0),
        packet(Kind.HELLO, 0),
        packet(Kind.REPORT, 1),
        packet(Kind.LEAVE, 1),
        protocol.encode_request(Kind.LEAVE, 0, bytes(protocol.MAX_REQUEST)),
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        protocol.decode_request(data)
    assert caught.value.errno == errno.EPROTO


def test_a_release_may_ask_for_an_answer() -> None:
    assert protocol.decode_request(packet(Kind.RELEASE, 0)).ident == 0
    assert protocol.decode_request(packet(Kind.RELEASE, 9)).ident == 9


@given(st.binary(max_size=protocol.MAX_REQUEST + 8))
def test_anything_is_a_request_or_nonsense(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        assert protocol.decode_request(data).kind in Kind


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (SessionFaulted("held"), errno.ESTALE),
        (ExportError("no session"), errno.EBUSY),
        (UsageError("size 0"), errno.EINVAL),
    ],
)
def test_a_refusal_is_the_same_error_on_the_other_side(error: ViommuError, number: int) -> None:
    request = protocol.decode_request(packet(Kind.EXPORT))
    reply = protocol.decode_reply(protocol.encode_refusal(request, error))
    back = protocol.error_of(reply)

    assert (reply.kind, reply.ident, reply.error) == (Kind.EXPORT, 5, number)
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_a_fault_says_where_and_why() -> None:
    request = protocol.decode_request(packet(Kind.EXPORT))
    fault = TranslationFault(0x5000, Access.NONE, FaultReason.DOMAIN)
    back = protocol.error_of(protocol.decode_reply(protocol.encode_refusal(request, fault)))

    assert isinstance(back, TranslationFault)
    assert (back.iova, back.reason) == (0x5000, FaultReason.DOMAIN)


@pytest.mark.parametrize("body", [b"", protocol.FAULT.pack(0, 77, 0)])
def test_a_fault_that_is_none(body: bytes) -> None:
    with pytest.raises(PeerError):
        protocol.error_of(protocol.Reply(Kind.EXPORT, 1, errno.EFAULT, body))


def test_an_error_without_words_shows_its_number() -> None:
    assert "71" in str(protocol.error_of(protocol.Reply(Kind.START, 1, 71, b"")))


@given(st.lists(st.tuples(U64, U64, ACCESS), max_size=20), U64)
def test_regions_are_what_they_were(rows: list[tuple[int, int, Access]], generation: int) -> None:
    regions = [MemRegion(*row) for row in rows]
    body = protocol.encode_regions(regions, generation, 3)

    assert protocol.decode_regions(body) == (regions, generation, 3)
    for wrong in (body[:-1], body + bytes(24)):
        with pytest.raises(PeerError):
            protocol.decode_regions(wrong)


def test_spans_are_what_they_were() -> None:
    spans = [
        Span(0, 0x1000, 0x2000, 1, Access.READ),
        Span(0x1000, 0x1000, 0, protocol.FILE_NONE, Access.READ | Access.WRITE),
    ]
    body = protocol.encode_spans(spans, 9, 0)

    assert protocol.decode_spans(body, 2) == (spans, 9, 0)
    with pytest.raises(PeerError, match="file 1 of 1"):
        protocol.decode_spans(body, 1)


def test_an_access_that_is_none_is_nonsense() -> None:
    assert protocol.decode_access(3) == Access.READ | Access.WRITE
    with pytest.raises(PeerError, match="access 0x4"):
        protocol.decode_access(4)


def test_a_packet_of_most_regions_is_as_large_as_allowed() -> None:
    regions = [MemRegion(0, 1, Access.READ)] * protocol.REGIONS_A_PACKET
    request = protocol.decode_request(packet(Kind.EXPORT))
    size = len(protocol.encode_reply(request, protocol.encode_regions(regions, 0, 0)))

    assert size <= protocol.MAX_PACKET < size + protocol.REGION.size


@pytest.mark.parametrize(
    "data", [b"", bytes(8), packet(Kind.START), protocol.HEADER.pack(0x8063, 0, 1)]
)
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        protocol.decode_reply(data)
    assert caught.value.errno == errno.EPROTO


def test_another_version_is_not_understood() -> None:
    welcome = protocol.decode_welcome(protocol.WELCOME.pack(1, 4, 10, 20, 30))
    assert welcome == protocol.Welcome(1, 4, 10, 20, 30)
    with pytest.raises(PeerError, match=r"version 2\.0"):
        protocol.decode_welcome(protocol.WELCOME.pack(2, 0, 0, 0, 0))
    with pytest.raises(PeerError, match="3 bytes"):
        protocol.decode_welcome(b"abc")


@given(st.text(max_size=400))
def test_a_text_can_be_printed_and_is_short(text: str) -> None:
    shown = protocol.decode_request(
        protocol.encode_request(Kind.LEAVE, 0, protocol.encode_text(text))
    ).text

    assert shown.isprintable()
    if text.isascii() and text.isprintable():
        assert shown == text[:256]


# -- the document that others implement

DOCUMENT = (Path(__file__).parents[2] / "docs" / "export-sessions.md").read_text()
BODIES_OF_ANSWERS = {
    Kind.HELLO: [protocol.WELCOME],
    Kind.EXPORT: [protocol.EXPORTED, protocol.REGION],
    Kind.MEMORY: [protocol.LISTED, protocol.SPAN],
}


def sizes(cell: str) -> int:
    """The sum of the sizes in a cell of the table: numbers in parentheses."""
    return sum(int(size) for size in re.findall(r"\((\d+)\)", cell))


def test_every_packet_is_documented_with_its_size() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \| (.*?) \| (.*) \|$", DOCUMENT, re.MULTILINE)

    assert {name: int(number) for number, name, _, _ in rows} == {k.name: k.value for k in Kind}
    for _, name, request, reply in rows:
        kind = Kind[name]
        if kind is not Kind.LEAVE:
            assert sizes(request) == len(BODIES[kind])
        parts = reply.split("for each")
        assert [sizes(part) for part in parts] == [
            layout.size for layout in BODIES_OF_ANSWERS.get(kind, [struct.Struct("")])
        ]


def test_the_header_and_the_limits_are_documented() -> None:
    rows = re.findall(r"^\| (kind|error|id) \| (\d) \|", DOCUMENT, re.MULTILINE)

    assert [name for name, _ in rows] == ["kind", "error", "id"]
    assert sum(int(size) for _, size in rows) == protocol.HEADER.size
    assert f"at most {protocol.MAX_REQUEST} bytes, answers {protocol.MAX_PACKET};" in DOCUMENT
    assert f"at most {protocol.MAX_FDS} file descriptors" in DOCUMENT
    assert f"tag `{protocol.TAG.decode()}`" in DOCUMENT
    assert f"up to {protocol.MAX_TEXT} bytes" in DOCUMENT
    assert f"{protocol.FILE_NONE:#x}" in DOCUMENT


def test_every_refusal_is_documented() -> None:
    names = re.findall(r"^\| `(E[A-Z]+)` \|", DOCUMENT, re.MULTILINE)

    assert {getattr(errno, name) for name in names} == set(protocol.Refusal)
