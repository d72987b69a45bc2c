from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from viommu.errors import BackendError, status_of
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import (
    AddressRange,
    DmaNeeds,
    DmaRegistration,
    FileMissingError,
    HostAddressMissingError,
    require_file,
    require_host_va,
)
from viommu.spec import virtio_iommu as spec

if TYPE_CHECKING:
    from collections.abc import Callable

WHERE = AddressRange(0x1000, 0x3000)


@pytest.mark.parametrize(
    ("start", "end", "holds", "meets"),
    [
        (0x1000, 0x3000, True, True),
        (0x1000, 0x2000, True, True),
        (0x2FFF, 0x3000, True, True),
        (0x0FFF, 0x2000, False, True),
        (0x2000, 0x3001, False, True),
        (0x0000, 0x9000, False, True),
        (0x0000, 0x1000, False, False),
        (0x3000, 0x4000, False, False),
    ],
)
def test_ranges_are_half_open(start: int, end: int, holds: bool, meets: bool) -> None:
    other = AddressRange(start, end)

    assert WHERE.holds(other) is holds
    assert WHERE.meets(other) is other.meets(WHERE) is meets
    assert str(WHERE) == "[0x1000, 0x3000)"
    assert WHERE.size == 0x2000


def test_the_last_byte_of_the_address_space_is_in_a_range() -> None:
    top = AddressRange((1 << 64) - 0x1000, 1 << 64)

    assert top.size == 0x1000
    assert top.holds(AddressRange((1 << 64) - 1, 1 << 64))


def test_a_missing_address_is_a_typed_error() -> None:
    assert require_host_va(WHERE, 0) == 0  # an address like any other

    with pytest.raises(HostAddressMissingError, match=r"\[0x1000, 0x3000\)") as caught:
        require_host_va(WHERE, None)
    assert isinstance(caught.value, BackendError)
    assert caught.value.errno == errno.EFAULT
    assert status_of(caught.value) == spec.Status.FAULT


def test_a_missing_file_is_a_typed_error(memfd: Callable[..., int]) -> None:
    with FileBacking(memfd()) as file:
        assert require_file(WHERE, file) is file

    with pytest.raises(FileMissingError, match="a file is needed") as caught:
        require_file(WHERE, None)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_needs_add_up() -> None:
    both = DmaNeeds.HOST_VA | DmaNeeds.FILE

    assert DmaNeeds.FILE in both
    assert DmaNeeds.HOST_VA not in DmaNeeds.NONE


def test_a_registration_is_released_at_the_end_of_a_block() -> None:
    released: list[str] = []
    registration = DmaRegistration("type1", lambda: released.append("type1"))

    with registration as held:
        assert held is registration
        assert released == []
    registration.release()

    assert released == ["type1", "type1"]
