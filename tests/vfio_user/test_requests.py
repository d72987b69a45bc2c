from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest

from viommu.errors import PeerError, UsageError
from viommu.spec import vfio, vfio_host
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command, IoFdType
from viommu.vfio_user import IrqInfo, RegionInfo, requests
from viommu.vfio_user.protocol import Capabilities, Message, encode_version
from viommu.vfio_user.requests import Agreement, IoFd, RegionWrite, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

Q = 2**64 - 1
THEIRS = Capabilities(2, max_data_xfer_size=64)


def answer(request: Request[Any], payload: bytes, fds: Sequence[int] = ()) -> Message:
    return Message(1, request.command, spec.F_TYPE_REPLY, 0, payload, list(fds))


def nonsense(request: Request[Any], payload: bytes, fds: Sequence[int] = ()) -> None:
    message = answer(request, payload, fds)
    with pytest.raises(PeerError) as caught:
        request.decode(message)
    assert caught.value.errno == errno.EPROTO
    assert message.fds == list(fds), "they are closed by whoever has the message"


# The payloads, and which replies are taken with which result.
COMMANDS: dict[str, tuple[Request[Any], bytes, dict[bytes, object]]] = {
    "dma_map": (
        requests.dma_map(0x1000, 0x2000, fd=5, offset=0x3000, writable=False),
        struct.pack("<IIQQQ", 32, 1, 0x3000, 0x1000, 0x2000),
        {b"": None, bytes(32): None},
    ),
    "dma_map without fd": (
        requests.dma_map(0, 1 << 63, readable=False),
        struct.pack("<IIQQQ", 32, 2, 0, 0, 1 << 63),
        {b"": None},
    ),
    "dma_unmap": (
        requests.dma_unmap(0x1000, 0x2000),
        struct.pack("<IIQQ", 24, 0, 0x1000, 0x2000),
        {struct.pack("<IIQQ", 24, 0, 0x1000, 0x2000): None, b"": None},
    ),
    "dma_unmap_all": (
        requests.dma_unmap_all(),
        struct.pack("<IIQQ", 24, 2, 0, 0),
        {bytes(24): None, b"": None},
    ),
    "device_info": (
        requests.device_info(),
        struct.pack("<IIII", 16, 0, 0, 0),
        {struct.pack("<IIII", 16, 3, 9, 5): (3, 9, 5)},
    ),
    "region_info": (
        requests.region_info(7),
        struct.pack("<IIIIQQ", 32, 0, 7, 0, 0, 0),
        {
            struct.pack("<IIIIQQ", 32, 3, 7, 0, 4096, 0): (32, RegionInfo(4096, 3)),
            struct.pack("<IIIIQQ", 80, 7, 7, 0, 4096, 8): (80, RegionInfo(4096, 7, None, 8)),
        },
    ),
    "region_io_fds": (
        requests.region_io_fds(2),
        struct.pack("<IIII", 16, 0, 2, 0),
        {
            struct.pack("<IIII", 16, 0, 2, 0): (16, (), ()),
            struct.pack("<IIII", 112, 0, 2, 2): (112, (), ()),  # there are two, without room
        },
    ),
    "irq_info": (
        requests.irq_info(2),
        struct.pack("<IIII", 16, 0, 2, 0),
        {struct.pack("<IIII", 16, 1, 2, 2048): IrqInfo(2048, 1)},
    ),
    "set_irqs with fds": (
        requests.set_irqs(2, 0x24, 5, 2, fds=[7, 8]),
        struct.pack("<IIIII", 20, 0x24, 2, 5, 2),
        {b"": None, bytes(20): None},
    ),
    "set_irqs with bools": (
        requests.set_irqs(2, 0x22, 0, 2, bools=b"\0\1"),
        struct.pack("<IIIII", 22, 0x22, 2, 0, 2) + b"\0\1",
        {b"": None},
    ),
    "region_read": (
        requests.region_read(0, 0x80, 4),
        struct.pack("<QII", 0x80, 0, 4),
        {struct.pack("<QII", 0x80, 0, 4) + b"data": b"data"},
    ),
    "region_read of nothing": (
        requests.region_read(0, 0x80, 0),
        struct.pack("<QII", 0x80, 0, 0),
        {struct.pack("<QII", 0x80, 0, 0): b""},
    ),
    "region_write": (
        requests.region_write(0, 0x80, b"data"),
        struct.pack("<QII", 0x80, 0, 4) + b"data",
        {struct.pack("<QII", 0x80, 0, 4): None, b"": None},
    ),
    "region_write_multi": (
        requests.region_write_multi([RegionWrite(0, 8, b"12"), RegionWrite(1, 16, b"12345678")]),
        struct.pack("<QQII8sQII8s", 2, 8, 0, 2, b"12", 16, 1, 8, b"12345678"),
        {struct.pack("<Q", 2): None},
    ),
    "reset": (requests.reset(), b"", {b"": None}),
    "device_feature set": (
        requests.device_feature(vfio_host.DEVICE_FEATURE_SET | 2, b"12345678"),
        struct.pack("<II", 16, 1 << 17 | 2) + b"12345678",
        {struct.pack("<II", 16, 1 << 17 | 2) + b"12345678": (16, 1 << 17 | 2, b"12345678")},
    ),
    "device_feature get": (
        requests.device_feature(vfio_host.DEVICE_FEATURE_GET | 1, argsz=16),
        struct.pack("<II", 16, 1 << 16 | 1),
        {
            struct.pack("<IIQ", 16, 1 << 16 | 1, 5): (16, 1 << 16 | 1, struct.pack("<Q", 5)),
            struct.pack("<II", 99, 1 << 16 | 1): (99, 1 << 16 | 1, b""),
        },
    ),
    "mig_data_read": (
        requests.mig_data_read(8),
        struct.pack("<II", 16, 8),
        {
            struct.pack("<II", 16, 3) + b"abc": b"abc",
            struct.pack("<II", 11, 3) + b"abc\0\0\0\0\0": b"abc",
            struct.pack("<II", 8, 0): b"",
        },
    ),
    "mig_data_write": (
        requests.mig_data_write(b"abc"),
        struct.pack("<II", 11, 3) + b"abc",
        {b"": None},
    ),
}


@pytest.mark.parametrize(("request_", "payload", "replies"), COMMANDS.values(), ids=COMMANDS)
def test_every_command(
    request_: Request[Any], payload: bytes, replies: dict[bytes, object]
) -> None:
    assert request_.payload == payload
    for reply, result in replies.items():
        assert request_.decode(answer(request_, reply)) == result


def test_every_command_of_a_client_is_here() -> None:
    from_server = {Command.DMA_READ, Command.DMA_WRITE}
    assert {request.command for request, *_ in COMMANDS.values()} == (
        set(Command) - from_server - {Command.VERSION}
    )


NONSENSE: dict[str, tuple[Request[Any], list[bytes]]] = {
    "dma_map": (requests.dma_map(0, 4096), [bytes(33)]),
    "dma_unmap": (requests.dma_unmap(0, 4096), [bytes(25)]),
    "device_info": (requests.device_info(), [b"", bytes(15), bytes(17)]),
    "region_info": (
        requests.region_info(1),
        [
            b"",
            bytes(31),
            struct.pack("<IIIIQQ", 32, 3, 0, 0, 4096, 0),  # another region
            struct.pack("<IIIIQQ", 32, 3, 1, 0, 4096, 0) + bytes(1),  # more than accepted
            struct.pack("<IIIIQQ", 32, 8, 1, 32, 4096, 0),  # capabilities behind the end
        ],
    ),
    "region_io_fds": (
        requests.region_io_fds(1, 112),
        [
            b"",
            bytes(15),
            struct.pack("<IIII", 16, 0, 0, 0),  # another region
            struct.pack("<IIII", 112, 0, 1, 1) + bytes(41),
            struct.pack("<IIII", 112, 0, 1, 0) + bytes(40),
            struct.pack("<IIII", 112, 0, 1, Q >> 32) + bytes(48),
            struct.pack("<IIII", 112, 0, 1, 2) + bytes(97),
            # The first of no file descriptors.
            struct.pack("<IIIIQQIIIIQ", 56, 0, 1, 1, 0, 4, 0, 0, 0, 0, 0),
            struct.pack("<IIIIQQIIIIQQ", 64, 0, 1, 1, 0, 4, Q >> 32, 2, 0, 0, 0, 0),
        ],
    ),
    "irq_info": (requests.irq_info(2), [b"", bytes(15), bytes(17)]),
    "set_irqs": (requests.set_irqs(2, 0x21, 0, 0), [bytes(21)]),
    "region_read": (
        requests.region_read(0, 0, 4),
        [
            b"",
            struct.pack("<QII", 0, 0, 4) + b"dat",
            struct.pack("<QII", 0, 0, 4) + b"data ",
            struct.pack("<QII", 0, 0, 3) + b"data",
        ],
    ),
    "region_write": (requests.region_write(0, 0, b"data"), [bytes(21)]),
    "region_write_multi": (
        requests.region_write_multi([RegionWrite(0, 8, b"12")]),
        [b"", bytes(7), struct.pack("<Q", 0), struct.pack("<Q", 2)],
    ),
    "reset": (requests.reset(), [bytes(1)]),
    "device_feature": (
        requests.device_feature(1 << 16 | 1, argsz=16),
        [b"", bytes(7), struct.pack("<II", 16, 1 << 16 | 2), struct.pack("<IIQB", 17, 65537, 0, 0)],
    ),
    "mig_data_read": (
        requests.mig_data_read(3),
        [
            b"",
            bytes(7),
            struct.pack("<II", 11, 4) + b"abc",
            struct.pack("<II", 12, 4) + b"abcd",
        ],
    ),
    "mig_data_write": (requests.mig_data_write(b"abc"), [bytes(12)]),
}


@pytest.mark.parametrize(("request_", "payloads"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense(request_: Request[Any], payloads: list[bytes]) -> None:
    for payload in payloads:
        nonsense(request_, payload)


def test_a_region_comes_with_its_file() -> None:
    request = requests.region_info(1, 80)
    areas = struct.pack("<HHIIIQQQQ", 1, 1, 0, 2, 0, 0, 0x1000, 0x2000, 0x1000)
    message = answer(request, struct.pack("<IIIIQQ", 80, 15, 1, 32, 0x8000, 0) + areas, [33])
    info = RegionInfo(0x8000, 7, 33, 0, ((0, 0x1000), (0x2000, 0x1000)))
    assert request.decode(message) == (80, info)
    assert message.fds == [], "the file is the receiver's now"


def test_half_an_answer_on_a_region_comes_without_its_file() -> None:
    request = requests.region_info(1, 32)
    message = answer(request, struct.pack("<IIIIQQ", 80, 7, 1, 0, 0x8000, 0), [33])
    assert request.decode(message) == (80, RegionInfo(0x8000, 7))
    assert message.fds == [33]


def test_parts_of_a_region_as_specified() -> None:
    request = requests.region_io_fds(1, 16 + 3 * 40)
    head = struct.pack("<IIII", 136, 0, 1, 3)
    rows = struct.pack("<QQIIIIQ", 0, 4, 1, 0, 9, 0, 77)
    rows += struct.pack("<QQIIIIQ", 8, 8, 0, 1, 0, 0, 88)
    rows += struct.pack("<QQIIIIQ", 16, 2, spec.IO_FD_NONE, 0, 0, 0, 0)
    message = answer(request, head + rows, [33, 34])
    parts = (
        IoFd(0, 4, IoFdType.IOEVENTFD, 9, 77, fd=1),
        IoFd(8, 8, IoFdType.IOREGIONFD, 0, 88, fd=0),
        IoFd(16, 2, IoFdType.IOEVENTFD, 0, 0, fd=None),
    )
    assert request.decode(message) == (136, parts, (33, 34))
    assert message.fds == []


def test_parts_of_a_region_as_libvfio_user_has_them() -> None:
    request = requests.region_io_fds(1, 16 + 3 * 48)
    head = struct.pack("<IIII", 160, 0, 1, 3)
    rows = struct.pack("<QQIIIIQQ", 0, 4, 0, 0, 9, 0, 0, 77)
    rows += struct.pack("<QQIIIIQQ", 8, 8, 0, 1, 0, 0, 88, 0)
    rows += struct.pack("<QQIIIIQQ", 16, 2, 0, 2, 0, 1, 0x40, 99)
    message = answer(request, head + rows, [33, 34])
    parts = (
        IoFd(0, 4, IoFdType.IOEVENTFD, 9, 77, fd=0),
        IoFd(8, 8, IoFdType.IOREGIONFD, 0, 88, fd=0),
        IoFd(16, 2, IoFdType.IOEVENTFD_SHADOW, 0, 99, fd=0, shadow_fd=1, shadow_offset=0x40),
    )
    assert request.decode(message) == (160, parts, (33, 34))


def test_half_an_answer_on_parts_comes_without_its_files() -> None:
    request = requests.region_io_fds(1, 16 + 40)
    part = struct.pack("<QQIIIIQ", 0, 4, 0, 0, 0, 0, 0)
    message = answer(request, struct.pack("<IIII", 96, 0, 1, 1) + part, [33])
    assert request.decode(message) == (96, (), ())
    assert message.fds == [33]


# --- negotiation


TWIN = b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true,"fd_index":%d}}}\0'


def version(minor: int, theirs: Capabilities | None, *, ours: Capabilities) -> Agreement:
    request = requests.version(1, ours)
    assert request.payload == encode_version(1, ours)
    text = b"" if theirs is None else theirs.encode()
    return request.decode(answer(request, spec.VERSION.pack(0, minor) + text))


@pytest.mark.parametrize("minor", [0, 1])
def test_an_older_version_is_taken(minor: int) -> None:
    assert version(minor, THEIRS, ours=Capabilities(16)) == Agreement(minor, THEIRS)


def test_without_capabilities_the_defaults_hold() -> None:
    assert version(0, None, ours=Capabilities(16)) == Agreement(0, Capabilities(1, 1 << 20))


def test_what_was_not_offered_is_not_agreed_upon() -> None:
    theirs = Capabilities(8, 64 << 20, write_multiple=True, iommufd=True, fixed_iova=True)
    agreed = version(1, theirs, ours=Capabilities(16)).capabilities
    assert agreed == Capabilities(8, 1 << 20)
    ours = Capabilities(16, 2 << 20, write_multiple=True, iommufd=True, fixed_iova=True)
    agreed = version(1, theirs, ours=ours).capabilities
    assert agreed == Capabilities(8, 2 << 20, write_multiple=True, iommufd=True, fixed_iova=True)


def test_what_nobody_knows_is_ignored() -> None:
    request = requests.version(1, Capabilities(16))
    text = b'{"capabilities":{"max_msg_fds":8,"of somebody":{"else":[1]}}}\0'
    message = answer(request, spec.VERSION.pack(0, 1) + text)
    assert request.decode(message) == Agreement(1, Capabilities(8))


def test_a_twin_socket_comes_with_the_answer() -> None:
    request = requests.version(1, Capabilities(16, twin_socket=True))
    assert b'"twin_socket":{"supported":true}' in request.payload
    message = answer(request, spec.VERSION.pack(0, 1) + TWIN % 0, [33])
    assert request.decode(message) == Agreement(1, Capabilities(8, twin_socket=True), 33)
    assert message.fds == [], "it is the receiver's now"
    nonsense(request, spec.VERSION.pack(0, 1) + TWIN % 0)
    nonsense(request, spec.VERSION.pack(0, 1) + TWIN % 1, [33])


def test_a_twin_socket_is_not_taken_unasked() -> None:
    request = requests.version(1, Capabilities(16))
    assert request.max_fds == 0
    message = answer(request, spec.VERSION.pack(0, 1) + TWIN % 0, [33])
    assert request.decode(message) == Agreement(1, Capabilities(8))
    assert message.fds == [33]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        spec.VERSION.pack(1, 0) + b"{}\0",
        spec.VERSION.pack(0, 2) + b"{}\0",
        spec.VERSION.pack(0, 0) + b"{}",
        spec.VERSION.pack(0, 0) + b"{\0",
        spec.VERSION.pack(0, 0) + b'{"capabilities":{"max_msg_fds":-1}}\0',
        spec.VERSION.pack(0, 0) + b"[" * 5000 + b"\0",
    ],
    ids=["empty", "major", "minor", "no NUL", "not JSON", "impossible", "too much JSON"],
)
def test_a_version_that_can_not_be(payload: bytes) -> None:
    nonsense(requests.version(1, Capabilities(16)), payload)


# --- what a device can't take


TOO_MUCH = {
    "read": requests.region_read(0, 0, 65),
    "write": requests.region_write(0, 0, bytes(65)),
    "multi": requests.region_write_multi([RegionWrite(0, 0, b"1")] * 3),
    "feature": requests.device_feature(1 << 17, bytes(65)),
    "feature's answer": requests.device_feature(1 << 16, argsz=73),
    "state": requests.mig_data_write(bytes(65)),
    "state's answer": requests.mig_data_read(65),
    "fds": requests.set_irqs(2, 0x24, 0, 3, fds=[1, 2, 3]),
}


@pytest.mark.parametrize("request_", TOO_MUCH.values(), ids=TOO_MUCH)
def test_more_than_the_device_takes(request_: Request[Any]) -> None:
    theirs = Capabilities(2, max_data_xfer_size=64, write_multiple=True)
    with pytest.raises(UsageError, match="the server takes"):
        request_.check(theirs)


def test_as_much_as_the_device_takes() -> None:
    requests.region_read(0, 0, 64).check(THEIRS)
    requests.region_write(0, 0, bytes(64)).check(THEIRS)
    requests.device_feature(1 << 17, bytes(64)).check(THEIRS)
    requests.set_irqs(2, 0x24, 0, 2, fds=[1, 2]).check(THEIRS)
    requests.dma_map(0, 1 << 40, fd=0).check(THEIRS)


def test_several_writes_need_a_device_that_takes_them() -> None:
    request = requests.region_write_multi([RegionWrite(0, 0, b"1")])
    with pytest.raises(UsageError, match="write_multiple"):
        request.check(THEIRS)
    request.check(Capabilities(2, write_multiple=True))


def test_what_no_message_can_say() -> None:
    with pytest.raises(UsageError, match="-1"):
        requests.region_read(0, 0, -1)
    with pytest.raises(UsageError, match="18446744073709551616"):
        requests.dma_map(0, 1 << 64)
    with pytest.raises(UsageError, match="4294967296"):
        requests.irq_info(1 << 32)
    with pytest.raises(UsageError, match="9 bytes"):
        requests.region_write_multi([RegionWrite(0, 0, bytes(9))])


def test_only_what_may_bring_files_accepts_them() -> None:
    accepted = {
        request.command: request.max_fds for request, *_ in COMMANDS.values() if request.max_fds
    }
    assert accepted == {
        Command.DEVICE_GET_REGION_INFO: 1,
        Command.DEVICE_GET_REGION_IO_FDS: requests.MAX_REPLY_FDS,
    }
    assert vfio.REGION_INFO.size == 32
