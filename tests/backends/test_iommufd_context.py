"""What an iommufd is asked, byte for byte, and a file that is none; no iommufd is needed.

What the real one answers is tested in ``guest_tests/l1``.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from viommu.errors import Access, BackendError
from viommu.spec.iommufd import Ioctl
from viommu_backends import iommufd_context
from viommu_backends.iommufd_context import Iommufd, address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RW = Access.READ | Access.WRITE


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[Iommufd]:
    """A context on a device file that knows no ioctl."""
    monkeypatch.setattr(iommufd_context, "_IOMMU", Path("/dev/null"))
    context = Iommufd()
    yield context
    context.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """What is asked from here on; every id that is asked for is 9."""
    asked: list[tuple[int, bytes]] = []

    def ask(_: int, request: int, argument: bytearray, what: str) -> int:
        asked.append((request, bytes(argument)))
        if request == Ioctl.HWPT_ALLOC:
            struct.pack_into("<I", argument, 16, 9)
        return 0

    monkeypatch.setattr(iommufd_context, "ask", ask)
    return asked


CALLS: dict[str, Callable[[Iommufd], object]] = {
    "alloc_ioas": lambda context: context.alloc_ioas(),
    "destroy": lambda context: context.destroy(1),
    "map": lambda context: context.map(1, 0x1000, 0, 0x1000, RW),
    "map_file": lambda context: context.map_file(1, 0x1000, 0, 0, 0x1000, RW),
    "unmap": lambda context: context.unmap(1, 0x1000, 0x1000),
    "copy": lambda context: context.copy(1, 2, 0x1000, 0, 0, RW),
    "iova_ranges": lambda context: context.iova_ranges(1),
    "alloc_page_table": lambda context: context.alloc_page_table(1, 2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_file_that_is_no_iommufd_knows_nothing(
    context: Iommufd, call: Callable[[Iommufd], object]
) -> None:
    with pytest.raises(BackendError) as caught:
        call(context)
    assert caught.value.errno == errno.ENOTTY

    context.close()
    context.close()
    with pytest.raises(BackendError) as caught:
        call(context)
    assert caught.value.errno == errno.EBADF


def test_a_file_that_is_no_iommufd_maps_no_files(context: Iommufd) -> None:
    assert not context.can_map_files()


def test_too_much_pinned_memory_is_said_with_its_numbers(
    context: Iommufd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: int, request: int, argument: bytearray, what: str) -> int:
        raise BackendError(errno.ENOMEM, what)

    monkeypatch.setattr(iommufd_context, "ask", ask)

    for name in ("map", "map_file", "copy"):
        with pytest.raises(BackendError, match="4096 more bytes would be locked") as caught:
            CALLS[name](context)
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    ("offset", "length", "number"),
    [
        (0x1000, 0x2000, errno.ENODEV),
        (0x1001, 0x2000, errno.EINVAL),
        (0x1000, 0, errno.EINVAL),
        (-0x1000, 0x2000, errno.EINVAL),
        (0x1000, -1, errno.EINVAL),
        (1 << 64, 0x2000, errno.EINVAL),
    ],
)
def test_a_file_that_is_no_iommufd_has_no_device_memory(
    context: Iommufd, offset: int, length: int, number: int
) -> None:
    with pytest.raises(BackendError, match=f"offset {offset:#x}") as caught:
        context.map_device_memory(offset, length)
    assert caught.value.errno == number


def test_a_context_that_is_closed_maps_no_other_memory(context: Iommufd) -> None:
    context.close()

    with pytest.raises(BackendError) as caught:
        context.map_device_memory(0x1000, 0x1000)
    assert caught.value.errno == errno.EBADF


def test_a_page_table_that_others_are_nested_in(
    context: Iommufd, asked: list[tuple[int, bytes]]
) -> None:
    assert context.alloc_page_table(3, 4, nest_parent=True) == 9

    expected = struct.pack("<12I", 48, 1, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0)
    assert asked == [(Ioctl.HWPT_ALLOC, expected)]


def test_a_page_table_of_a_guest_is_described_by_its_driver(
    context: Iommufd, asked: list[tuple[int, bytes]]
) -> None:
    context.alloc_page_table(3, 4, kind=0xDEAD, data=b"where")

    ((_, argument),) = asked
    assert struct.unpack_from("<8I", argument) == (48, 0, 3, 4, 0, 0, 0xDEAD, 5)
    (address,) = struct.unpack_from("<Q", argument, 32)
    assert address


def test_the_address_of_a_structure_is_where_its_bytes_are() -> None:
    buffer = bytearray(b"structure")

    assert ctypes.string_at(address_of(buffer), 9) == b"structure"
    assert address_of(bytearray()) == 0
