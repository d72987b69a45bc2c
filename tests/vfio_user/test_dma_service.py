from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest

from tests.vfio_user.conftest import PAGE
from viommu.errors import Access, BackendError, TranslationFault
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user.dma_service import DmaService
from viommu.vfio_user.protocol import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 2 * PAGE


class Port:
    """Memory of which an access raises ``error``."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, address: int, size: int) -> bytes:
        raise self.error

    def write(self, address: int, data: bytes) -> None:
        raise self.error


@pytest.fixture
def memory(memfd: Callable[..., int], files: MappedFiles) -> Iterator[GuestMemory]:
    """A page to read and write at 0, one to read behind it, one without a file behind that."""
    memory = GuestMemory()
    for gpa, writable in ((0, True), (PAGE, False)):
        file = files.get(memfd(), 0, PAGE, writable=writable)
        memory.map(gpa, PAGE, readable=True, writable=writable, file=file)
    memory.map(2 * PAGE, PAGE, readable=True, writable=True, file=None)
    yield memory
    memory.close()


def ask(command: int, address: int, count: int, data: bytes = b"", *, flags: int = 0) -> Message:
    return Message(77, command, flags, 0, spec.DMA_ACCESS.pack(address, count) + data, [])


def ok(message: Message, payload: bytes) -> bytes:
    return spec.HEADER.pack(77, message.command, 16 + len(payload), 1, 0) + payload


def failed(message: Message, number: int) -> bytes:
    return spec.HEADER.pack(77, message.command, 16, 0x21, number)


def test_reads_and_writes(memory: GuestMemory) -> None:
    service = DmaService(memory, LIMIT)
    write = ask(Command.DMA_WRITE, 16, 4, b"data")
    assert service.answer(write) == ok(write, write.payload[:16])
    read = ask(Command.DMA_READ, 14, 8)
    assert service.answer(read) == ok(read, read.payload + b"\0\0data\0\0")
    both = ask(Command.DMA_READ, 0, LIMIT)  # as much as is taken at a time
    assert service.answer(both) == ok(both, both.payload + memory.read(0, LIMIT))
    for command in (Command.DMA_READ, Command.DMA_WRITE):
        nothing = ask(command, 0, 0)
        assert service.answer(nothing) == ok(nothing, nothing.payload)
    assert (service.commands, service.reads, service.writes, service.refused) == (5, 3, 2, 0)


def test_a_posted_command_is_not_answered(memory: GuestMemory) -> None:
    service = DmaService(memory, LIMIT)
    posted = spec.F_NO_REPLY
    assert service.answer(ask(Command.DMA_WRITE, 0, 4, b"data", flags=posted)) is None
    assert memory.read(0, 4) == b"data"
    assert service.answer(ask(Command.DMA_WRITE, PAGE, 4, b"data", flags=posted)) is None
    assert (service.writes, service.refused) == (1, 1)


REFUSED = {
    "no memory": (ask(Command.DMA_READ, 1 << 40, 4), errno.ENODEV),
    "no file": (ask(Command.DMA_READ, 2 * PAGE, 4), errno.ENODEV),
    "beyond the end": (ask(Command.DMA_READ, 2**64 - 1, 2), errno.ENODEV),
    "half of it": (ask(Command.DMA_WRITE, PAGE - 2, 4, b"data"), errno.ENODEV),
    "read-only": (ask(Command.DMA_WRITE, PAGE, 4, b"data"), errno.ENODEV),
    "too much": (ask(Command.DMA_READ, 0, LIMIT + 1), errno.E2BIG),
    "far too much": (ask(Command.DMA_READ, 0, 2**64 - 1), errno.E2BIG),
    "too much to write": (ask(Command.DMA_WRITE, 0, LIMIT + 1, bytes(LIMIT + 1)), errno.E2BIG),
    "more than came": (ask(Command.DMA_WRITE, 0, 5, b"data"), errno.E2BIG),
    "less than came": (ask(Command.DMA_WRITE, 0, 3, b"data"), errno.EINVAL),
    "short": (Message(77, Command.DMA_READ, 0, 0, bytes(15), []), errno.EINVAL),
    "nothing": (Message(77, Command.DMA_WRITE, 0, 0, b"", []), errno.EINVAL),
    "a file": (ask(Command.DMA_READ, 0, 4), errno.EINVAL),
    "a file that was lost": (ask(Command.DMA_READ, 0, 4), errno.EINVAL),
    "another command": (ask(Command.REGION_READ, 0, 4), errno.ENOSYS),
    "no command at all": (ask(999, 0, 4), errno.ENOSYS),
}


@pytest.mark.parametrize(("message", "number"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    memory: GuestMemory, message: Message, number: int, request: pytest.FixtureRequest
) -> None:
    case = request.node.callspec.id
    message.fds = [0] if case == "a file" else []
    message.truncated = case == "a file that was lost"
    service = DmaService(memory, LIMIT)
    memory.write(0, bytes(PAGE))
    assert service.answer(message) == failed(message, number)
    assert memory.read(0, PAGE) == bytes(PAGE)
    assert (service.reads, service.writes, service.refused) == (0, 0, 1)


def test_without_memory() -> None:
    message = ask(Command.DMA_READ, 0, 4)
    assert DmaService(None, LIMIT).answer(message) == failed(message, errno.ENOSYS)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (TranslationFault(0, Access.READ), errno.ENODEV),
        (BackendError(errno.ENOSPC, "full"), errno.ENOSPC),
    ],
    ids=repr,
)
@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE])
def test_what_memory_refuses(command: int, error: Exception, number: int) -> None:
    message = ask(command, 0, 4, b"data" if command == Command.DMA_WRITE else b"")
    assert DmaService(Port(error), LIMIT).answer(message) == failed(message, number)


def test_a_defect_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    message = ask(Command.DMA_READ, 0, 4)
    service = DmaService(Port(RuntimeError("a bug")), LIMIT)
    assert service.answer(message) == failed(message, errno.EIO)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "a bug" in caplog.text
