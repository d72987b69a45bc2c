from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viommu.errors import BackendError, InternalError, PeerError, UsageError
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import AddressRange
from viommu.memory.va_mapper import OutsideReservationError, VaMapper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
SIZE = 64 * PAGE
GIB = 1 << 30


@pytest.fixture
def mapper() -> Iterator[VaMapper]:
    mapper = VaMapper(SIZE)
    yield mapper
    mapper._check()
    mapper.close()


@pytest.fixture
def file(memfd: Callable[..., int]) -> Iterator[FileBacking]:
    """Sixteen pages that begin with their own number."""
    fd = memfd(16 * PAGE)
    for page in range(16):
        os.pwrite(fd, bytes([page]) * 8, page * PAGE)
    with FileBacking(fd) as backing:
        yield backing


def pages(first: int, count: int) -> AddressRange:
    return AddressRange(first * PAGE, (first + count) * PAGE)


def store(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def reserved_in_one_piece(mapper: VaMapper) -> bool:
    line = f"{mapper.base:x}-{mapper.base + mapper.size:x} ---p "
    return line in Path("/proc/self/maps").read_text()


def test_memory_of_many_files_is_contiguous_and_shared(
    mapper: VaMapper, memfd: Callable[..., int]
) -> None:
    """What the guest sees side by side is side by side, and is the files' own memory."""
    fds = [memfd(2 * PAGE) for _ in range(3)]
    for index, fd in enumerate(fds):
        with FileBacking(fd) as backing:
            where = pages(4 + 2 * index, 2)
            assert mapper.map(where, backing, 0, writable=True) == mapper.base + where.start

    start = mapper.address(pages(4, 6))
    data = os.urandom(6 * PAGE)
    store(start, data)

    assert b"".join(os.pread(fd, 2 * PAGE, 0) for fd in fds) == data
    os.pwrite(fds[1], b"theirs", PAGE)
    assert ctypes.string_at(start + 3 * PAGE, 6) == b"theirs"


def test_ram_around_a_hole_and_a_distant_bar_have_their_places(
    memfd: Callable[..., int],
) -> None:
    mapper = VaMapper(1 << 40)
    low, high, bar = 0, 4 * GIB, 0xFE_0000_0000
    with FileBacking(memfd(16 * PAGE)) as ram, FileBacking(memfd(PAGE)) as device:
        mapper.map(AddressRange(low, low + 8 * PAGE), ram, 0, writable=True)
        mapper.map(AddressRange(high, high + 8 * PAGE), ram, 8 * PAGE, writable=True)
        address = mapper.map(AddressRange(bar, bar + PAGE), device, 0, writable=True)
        store(address, b"registers")
        assert os.pread(device.fileno(), 9, 0) == b"registers"
    assert address - mapper.base == bar
    assert mapper.base % GIB == 0  # so that large pages of the guest can be large here
    mapper.close()
    assert f"{mapper.base:x}-" not in Path("/proc/self/maps").read_text()


def test_private_memory_keeps_its_contents_while_it_is_not_mapped(mapper: VaMapper) -> None:
    with PrivateBacking(4 * PAGE) as backing:
        store(mapper.map(pages(0, 2), backing, 2 * PAGE, writable=True), b"kept")
        mapper.unmap(pages(0, 2))
        address = mapper.map(pages(9, 4), backing, 0, writable=False)
        assert ctypes.string_at(address + 2 * PAGE, 4) == b"kept"
        assert bytes(backing.view[2 * PAGE : 2 * PAGE + 4]) == b"kept"


def test_what_is_read_only_cant_be_written_through(mapper: VaMapper, file: FileBacking) -> None:
    address = mapper.map(pages(0, 1), file, 3 * PAGE, writable=False)

    assert f"{address:x}-{address + PAGE:x} r--s" in Path("/proc/self/maps").read_text()
    # The kernel writes for us what it would let us write, with an error instead of a signal.
    reader, writer = os.pipe()
    os.write(writer, b"x")
    read = ctypes.CDLL(None, use_errno=True).read
    assert read(reader, ctypes.c_void_p(address), 1) == -1
    assert ctypes.get_errno() == errno.EFAULT
    os.close(reader)
    os.close(writer)
    assert ctypes.string_at(address, 1) == b"\3"


def test_removal_leaves_addresses_that_nobody_else_can_get(
    mapper: VaMapper, file: FileBacking
) -> None:
    for first in (0, 2, 4):
        mapper.map(pages(first, 2), file, 0, writable=True)
    for first in (2, 0, 4):
        mapper.unmap(pages(first, 2))

    assert reserved_in_one_piece(mapper)
    assert list(mapper) == []


@pytest.mark.parametrize(
    ("where", "number"),
    [
        (pages(64, 1), errno.ERANGE),
        (pages(63, 2), errno.ERANGE),
        (AddressRange(1 << 64, (1 << 64) + PAGE), errno.ERANGE),
        (AddressRange(1 << 70, (1 << 70) + PAGE), errno.ERANGE),
        (AddressRange(-PAGE, PAGE), errno.EINVAL),
        (pages(3, 0), errno.EINVAL),
        (pages(3, -1), errno.EINVAL),
        (AddressRange(1, PAGE), errno.EINVAL),
        (AddressRange(0, PAGE + 1), errno.EINVAL),
    ],
)
def test_what_lies_outside_is_an_error_and_no_address(
    mapper: VaMapper, file: FileBacking, where: AddressRange, number: int
) -> None:
    with pytest.raises(BackendError) as mapping:
        mapper.map(where, file, 0, writable=True)
    with pytest.raises(BackendError) as asking:
        mapper.address(where)
    assert mapping.value.errno == asking.value.errno == number
    assert list(mapper) == []


def test_the_error_says_what_to_do(mapper: VaMapper) -> None:
    with pytest.raises(
        OutsideReservationError, match=r"\[0x40000, 0x41000\).*0x40000.*reserve more"
    ):
        mapper.address(pages(64, 1))


@pytest.mark.parametrize(
    "where", [pages(4, 4), pages(3, 2), pages(7, 2), pages(5, 1), pages(0, 64)]
)
def test_nothing_is_mapped_over_what_is_mapped(
    mapper: VaMapper, file: FileBacking, where: AddressRange
) -> None:
    mapper.map(pages(4, 4), file, 0, writable=True)
    with pytest.raises(BackendError, match=r"\[0x4000, 0x8000\) is mapped") as caught:
        mapper.map(where, file, 0, writable=True)
    assert caught.value.errno == errno.EEXIST
    assert ctypes.string_at(mapper.base + 5 * PAGE, 1) == b"\1"


def test_a_backing_that_is_too_short_is_refused(mapper: VaMapper, file: FileBacking) -> None:
    with pytest.raises(PeerError, match="is not in it"):
        mapper.map(pages(0, 2), file, 15 * PAGE, writable=True)
    with pytest.raises(BackendError, match="offset 0x1 is not on a page"):
        mapper.map(pages(0, 1), file, 1, writable=True)
    assert list(mapper) == []
    assert reserved_in_one_piece(mapper)


def test_what_the_host_refuses_changes_nothing(mapper: VaMapper) -> None:
    with (
        Path("/dev/null").open("r+b", buffering=0) as null,
        FileBacking(null.fileno()) as device,
        pytest.raises(BackendError) as caught,
    ):
        mapper.map(pages(0, 1), device, 0, writable=True)
    assert caught.value.errno == errno.ENODEV
    assert reserved_in_one_piece(mapper)


@pytest.mark.parametrize("where", [pages(3, 2), pages(0, 2), pages(4, 5), pages(4, 3), pages(5, 1)])
def test_only_what_is_mapped_has_an_address(
    mapper: VaMapper, file: FileBacking, where: AddressRange
) -> None:
    mapper.map(pages(4, 2), file, 0, writable=True)
    mapper.map(pages(6, 2), file, 4 * PAGE, writable=True)
    mapped = pages(4, 4).holds(where)
    if mapped:
        assert mapper.address(where) == mapper.base + where.start
    else:
        with pytest.raises(BackendError, match="nothing is mapped") as caught:
            mapper.address(where)
        assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("where", [pages(4, 1), pages(5, 1), pages(3, 2), pages(0, 1), pages(4, 3)])
def test_only_what_was_mapped_can_be_unmapped(
    mapper: VaMapper, file: FileBacking, where: AddressRange
) -> None:
    mapper.map(pages(4, 2), file, 0, writable=True)
    with pytest.raises(UsageError):
        mapper.unmap(where)
    assert list(mapper) == [pages(4, 2)]


def test_it_lives_as_long_as_it_is_used(file: FileBacking) -> None:
    mapper = VaMapper(SIZE)
    assert mapper.retain() is mapper
    address = mapper.map(pages(0, 1), file, PAGE, writable=True)
    mapper.close()
    assert ctypes.string_at(address, 1) == b"\1"

    mapper.close()

    assert mapper.uses == 0
    for call in (
        mapper.close,
        mapper.retain,
        lambda: mapper.address(pages(0, 1)),
        lambda: mapper.unmap(pages(0, 1)),
        lambda: mapper.map(pages(0, 1), file, 0, writable=True),
    ):
        with pytest.raises(UsageError, match="given back"):
            call()
    mapper._check()


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1, 1 << 63, 1 << 64, (1 << 64) + PAGE])
def test_a_size_that_cant_be_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="can't reserve"):
        VaMapper(size)


def test_more_than_a_process_has_is_the_hosts_error() -> None:
    with pytest.raises(BackendError) as caught:
        VaMapper(1 << 60)
    assert caught.value.errno == errno.ENOMEM


FORK = """
import ctypes, os, resource, signal
from pathlib import Path
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import AddressRange
from viommu.memory.va_mapper import VaMapper

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
fd = os.memfd_create("fork")
os.ftruncate(fd, 4096)
mapper = VaMapper(1 << 20)
file, private = FileBacking(fd), PrivateBacking(4096)
addresses = [
    mapper.map(AddressRange(0, 4096), file, 0, writable=True),
    mapper.map(AddressRange(4096, 8192), private, 0, writable=True),
    private.address,
]
for address in addresses:
    ctypes.string_at(address, 1)
    child = os.fork()
    if not child:
        ctypes.string_at(address, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, (hex(address), status)
child = os.fork()
if not child:
    os._exit("fork" in Path("/proc/self/maps").read_text())
assert os.waitpid(child, 0)[1] == 0, "the child keeps the file mapped"
"""


def test_a_forked_child_has_none_of_it() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", FORK], check=True)


def test_check_finds_damage(mapper: VaMapper, file: FileBacking) -> None:
    mapper.map(pages(0, 2), file, 0, writable=True)
    mapper.map(pages(2, 2), file, 0, writable=True)
    for damage in ((0, pages(0, 3)), (PAGE, pages(0, 2)), (2 * PAGE, pages(2, 0))):
        intact = dict(mapper._mapped)
        mapper._mapped[damage[0]] = damage[1]
        with pytest.raises(InternalError):
            mapper._check()
        mapper._mapped.clear()
        mapper._mapped.update(intact)
    mapper._uses = 0
    with pytest.raises(InternalError, match="given back"):
        mapper._check()
    mapper._uses = 1


PAGES = 12
steps = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, PAGES - 1),
        st.integers(1, 3),
        st.integers(0, 12),
        st.booleans(),
    ),
    max_size=30,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(steps=steps)
def test_every_page_is_what_a_naive_model_says(
    file: FileBacking, steps: list[tuple[bool, int, int, int, bool]]
) -> None:
    mapper = VaMapper(PAGES * PAGE)
    model: dict[int, int] = {}  # page of the guest: page of the file
    pieces: set[tuple[int, int]] = set()
    for add, first, count, offset, writable in steps:
        span = range(first, first + count)
        if add:
            if span.stop > PAGES or any(page in model for page in span):
                with pytest.raises(BackendError):
                    mapper.map(pages(first, count), file, offset * PAGE, writable=writable)
                continue
            mapper.map(pages(first, count), file, offset * PAGE, writable=writable)
            pieces.add((first, count))
            model.update({page: offset + page - first for page in span})
        elif (first, count) in pieces:
            mapper.unmap(pages(first, count))
            pieces.remove((first, count))
            for page in span:
                del model[page]
        else:
            with pytest.raises(UsageError):
                mapper.unmap(pages(first, count))
        mapper._check()
        for page in range(PAGES):
            if page in model:
                address = mapper.address(pages(page, 1))
                assert ctypes.string_at(address, 1) == bytes([model[page]])
            else:
                with pytest.raises(BackendError):
                    mapper.address(pages(page, 1))
    for piece in list(mapper):
        mapper.unmap(piece)
    assert reserved_in_one_piece(mapper)
    mapper.close()
