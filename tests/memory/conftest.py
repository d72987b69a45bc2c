from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.memory.house import House
from viommu.memory import MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096


@pytest.fixture
def memfd() -> Iterator[Callable[..., int]]:
    """A function that makes memfds, which are closed at the end."""
    made: list[int] = []

    def make(size: int = 16 * PAGE, flags: int = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) -> int:
        fd = os.memfd_create("test", flags)
        made.append(fd)
        os.ftruncate(fd, size)
        return fd

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def house(memfd: Callable[..., int]) -> Iterator[House]:
    """A region manager whose targets are healed and emptied at the end."""
    house = House(memfd())
    yield house
    house.close()


@pytest.fixture
def files() -> MappedFiles:
    return MappedFiles()
