"""What a client sends and takes: the payloads, and the real client with the real server."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.vfio_user import ioas_payloads as wire
from tests.vfio_user.conftest import PAGE
from tests.vfio_user.register_bank import BAR, DMA_ADDRESS, DMA_START, RegisterBank
from viommu.errors import PeerError, UsageError
from viommu.spec import vfio_user as base
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.testing.serving import LoopThread
from viommu.vfio_user import Client, Request, Server, ServerLimits, ioas_requests
from viommu.vfio_user.ioas_table import IoasLimits
from viommu.vfio_user.loop_client import default_offers
from viommu.vfio_user.protocol import Capabilities, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from viommu.memory import MappedFiles

BASE = 0x100000  # where the server's IOVAs begin
TOP = 1 << 64
BOTH = Capabilities(8, iommufd=True, fixed_iova=True)

# The command, its payload, and which replies are taken with which result.
COMMANDS: dict[str, tuple[Request[Any], int, bytes, dict[bytes, object]]] = {
    "alloc": (
        ioas_requests.alloc_ioas(),
        IommufdCommand.ALLOC_IOAS,
        wire.alloc_ioas(),
        # Upstream answers without argsz.
        {wire.alloc_ioas(out=5): 5, wire.alloc_ioas(argsz=0, out=5): 5},
    ),
    "destroy": (
        ioas_requests.destroy_ioas(5),
        IommufdCommand.DESTROY_IOAS,
        wire.destroy_ioas(5),
        {b"": None, wire.destroy_ioas(5): None},
    ),
    "map": (
        ioas_requests.ioas_map(5, PAGE, fd=0, offset=0x3000),
        IommufdCommand.IOAS_MAP,
        wire.ioas_map(5, PAGE, offset=0x3000),
        {
            wire.ioas_map(5, PAGE, offset=0x3000, iova=0x7000): 0x7000,
            wire.ioas_map(5, PAGE, offset=0x3000, iova=TOP - PAGE): TOP - PAGE,
        },
    ),
    "map, read-only": (
        ioas_requests.ioas_map(5, PAGE, fd=0, writable=False),
        IommufdCommand.IOAS_MAP,
        wire.ioas_map(5, PAGE, flags=wire.READABLE),
        {},
    ),
    "map, write-only": (
        ioas_requests.ioas_map(5, PAGE, fd=0, readable=False),
        IommufdCommand.IOAS_MAP,
        wire.ioas_map(5, PAGE, flags=wire.WRITEABLE),
        {},
    ),
    "map, at 0": (
        ioas_requests.ioas_map(5, PAGE, fd=0, iova=0),
        IommufdCommand.IOAS_MAP,
        wire.ioas_map(5, PAGE, flags=wire.RW | wire.FIXED),
        {wire.ioas_map(5, PAGE, flags=wire.RW | wire.FIXED): 0},
    ),
    "unmap": (
        ioas_requests.ioas_unmap(5, 0x7000, PAGE),
        IommufdCommand.IOAS_UNMAP,
        wire.ioas_unmap(5, 0x7000, PAGE),
        {b"": None},
    ),
    "unmap everything": (
        ioas_requests.ioas_unmap_all(5),
        IommufdCommand.IOAS_UNMAP,
        wire.ioas_unmap(5, 0, 0, flags=1),
        {b"": None},
    ),
    "copy": (
        ioas_requests.ioas_copy(5, 0x7000, PAGE, 6),
        IommufdCommand.IOAS_COPY,
        wire.ioas_copy(5, 0x7000, PAGE, 6),
        {wire.ioas_copy(5, 0x7000, PAGE, 6, iova=0x9000): 0x9000},
    ),
    "copy, read-only, at an address": (
        ioas_requests.ioas_copy(5, 0x7000, PAGE, 6, iova=0x9000, readable=True, writable=False),
        IommufdCommand.IOAS_COPY,
        wire.ioas_copy(5, 0x7000, PAGE, 6, iova=0x9000, flags=wire.READABLE | wire.FIXED),
        {wire.ioas_copy(5, 0x7000, PAGE, 6, iova=0x9000): 0x9000},
    ),
    "bind": (
        ioas_requests.bind_iommufd(),
        IommufdCommand.BIND,
        wire.bind(),
        {wire.bind(out=3): 3, wire.bind(argsz=0, iommufd=0, out=1): 1},
    ),
    "attach": (
        ioas_requests.attach_ioas(5),
        IommufdCommand.ATTACH_PT,
        wire.attach_pt(5),
        {b"": None, wire.attach_pt(5): None},
    ),
    "detach": (
        ioas_requests.detach_ioas(),
        IommufdCommand.DETACH_PT,
        wire.detach_pt(),
        {b"": None},
    ),
}


def answer(request: Request[Any], payload: bytes) -> Message:
    return Message(1, request.command, base.F_TYPE_REPLY, 0, payload, [])


@pytest.mark.parametrize(
    ("request_", "command", "payload", "replies"), COMMANDS.values(), ids=COMMANDS
)
def test_what_is_sent_and_what_is_answered(
    request_: Request[Any], command: int, payload: bytes, replies: dict[bytes, object]
) -> None:
    assert (request_.command, request_.payload) == (command, payload)
    assert request_.fds == ((0,) if command == IommufdCommand.IOAS_MAP else ())
    for reply, result in replies.items():
        assert request_.decode(answer(request_, reply)) == result


FIXED_MAP = ioas_requests.ioas_map(5, PAGE, fd=0, iova=0x7000)
NONSENSE = {
    "alloc, short": (ioas_requests.alloc_ioas(), wire.alloc_ioas()[:-1]),
    "alloc, nothing": (ioas_requests.alloc_ioas(), b""),
    "alloc, long": (ioas_requests.alloc_ioas(), wire.alloc_ioas() + b"\0"),
    "destroy, long": (ioas_requests.destroy_ioas(1), wire.destroy_ioas(1) + b"\0"),
    "map, nothing": (ioas_requests.ioas_map(5, PAGE, fd=0), b""),
    "map, past the end": (
        ioas_requests.ioas_map(5, PAGE, fd=0),
        wire.ioas_map(5, PAGE, iova=TOP - PAGE + 1),
    ),
    "map, elsewhere": (FIXED_MAP, wire.ioas_map(5, PAGE, iova=0x8000)),
    "copy, elsewhere": (
        ioas_requests.ioas_copy(5, 0, PAGE, 6, iova=0x7000),
        wire.ioas_copy(5, 0, PAGE, 6, iova=0x8000),
    ),
    "copy, past the end": (
        ioas_requests.ioas_copy(5, 0, PAGE, 6),
        wire.ioas_copy(5, 0, PAGE, 6, iova=TOP - 1),
    ),
    "bind, nothing": (ioas_requests.bind_iommufd(), b""),
    "attach, long": (ioas_requests.attach_ioas(5), bytes(17)),
}


@pytest.mark.parametrize(("request_", "payload"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_not_taken(request_: Request[Any], payload: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        request_.decode(answer(request_, payload))
    assert caught.value.errno == errno.EPROTO


def test_a_server_must_have_the_commands() -> None:
    for request, *_ in COMMANDS.values():
        with pytest.raises(UsageError, match=r"iommufd|fixed_iova"):
            request.check(Capabilities(8))
        request.check(BOTH)


def test_a_server_must_let_its_clients_choose() -> None:
    without = replace(BOTH, fixed_iova=False)

    ioas_requests.ioas_map(5, PAGE, fd=0).check(without)
    ioas_requests.ioas_copy(5, 0, PAGE, 6).check(without)
    for request in (FIXED_MAP, ioas_requests.ioas_copy(5, 0, PAGE, 6, iova=0)):
        with pytest.raises(UsageError, match="fixed_iova"):
            request.check(without)


@pytest.mark.parametrize(
    ("readable", "writable"), [(True, None), (None, False), (None, True), (False, False)]
)
def test_the_access_of_a_copy_is_said_whole(readable: bool | None, writable: bool | None) -> None:
    with pytest.raises(UsageError, match="copy"):
        ioas_requests.ioas_copy(5, 0, PAGE, 6, readable=readable, writable=writable)


def test_what_no_message_can_say() -> None:
    for make in (
        lambda: ioas_requests.ioas_map(5, TOP, fd=0),
        lambda: ioas_requests.attach_ioas(1 << 32),
        lambda: ioas_requests.ioas_unmap(-1, 0, PAGE),
    ):
        with pytest.raises(UsageError):
            make()


# --- the real client with the real server


@pytest.fixture
def serve(
    bank: RegisterBank, files: MappedFiles, tmp_path: Path
) -> Iterator[Callable[[ServerLimits], Path]]:
    """A function that serves the register bank, and returns where."""
    servers: list[Server] = []
    with LoopThread() as thread:

        def make(limits: ServerLimits) -> Path:
            path = tmp_path / "bank.sock"
            servers.append(thread.call(lambda: Server(thread.loop, bank, path, files, limits)))
            return path

        yield make
        for server in servers:
            thread.call(server.close)
    assert len(files) == 0


def dma_write(client: Client, address: int, value: int) -> None:
    client.region_write(BAR, DMA_ADDRESS, struct.pack("<Q", address))
    client.region_write(BAR, DMA_START, struct.pack("<I", value))


def offers(*, iommufd: bool = True, fixed_iova: bool = True) -> Capabilities:
    return replace(default_offers(serves=False), iommufd=iommufd, fixed_iova=fixed_iova)


def refusal(act: Callable[[], object]) -> int:
    with pytest.raises(PeerError) as caught:
        act()
    return caught.value.errno


WITH = ServerLimits(iommufd=IoasLimits())


def test_a_device_does_dma_in_one_space_and_is_refused_in_another(
    serve: Callable[[ServerLimits], Path], memfd: Callable[..., int]
) -> None:
    memory = memfd()
    with Client(serve(WITH), offers=offers()) as client:
        first = client.call(ioas_requests.alloc_ioas())
        second = client.call(ioas_requests.alloc_ioas())
        client.call(ioas_requests.bind_iommufd())
        client.call(ioas_requests.attach_ioas(first))
        iova = client.call(ioas_requests.ioas_map(first, PAGE, fd=memory, offset=3 * PAGE))
        assert iova == BASE

        dma_write(client, iova + 8, 0x11223344)
        assert os.pread(memory, 4, 3 * PAGE + 8) == b"\x44\x33\x22\x11"

        client.call(ioas_requests.attach_ioas(second))
        assert refusal(lambda: dma_write(client, iova + 8, 1)) == errno.EFAULT

        there = client.call(ioas_requests.ioas_copy(first, iova, PAGE, second, iova=0x5000))
        client.call(ioas_requests.destroy_ioas(first))
        dma_write(client, there, 0x55)
        assert os.pread(memory, 1, 3 * PAGE) == b"\x55"

        client.call(ioas_requests.ioas_unmap(second, there, PAGE))
        assert refusal(lambda: dma_write(client, there, 1)) == errno.EFAULT
        client.call(ioas_requests.ioas_map(second, PAGE, fd=memory, iova=0x9000))
        client.call(ioas_requests.ioas_unmap_all(second))
        assert refusal(lambda: dma_write(client, 0x9000, 1)) == errno.EFAULT
        client.call(ioas_requests.detach_ioas())


def test_requests_follow_one_another_without_waiting(
    serve: Callable[[ServerLimits], Path], memfd: Callable[..., int]
) -> None:
    memory = memfd()
    with Client(serve(WITH), offers=offers()) as client:
        ioas = client.call(ioas_requests.alloc_ioas())
        maps = [
            client.submit(ioas_requests.ioas_map(ioas, PAGE, fd=memory, offset=page * PAGE))
            for page in range(16)
        ]
        assert [client.wait(each) for each in maps] == [BASE + page * PAGE for page in range(16)]
        unmaps = [
            client.submit(ioas_requests.ioas_unmap(ioas, BASE + page * PAGE, PAGE))
            for page in range(16)
        ]
        for each in unmaps:
            client.wait(each)


REFUSED: dict[str, tuple[Request[Any], int]] = {
    "destroy": (ioas_requests.destroy_ioas(9), errno.ENOENT),
    "unmap": (ioas_requests.ioas_unmap(1, 0, PAGE), errno.ENOENT),
    "unmap everything": (ioas_requests.ioas_unmap_all(9), errno.ENOENT),
    "copy": (ioas_requests.ioas_copy(1, 0, PAGE, 1), errno.ENOENT),
    "attach": (ioas_requests.attach_ioas(1), errno.EINVAL),
    "detach": (ioas_requests.detach_ioas(), errno.EINVAL),
}


@pytest.mark.parametrize(("request_", "number"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_ends_nothing(
    serve: Callable[[ServerLimits], Path], request_: Request[Any], number: int
) -> None:
    with Client(serve(WITH), offers=offers()) as client:
        assert client.call(ioas_requests.alloc_ioas()) == 1

        assert refusal(lambda: client.call(request_)) == number
        assert client.call(ioas_requests.alloc_ioas()) == 2


# Who offers what, and whether the client then has the commands, and may choose.
MATRIX = {
    "both": (offers(), WITH, True, True),
    "both, without choosing": (offers(fixed_iova=False), WITH, True, False),
    "the client": (offers(), ServerLimits(), False, False),
    "the server": (offers(iommufd=False, fixed_iova=False), WITH, False, False),
    "the server, and choosing": (offers(iommufd=False), WITH, False, False),
    "none": (None, ServerLimits(), False, False),
}


@pytest.mark.parametrize(("offered", "limits", "iommufd", "fixed"), MATRIX.values(), ids=MATRIX)
def test_negotiation(
    serve: Callable[[ServerLimits], Path],
    memfd: Callable[..., int],
    offered: Capabilities | None,
    limits: ServerLimits,
    *,
    iommufd: bool,
    fixed: bool,
) -> None:
    memory = memfd()
    with Client(serve(limits), offers=offered) as client:
        assert client.capabilities.iommufd == iommufd
        assert client.capabilities.fixed_iova == fixed
        if not iommufd:
            with pytest.raises(UsageError, match="iommufd"):
                client.call(ioas_requests.alloc_ioas())
            # What there was before works as before.
            client.dma_map(0, PAGE, fd=memory)
            dma_write(client, 0, 0x66)
            assert os.pread(memory, 1, 0) == b"\x66"
            return
        ioas = client.call(ioas_requests.alloc_ioas())
        client.call(ioas_requests.ioas_map(ioas, PAGE, fd=memory))
        chosen = ioas_requests.ioas_map(ioas, PAGE, fd=memory, iova=0)
        if fixed:
            assert client.call(chosen) == 0
        else:
            with pytest.raises(UsageError, match="fixed_iova"):
                client.call(chosen)
