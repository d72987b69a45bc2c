"""Each iommufd command over the wire: good and bad input, what it answers, what the device sees."""

from __future__ import annotations

import errno
import logging
import os
import re
import struct
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.vfio_user import register_bank
from tests.vfio_user.conftest import HELLO, PAGE, Peer, open_fds
from tests.vfio_user.ioas_payloads import (
    FIXED,
    READABLE,
    RW,
    WRITEABLE,
    alloc_ioas,
    attach_pt,
    bind,
    destroy_ioas,
    detach_pt,
    hello,
    ioas_copy,
    ioas_map,
    ioas_unmap,
)
from viommu.errors import GuestMemoryError
from viommu.spec import vfio_user as base
from viommu.spec import vfio_user_iommufd as spec
from viommu.spec.vfio_user import Command
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.vfio_user import Server, ServerLimits
from viommu.vfio_user.ioas_table import IoasLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.vfio_user.register_bank import RegisterBank
    from viommu.loop import Loop
    from viommu.memory import MappedFiles

BASE = 0x100000  # where the server's IOVAs begin
LIMITS = ServerLimits(iommufd=IoasLimits(max_ioas=3, max_mappings=6))
FILE = 2  # descriptors of a mapped file: the mapping's own, and one to map it elsewhere
TOP = 1 << 64


@pytest.fixture
def server(
    loop: Loop,
    bank: RegisterBank,
    files: MappedFiles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Server]:
    caplog.set_level(logging.INFO, "viommu.vfio_user")
    server = Server(loop, bank, tmp_path / "bank.sock", files, LIMITS)
    yield server
    server.close()
    assert bank.memory.regions() == []
    assert len(files) == 0


@pytest.fixture
def peer(connect: Callable[[], Peer]) -> Peer:
    """A raw client that has the commands."""
    peer = connect()
    peer.ok(Command.VERSION, hello())
    return peer


class World(NamedTuple):
    """A client with two address spaces, of which the device is in the first."""

    peer: Peer
    bank: RegisterBank
    first: int  # BASE: pages 0 and 1, read-write; BASE + 2 pages: page 2, read-only
    second: int  # BASE: page 8
    memory: int  # the file, each page of which begins with its number
    other: int  # a file of one page, opened for reading only
    pipe: int

    def seen(self) -> list[tuple[int, int, int]]:
        """What the device sees: address, size, offset in the file."""
        return [(r.gpa, r.size, r.offset) for r in self.bank.memory.regions()]


@pytest.fixture
def world(
    peer: Peer, bank: RegisterBank, memfd: Callable[..., int], tmp_path: Path
) -> Iterator[World]:
    memory = memfd(16 * PAGE)
    for page in range(16):
        os.pwrite(memory, bytes([page]), page * PAGE)
    path = tmp_path / "one page"
    path.write_bytes(bytes(PAGE))
    other = os.open(path, os.O_RDONLY)
    pipe, far_end = os.pipe()
    first, second = new_ioas(peer), new_ioas(peer)
    peer.ok(IommufdCommand.BIND, bind())
    peer.ok(IommufdCommand.ATTACH_PT, attach_pt(first))
    peer.ok(IommufdCommand.IOAS_MAP, ioas_map(first, 2 * PAGE), [memory])
    read_only = ioas_map(first, PAGE, flags=READABLE, offset=2 * PAGE)
    peer.ok(IommufdCommand.IOAS_MAP, read_only, [memory])
    peer.ok(IommufdCommand.IOAS_MAP, ioas_map(second, PAGE, offset=8 * PAGE), [memory])
    yield World(peer, bank, first, second, memory, other, pipe)
    for fd in (other, pipe, far_end):
        os.close(fd)


def new_ioas(peer: Peer) -> int:
    return spec.AllocIoas.from_buffer_copy(
        peer.ok(IommufdCommand.ALLOC_IOAS, alloc_ioas())
    ).out_ioas_id


FIRST, SECOND, UNKNOWN = 1, 2, 7  # ids, as they come
DEVICE = 3
SEEN = [(BASE, 2 * PAGE, 0), (BASE + 2 * PAGE, PAGE, 2 * PAGE)]


# --- good input


class Good(NamedTuple):
    """A command, the reply that it gets, and what the device sees then, if that changes."""

    command: IommufdCommand
    payload: bytes
    reply: bytes = b""
    seen: list[tuple[int, int, int]] = SEEN
    fds: tuple[str, ...] = ()


MAPPED = BASE + 3 * PAGE  # where the next page of the first space goes
GOOD = {
    "alloc": Good(IommufdCommand.ALLOC_IOAS, alloc_ioas(), alloc_ioas(out=4)),
    "alloc, what is answered is not read": Good(
        IommufdCommand.ALLOC_IOAS, alloc_ioas(argsz=64, out=99), alloc_ioas(out=4)
    ),
    "alloc, more behind it": Good(
        IommufdCommand.ALLOC_IOAS, alloc_ioas() + b"more", alloc_ioas(out=4)
    ),
    "destroy": Good(IommufdCommand.DESTROY_IOAS, destroy_ioas(SECOND)),
    "map": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(FIRST, PAGE, offset=5 * PAGE),
        ioas_map(FIRST, PAGE, offset=5 * PAGE, iova=MAPPED),
        [*SEEN, (MAPPED, PAGE, 5 * PAGE)],
        ("memory",),
    ),
    "map, in the space that the device is not in": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(SECOND, PAGE),
        ioas_map(SECOND, PAGE, iova=BASE + PAGE),
        fds=("memory",),
    ),
    "map, an address without its flag is not read": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(FIRST, PAGE, iova=0x5000),
        ioas_map(FIRST, PAGE, iova=MAPPED),
        [*SEEN, (MAPPED, PAGE, 0)],
        ("memory",),
    ),
    "map, the client's own address comes back": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(SECOND, PAGE, user_va=0x7F00_1234_5000),
        ioas_map(SECOND, PAGE, user_va=0x7F00_1234_5000, iova=BASE + PAGE),
        fds=("memory",),
    ),
    "map, inside pages": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(FIRST, PAGE, offset=0x123),
        ioas_map(FIRST, PAGE, offset=0x123, iova=MAPPED + 0x123),
        [*SEEN, (MAPPED + 0x123, PAGE, 0x123)],
        ("memory",),
    ),
    "map, at an address": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=0x5000),
        ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=0x5000),
        [(0x5000, PAGE, 0), *SEEN],
        ("memory",),
    ),
    "map, at the first address": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(FIRST, PAGE, flags=RW | FIXED),
        ioas_map(FIRST, PAGE, flags=RW | FIXED),
        [(0, PAGE, 0), *SEEN],
        ("memory",),
    ),
    "map, at the last address": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=TOP - PAGE),
        ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=TOP - PAGE),
        [*SEEN, (TOP - PAGE, PAGE, 0)],
        ("memory",),
    ),
    "map, read-only from a file that is": Good(
        IommufdCommand.IOAS_MAP,
        ioas_map(SECOND, PAGE, flags=READABLE),
        ioas_map(SECOND, PAGE, flags=READABLE, iova=BASE + PAGE),
        fds=("other",),
    ),
    "unmap": Good(IommufdCommand.IOAS_UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE), seen=[SEEN[1]]),
    "unmap, in the space that the device is not in": Good(
        IommufdCommand.IOAS_UNMAP, ioas_unmap(SECOND, BASE, PAGE)
    ),
    "unmap everything": Good(
        IommufdCommand.IOAS_UNMAP, ioas_unmap(FIRST, 0, 0, flags=spec.IOAS_UNMAP_F_ALL), seen=[]
    ),
    "copy": Good(
        IommufdCommand.IOAS_COPY,
        ioas_copy(SECOND, BASE, PAGE, FIRST),
        ioas_copy(SECOND, BASE, PAGE, FIRST, iova=MAPPED),
        [*SEEN, (MAPPED, PAGE, 8 * PAGE)],
    ),
    "copy a part": Good(
        IommufdCommand.IOAS_COPY,
        ioas_copy(FIRST, BASE + PAGE, 0x10, FIRST),
        ioas_copy(FIRST, BASE + PAGE, 0x10, FIRST, iova=MAPPED),
        [*SEEN, (MAPPED, 0x10, PAGE)],
    ),
    "copy, at an address": Good(
        IommufdCommand.IOAS_COPY,
        ioas_copy(SECOND, BASE, PAGE, FIRST, flags=FIXED, iova=0x5000),
        ioas_copy(SECOND, BASE, PAGE, FIRST, flags=FIXED, iova=0x5000),
        [(0x5000, PAGE, 8 * PAGE), *SEEN],
    ),
    "copy, with less access": Good(
        IommufdCommand.IOAS_COPY,
        ioas_copy(SECOND, BASE, PAGE, SECOND, flags=READABLE),
        ioas_copy(SECOND, BASE, PAGE, SECOND, flags=READABLE, iova=BASE + PAGE),
    ),
    "attach": Good(IommufdCommand.ATTACH_PT, attach_pt(SECOND), seen=[(BASE, PAGE, 8 * PAGE)]),
    "attach to where it is": Good(IommufdCommand.ATTACH_PT, attach_pt(FIRST)),
    "detach": Good(IommufdCommand.DETACH_PT, detach_pt(), seen=[]),
}


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD)
def test_what_is_right_is_done(world: World, good: Good) -> None:
    fds = [getattr(world, name) for name in good.fds]

    assert world.peer.ok(good.command, good.payload, fds) == good.reply
    assert world.seen() == good.seen


def test_the_first_commands_of_a_client(peer: Peer, memfd: Callable[..., int]) -> None:
    ioas = new_ioas(peer)
    reply = peer.ok(IommufdCommand.BIND, bind(argsz=20, iommufd=11))
    assert reply == bind(iommufd=11, out=2)  # the next id
    peer.ok(IommufdCommand.ATTACH_PT, attach_pt(ioas))
    payload = ioas_map(ioas, PAGE)
    assert peer.ok(IommufdCommand.IOAS_MAP, payload, [memfd()]) == ioas_map(ioas, PAGE, iova=BASE)


def test_a_posted_command_is_done(world: World) -> None:
    world.peer.post(
        IommufdCommand.IOAS_UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE), flags=base.F_NO_REPLY
    )

    assert world.peer.receive() is None
    assert world.seen() == [SEEN[1]]


# --- bad input


class Bad(NamedTuple):
    """A command and the errno that it gets; nothing changes."""

    command: IommufdCommand
    payload: bytes
    number: int = errno.EINVAL
    fds: tuple[str, ...] = ()


def bad_heads(command: IommufdCommand, payload: bytes, fds: tuple[str, ...] = ()) -> dict[str, Bad]:
    """What is wrong at the head of any command: too short, bad argsz, an unknown flag."""
    size = len(payload)
    argsz, flags = struct.unpack_from("<II", payload)
    name = command.name
    return {
        f"{name} short": Bad(command, payload[:-1], fds=fds),
        f"{name} empty": Bad(command, b"", fds=fds),
        f"{name} argsz": Bad(command, struct.pack("<I", size - 1) + payload[4:], fds=fds),
        f"{name} no argsz": Bad(command, struct.pack("<I", 0) + payload[4:], fds=fds),
        f"{name} flag 2": Bad(
            command, struct.pack("<II", argsz, flags | 1 << 2) + payload[8:], fds=fds
        ),
        f"{name} flag 30": Bad(
            command, struct.pack("<II", argsz, flags | 1 << 30) + payload[8:], fds=fds
        ),
    }


MAP, UNMAP, COPY = IommufdCommand.IOAS_MAP, IommufdCommand.IOAS_UNMAP, IommufdCommand.IOAS_COPY
M = ("memory",)
BAD = {
    **bad_heads(IommufdCommand.ALLOC_IOAS, alloc_ioas()),
    **bad_heads(IommufdCommand.DESTROY_IOAS, destroy_ioas(SECOND)),
    **bad_heads(MAP, ioas_map(FIRST, PAGE), M),
    **bad_heads(UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE)),
    **bad_heads(COPY, ioas_copy(SECOND, BASE, PAGE, FIRST)),
    **bad_heads(IommufdCommand.BIND, bind()),
    **bad_heads(IommufdCommand.ATTACH_PT, attach_pt(SECOND)),
    **bad_heads(IommufdCommand.DETACH_PT, detach_pt()),
    # ALLOC_IOAS
    "alloc, reserved": Bad(IommufdCommand.ALLOC_IOAS, alloc_ioas(reserved=1)),
    "alloc, flag 0": Bad(IommufdCommand.ALLOC_IOAS, alloc_ioas(flags=1)),
    # DESTROY_IOAS
    "destroy, unknown": Bad(IommufdCommand.DESTROY_IOAS, destroy_ioas(UNKNOWN), errno.ENOENT),
    "destroy, none": Bad(IommufdCommand.DESTROY_IOAS, destroy_ioas(0), errno.ENOENT),
    "destroy, a device": Bad(IommufdCommand.DESTROY_IOAS, destroy_ioas(DEVICE), errno.ENOENT),
    "destroy, attached": Bad(IommufdCommand.DESTROY_IOAS, destroy_ioas(FIRST), errno.EBUSY),
    "destroy, reserved": Bad(IommufdCommand.DESTROY_IOAS, destroy_ioas(SECOND, reserved=1)),
    # IOAS_MAP
    "map, no file": Bad(MAP, ioas_map(FIRST, PAGE)),
    "map, two files": Bad(MAP, ioas_map(FIRST, PAGE), fds=("memory", "memory")),
    "map, a pipe": Bad(MAP, ioas_map(FIRST, PAGE, flags=READABLE), errno.ENODEV, ("pipe",)),
    "map, write a file for reading": Bad(MAP, ioas_map(FIRST, PAGE), errno.EACCES, ("other",)),
    "map, past the end of the file": Bad(MAP, ioas_map(FIRST, PAGE + 1, offset=15 * PAGE), fds=M),
    "map, behind the file": Bad(MAP, ioas_map(FIRST, 1, offset=16 * PAGE), fds=M),
    "map, far behind the file": Bad(MAP, ioas_map(FIRST, 1, offset=TOP - 1), fds=M),
    "map, far too long": Bad(MAP, ioas_map(FIRST, TOP - 1), fds=M),
    "map, empty": Bad(MAP, ioas_map(FIRST, 0), fds=M),
    "map, without access": Bad(MAP, ioas_map(FIRST, PAGE, flags=0), fds=M),
    "map, fixed without access": Bad(MAP, ioas_map(FIRST, PAGE, flags=FIXED), fds=M),
    "map, unknown": Bad(MAP, ioas_map(UNKNOWN, PAGE), errno.ENOENT, M),
    "map, none": Bad(MAP, ioas_map(0, PAGE), errno.ENOENT, M),
    "map, reserved": Bad(MAP, ioas_map(FIRST, PAGE, reserved=1), fds=M),
    "map, where something is": Bad(
        MAP, ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=BASE), errno.EEXIST, M
    ),
    "map, where something ends": Bad(
        MAP, ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=BASE - 1), errno.EEXIST, M
    ),
    "map, past the end of the space": Bad(
        MAP, ioas_map(FIRST, PAGE, flags=RW | FIXED, iova=TOP - PAGE + 1), fds=M
    ),
    # IOAS_UNMAP
    "unmap, unknown": Bad(UNMAP, ioas_unmap(UNKNOWN, BASE, PAGE), errno.ENOENT),
    "unmap, nothing there": Bad(UNMAP, ioas_unmap(FIRST, 0, PAGE), errno.ENOENT),
    "unmap, a part": Bad(UNMAP, ioas_unmap(FIRST, BASE, PAGE), errno.ENOENT),
    "unmap, too much": Bad(UNMAP, ioas_unmap(FIRST, BASE, 3 * PAGE), errno.ENOENT),
    "unmap, the second half": Bad(UNMAP, ioas_unmap(FIRST, BASE + PAGE, PAGE), errno.ENOENT),
    "unmap, empty": Bad(UNMAP, ioas_unmap(FIRST, BASE, 0), errno.ENOENT),
    "unmap, what is in another": Bad(UNMAP, ioas_unmap(SECOND, BASE, 2 * PAGE), errno.ENOENT),
    "unmap, as the kernel says everything": Bad(UNMAP, ioas_unmap(FIRST, 0, TOP - 1), errno.ENOENT),
    "unmap everything, and a range": Bad(UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE, flags=1)),
    "unmap everything, and a length": Bad(UNMAP, ioas_unmap(FIRST, 0, TOP - 1, flags=1)),
    "unmap everything, unknown": Bad(UNMAP, ioas_unmap(UNKNOWN, 0, 0, flags=1), errno.ENOENT),
    "unmap, reserved": Bad(UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE, reserved=1)),
    # IOAS_COPY
    "copy, from unknown": Bad(COPY, ioas_copy(UNKNOWN, BASE, PAGE, FIRST), errno.ENOENT),
    "copy, to unknown": Bad(COPY, ioas_copy(FIRST, BASE, PAGE, UNKNOWN), errno.ENOENT),
    "copy, nothing there": Bad(COPY, ioas_copy(SECOND, BASE + PAGE, PAGE, FIRST), errno.ENOENT),
    "copy, more than there is": Bad(COPY, ioas_copy(SECOND, BASE, PAGE + 1, FIRST), errno.ENOENT),
    "copy, of two": Bad(COPY, ioas_copy(FIRST, BASE, 3 * PAGE, SECOND), errno.ENOENT),
    "copy, far too long": Bad(COPY, ioas_copy(FIRST, BASE, TOP - 1, SECOND), errno.ENOENT),
    "copy, empty": Bad(COPY, ioas_copy(SECOND, BASE, 0, FIRST)),
    "copy, more access": Bad(
        COPY, ioas_copy(FIRST, BASE + 2 * PAGE, PAGE, SECOND, flags=WRITEABLE), errno.EPERM
    ),
    "copy, where something is": Bad(
        COPY, ioas_copy(SECOND, BASE, PAGE, FIRST, flags=FIXED, iova=BASE), errno.EEXIST
    ),
    "copy, past the end of the space": Bad(
        COPY, ioas_copy(SECOND, BASE, PAGE, FIRST, flags=FIXED, iova=TOP - 1)
    ),
    # BIND
    "bind again": Bad(IommufdCommand.BIND, bind(), errno.EEXIST),
    "bind, flag 0": Bad(IommufdCommand.BIND, bind(flags=1)),
    # ATTACH_PT, DETACH_PT
    "attach, unknown": Bad(IommufdCommand.ATTACH_PT, attach_pt(UNKNOWN), errno.ENOENT),
    "attach, a device": Bad(IommufdCommand.ATTACH_PT, attach_pt(DEVICE), errno.ENOENT),
    "attach, a PASID": Bad(
        IommufdCommand.ATTACH_PT, attach_pt(SECOND, flags=1, pasid=5), errno.ENOTSUP
    ),
    "attach, a PASID without its flag": Bad(IommufdCommand.ATTACH_PT, attach_pt(SECOND, pasid=5)),
    "detach, a PASID": Bad(IommufdCommand.DETACH_PT, detach_pt(flags=1, pasid=5), errno.ENOTSUP),
    "detach, a PASID without its flag": Bad(IommufdCommand.DETACH_PT, detach_pt(pasid=5)),
    "detach, reserved": Bad(IommufdCommand.DETACH_PT, detach_pt(reserved=1)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_wrong_is_refused(world: World, bad: Bad, files: MappedFiles) -> None:
    fds = [getattr(world, name) for name in bad.fds]
    before, generation = open_fds(), world.bank.memory.generation

    assert world.peer.refused(bad.command, bad.payload, fds) == bad.number

    assert world.seen() == SEEN
    assert world.bank.memory.generation == generation
    assert (open_fds(), len(files)) == (before, 1)
    # Everything is where it was.
    world.peer.ok(UNMAP, ioas_unmap(SECOND, BASE, PAGE))
    world.peer.ok(UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE))
    world.peer.ok(UNMAP, ioas_unmap(FIRST, BASE + 2 * PAGE, PAGE))


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (IommufdCommand.ATTACH_PT, attach_pt(1)),
        (IommufdCommand.ATTACH_PT, attach_pt(UNKNOWN)),
        (IommufdCommand.DETACH_PT, detach_pt()),
    ],
)
def test_a_device_is_bound_first(peer: Peer, command: int, payload: bytes) -> None:
    assert new_ioas(peer) == 1

    assert peer.refused(command, payload) == errno.EINVAL


def test_a_device_that_is_in_no_space_can_t_leave_it(peer: Peer) -> None:
    peer.ok(IommufdCommand.BIND, bind())

    assert peer.refused(IommufdCommand.DETACH_PT, detach_pt()) == errno.EINVAL


# Commands that have no other reason for EINVAL than those of any command.
SAYS_NO_MORE = {IommufdCommand.ALLOC_IOAS, IommufdCommand.DESTROY_IOAS, IommufdCommand.BIND}


def test_every_errno_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/iommufd.md").read_text()
    section = page.partition("\n## Errors\n")[2].partition("\n## ")[0]
    documented: dict[str, set[str]] = {}
    name = ""
    for command, number in re.findall(r"^\| (?:`(\w+)`)? ?\| (E\w+) \|", section, re.MULTILINE):
        name = command or name
        documented.setdefault(name, set()).add(number)

    # That EINVAL of any command is in a row of its own; ENOSPC is tested below.
    seen = {
        command.name: {
            errno.errorcode[bad.number]
            for key, bad in BAD.items()
            if bad.command == command and not key.startswith(command.name)
        }
        - ({"EINVAL"} if command in SAYS_NO_MORE else set())
        for command in IommufdCommand
    }
    for command in ("ALLOC_IOAS", "IOAS_MAP", "IOAS_COPY"):
        seen[command].add("ENOSPC")
    # ENOTSUP and EOPNOTSUPP are one number, and so is its name here.
    assert documented == {
        command: {"ENOTSUP" if n == "EOPNOTSUPP" else n for n in numbers}
        for command, numbers in seen.items()
    }


# --- limits


def test_there_are_only_so_many_spaces_and_mappings(world: World) -> None:
    assert new_ioas(world.peer) == 4
    assert world.peer.refused(IommufdCommand.ALLOC_IOAS, alloc_ioas()) == errno.ENOSPC
    for _ in range(3):
        world.peer.ok(MAP, ioas_map(4, PAGE), [world.memory])
    before = open_fds()
    assert world.peer.refused(MAP, ioas_map(4, PAGE), [world.memory]) == errno.ENOSPC
    assert world.peer.refused(COPY, ioas_copy(FIRST, BASE, PAGE, 4)) == errno.ENOSPC
    assert open_fds() == before
    world.peer.ok(IommufdCommand.DESTROY_IOAS, destroy_ioas(4))
    assert new_ioas(world.peer) == 5  # no id comes back
    world.peer.ok(MAP, ioas_map(5, PAGE), [world.memory])


def test_there_are_only_so_many_addresses(
    loop: Loop,
    bank: RegisterBank,
    files: MappedFiles,
    tmp_path: Path,
    memfd: Callable[..., int],
) -> None:
    limits = ServerLimits(iommufd=IoasLimits(apertures=((0x10000, 0x10000 + 2 * PAGE),)))
    with closing(Server(loop, bank, tmp_path / "small.sock", files, limits)) as server:
        peer = Peer(server, loop)
        peer.ok(Command.VERSION, hello())
        ioas = new_ioas(peer)
        memory = memfd()
        reply = peer.ok(MAP, ioas_map(ioas, PAGE), [memory])
        assert reply == ioas_map(ioas, PAGE, iova=0x10000)
        assert peer.refused(MAP, ioas_map(ioas, 2 * PAGE), [memory]) == errno.ENOSPC
        peer.ok(MAP, ioas_map(ioas, PAGE), [memory])
        assert peer.refused(MAP, ioas_map(ioas, 1), [memory]) == errno.ENOSPC
        # An address of the client's own need not be among the server's.
        peer.ok(MAP, ioas_map(ioas, 1, flags=RW | FIXED, iova=0), [memory])
        peer.close()


# --- negotiation

COMMANDS = {
    IommufdCommand.ALLOC_IOAS: alloc_ioas(),
    IommufdCommand.DESTROY_IOAS: destroy_ioas(1),
    IommufdCommand.IOAS_MAP: ioas_map(1, PAGE),
    IommufdCommand.IOAS_UNMAP: ioas_unmap(1, BASE, PAGE),
    IommufdCommand.IOAS_COPY: ioas_copy(1, BASE, PAGE, 1),
    IommufdCommand.BIND: bind(),
    IommufdCommand.ATTACH_PT: attach_pt(1),
    IommufdCommand.DETACH_PT: detach_pt(),
}


@pytest.mark.parametrize("client_has_it", [False, True])
@pytest.mark.parametrize("server_has_it", [False, True])
def test_both_sides_must_have_the_commands(
    loop: Loop,
    bank: RegisterBank,
    files: MappedFiles,
    tmp_path: Path,
    memfd: Callable[..., int],
    *,
    client_has_it: bool,
    server_has_it: bool,
) -> None:
    limits = LIMITS if server_has_it else ServerLimits()
    with closing(Server(loop, bank, tmp_path / "any.sock", files, limits)) as server:
        peer = Peer(server, loop)
        peer.ok(Command.VERSION, hello() if client_has_it else HELLO)
        if client_has_it and server_has_it:
            assert new_ioas(peer) == 1
        else:
            for command, payload in COMMANDS.items():
                fds = [memfd()] if command == MAP else []
                assert peer.refused(command, payload, fds) == errno.EINVAL
        # DMA_MAP is there in any case.
        peer.ok(Command.DMA_MAP, base.DMA_MAP.pack(32, 3, 0, 0, PAGE), [memfd()])
        assert [region.gpa for region in bank.memory.regions()] == [0]
        peer.close()


def test_an_address_is_the_client_s_choice_only_if_that_was_negotiated(
    connect: Callable[[], Peer], memfd: Callable[..., int]
) -> None:
    peer = connect()
    peer.ok(Command.VERSION, hello(fixed_iova=False))
    ioas, memory = new_ioas(peer), memfd()

    fixed = ioas_map(ioas, PAGE, flags=RW | FIXED, iova=0x5000)
    assert peer.refused(MAP, fixed, [memory]) == errno.EINVAL
    peer.ok(MAP, ioas_map(ioas, PAGE), [memory])
    copy = ioas_copy(ioas, BASE, PAGE, ioas, flags=FIXED, iova=0x5000)
    assert peer.refused(COPY, copy) == errno.EINVAL


def test_a_version_that_makes_no_sense_ends_the_connection(connect: Callable[[], Peer]) -> None:
    peer = connect()
    text = b'{"capabilities":{"iommufd":{"supported":1}}}\0'

    assert peer.refused(Command.VERSION, HELLO + text) == errno.EINVAL
    assert peer.closed()


# --- the device


def dma_write(bank: RegisterBank, address: int, value: int) -> None:
    """Have the device store four bytes."""
    bank.region_write(register_bank.BAR, register_bank.DMA_ADDRESS, struct.pack("<Q", address))
    bank.region_write(register_bank.BAR, register_bank.DMA_START, struct.pack("<I", value))


def test_the_device_writes_in_its_space_and_in_no_other(world: World) -> None:
    only_second = ioas_map(SECOND, PAGE, flags=RW | FIXED, iova=0x5000, offset=9 * PAGE)
    world.peer.ok(MAP, only_second, [world.memory])

    dma_write(world.bank, BASE + 0x10, 0xCAFE)
    with pytest.raises(GuestMemoryError):
        dma_write(world.bank, 0x5000, 1)  # mapped, but elsewhere
    with pytest.raises(GuestMemoryError):
        dma_write(world.bank, BASE + 2 * PAGE, 1)  # mapped, but read-only
    assert os.pread(world.memory, 4, 0x10) == b"\xfe\xca\0\0"

    world.peer.ok(IommufdCommand.ATTACH_PT, attach_pt(SECOND))
    dma_write(world.bank, 0x5000, 0xBEEF)
    dma_write(world.bank, BASE + 0x10, 0xBABE)  # the same address is another page
    with pytest.raises(GuestMemoryError):
        dma_write(world.bank, BASE + PAGE, 1)
    assert os.pread(world.memory, 4, 9 * PAGE) == b"\xef\xbe\0\0"
    assert os.pread(world.memory, 4, 8 * PAGE + 0x10) == b"\xbe\xba\0\0"
    assert os.pread(world.memory, 4, 0x10) == b"\xfe\xca\0\0"


def test_dma_map_is_kept_for_when_the_device_is_in_no_space(world: World) -> None:
    peer = world.peer
    legacy = base.DMA_MAP.pack(32, 3, 12 * PAGE, BASE, PAGE)  # where the first space has something
    peer.ok(Command.DMA_MAP, legacy, [world.memory])
    assert world.seen() == SEEN

    peer.ok(IommufdCommand.DETACH_PT, detach_pt())
    assert world.seen() == [(BASE, PAGE, 12 * PAGE)]
    peer.ok(IommufdCommand.ATTACH_PT, attach_pt(SECOND))
    assert world.seen() == [(BASE, PAGE, 8 * PAGE)]
    peer.ok(Command.DMA_UNMAP, base.DMA_UNMAP.pack(24, 0, BASE, PAGE))
    assert world.seen() == [(BASE, PAGE, 8 * PAGE)]
    peer.ok(IommufdCommand.DETACH_PT, detach_pt())
    assert world.seen() == []


def test_a_reset_changes_nothing_of_it(world: World) -> None:
    world.peer.ok(Command.DEVICE_RESET)

    assert world.seen() == SEEN


@pytest.mark.parametrize(
    ("command", "payload", "after"),
    [
        (UNMAP, ioas_unmap(FIRST, BASE, 2 * PAGE), [SEEN[1]]),
        (UNMAP, ioas_unmap(FIRST, 0, 0, flags=spec.IOAS_UNMAP_F_ALL), []),
        (IommufdCommand.ATTACH_PT, attach_pt(SECOND), [(BASE, PAGE, 8 * PAGE)]),
        (IommufdCommand.DETACH_PT, detach_pt(), []),
    ],
    ids=["unmap", "unmap all", "attach", "detach"],
)
def test_the_answer_waits_for_the_device_to_let_go(
    world: World, command: int, payload: bytes, after: list[tuple[int, int, int]]
) -> None:
    world.bank.held_memory.held = True
    world.peer.post(command, payload)
    world.peer.post(IommufdCommand.ALLOC_IOAS, alloc_ioas())
    assert world.peer.receive() is None  # neither, in their order

    world.bank.held_memory.held = False
    world.bank.held_memory.releases.pop().resolve(None)
    world.peer.turn()

    first, second = world.peer.receive(), world.peer.receive()
    assert first is not None
    assert second is not None
    assert (first.command, first.flags, first.payload) == (command, base.F_TYPE_REPLY, b"")
    assert (second.command, second.payload) == (IommufdCommand.ALLOC_IOAS, alloc_ioas(out=4))
    assert world.seen() == after


# --- the end


def test_everything_goes_with_the_client(
    world: World, connect: Callable[[], Peer], files: MappedFiles
) -> None:
    assert len(files) == 1
    mapped = open_fds()

    world.peer.close()

    assert len(files) == 0
    assert open_fds() == mapped - FILE - 2  # both ends of the connection
    assert world.seen() == []
    # The next client begins at the beginning.
    second = connect()
    second.ok(Command.VERSION, hello())
    assert second.refused(IommufdCommand.ATTACH_PT, attach_pt(FIRST)) == errno.EINVAL
    assert new_ioas(second) == 1
    second.ok(IommufdCommand.BIND, bind())


def test_a_client_that_leaves_while_it_waits_leaves_nothing(
    world: World, files: MappedFiles
) -> None:
    world.bank.held_memory.held = True
    world.peer.post(IommufdCommand.DETACH_PT, detach_pt())

    world.peer.close()
    for release in world.bank.held_memory.releases:
        release.resolve(None)
    world.peer.turn()

    assert len(files) == 0
    assert world.seen() == []
