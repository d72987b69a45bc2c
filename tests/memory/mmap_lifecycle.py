"""The life of mapped device memory, step by step, with what each step must answer.

The table is of what a client can observe. Any service can be held to it: ours is
here, the kernel's iommufd in ``guest_tests/l1/test_mmap_lifecycle.py``. Every owner
but the parent offers one area of two pages.
"""

from __future__ import annotations

import errno
from typing import NamedTuple, Protocol

from tests.memory.recording import PAGE, pages
from viommu.errors import PeerError
from viommu.memory.mmap_table import MmapMapping, MmapOwner, MmapTable

OK = 0
BASE = 0xFE00_0000


class Service(Protocol):
    """What a client does; every call returns 0 or an errno."""

    def create(self, owner: str, parent: str | None = None) -> int:
        """Create an owner with an area; the area's offset must be as :data:`OFFSETS` says."""

    def destroy(self, owner: str) -> int:
        """Destroy an owner."""

    def map(self, mapping: str, offset: int, count: int, how: str = "shared") -> int:
        """Map ``count`` pages at an offset in pages: "shared", "private" or "exec"."""

    def unmap(self, mapping: str, first: int = 0, count: int = 2) -> int:
        """Unmap a part of a mapping, counted in pages from where it began."""

    def fork(self) -> int:
        """Have a child that inherits every mapping, and does nothing."""

    def exit_child(self) -> int:
        """Have that child end."""

    def close(self) -> int:
        """Close the descriptor."""

    def find_nothing(self) -> int:
        """Answer EBUSY while something of an owner is left."""


class Step(NamedTuple):
    """One call, its arguments and the answer."""

    call: str
    arguments: tuple[str | int, ...]
    answer: int


#: Owner: offset of its area in pages. The second and third reuse what is free again.
OFFSETS = {"first": 1, "second": 3, "third": 1, "fourth": 3}

LIFECYCLE = [
    Step("create", ("parent",), OK),
    Step("create", ("first", "parent"), OK),
    # Exactly the area, shared, not to be executed; nothing else.
    Step("map", ("m", 0, 2), errno.ENXIO),
    Step("map", ("m", 2, 2), errno.ENXIO),
    Step("map", ("m", 2, 1), errno.ENXIO),
    Step("map", ("m", 3, 2), errno.ENXIO),
    Step("map", ("m", 1 << 40, 2), errno.ENXIO),
    Step("map", ("m", 1, 1), errno.ENXIO),
    Step("map", ("m", 1, 4), errno.ENXIO),
    Step("map", ("m", 1, 2, "private"), errno.EINVAL),
    Step("map", ("m", 1, 2, "exec"), errno.EPERM),
    # None of these failures has left a reference behind.
    Step("destroy", ("first",), OK),
    Step("map", ("m", 1, 2), errno.ENXIO),
    Step("destroy", ("first",), errno.ENOENT),
    # An owner waits for every mapping of it,
    Step("create", ("first", "parent"), OK),
    Step("map", ("one", 1, 2), OK),
    Step("destroy", ("first",), errno.EBUSY),
    Step("map", ("two", 1, 2), OK),
    Step("unmap", ("one",), OK),
    Step("destroy", ("first",), errno.EBUSY),
    # for every piece of one,
    Step("unmap", ("two", 0, 1), OK),
    Step("destroy", ("first",), errno.EBUSY),
    # and for those of a child.
    Step("fork", (), OK),
    Step("unmap", ("two", 1, 1), OK),
    Step("destroy", ("first",), errno.EBUSY),
    Step("destroy", ("parent",), errno.EBUSY),
    Step("exit_child", (), OK),
    # Offsets are not reused while they are in use.
    Step("create", ("second", "parent"), OK),
    Step("destroy", ("first",), OK),
    Step("create", ("third", "parent"), OK),
    Step("map", ("three", 1, 2), OK),
    Step("map", ("four", 3, 2), OK),
    Step("destroy", ("second",), errno.EBUSY),
    Step("unmap", ("four",), OK),
    Step("destroy", ("second",), OK),
    Step("destroy", ("third",), errno.EBUSY),
    Step("destroy", ("parent",), errno.EBUSY),
    Step("unmap", ("three",), OK),
    Step("destroy", ("third",), OK),
    Step("destroy", ("parent",), OK),
    # To close works in any case, and mappings outlive it.
    Step("create", ("parent",), OK),
    Step("create", ("first", "parent"), OK),
    Step("create", ("fourth", "parent"), OK),
    Step("map", ("last", 1, 2), OK),
    Step("close", (), OK),
    Step("map", ("m", 1, 2), errno.EBADF),
    Step("destroy", ("first",), errno.EBADF),
    Step("find_nothing", (), errno.EBUSY),
    Step("unmap", ("last",), OK),
    Step("find_nothing", (), OK),
]


def run(service: Service) -> None:
    """Hold a service to the table."""
    for number, step in enumerate(LIFECYCLE):
        answer = getattr(service, step.call)(*step.arguments)
        names = [errno.errorcode.get(code, "OK") for code in (answer, step.answer)]
        assert answer == step.answer, f"step {number}, {step}: {names[0]}, not {names[1]}"


class TableService:
    """A client of our table."""

    def __init__(self) -> None:
        self.table = MmapTable(PAGE)
        self.owners: dict[str, MmapOwner] = {}
        self.mappings: dict[str, MmapMapping] = {}
        self.inherited: list[MmapMapping] = []
        self.created: list[str] = []
        self.released: list[str] = []

    def create(self, owner: str, parent: str | None = None) -> int:
        made = self.table.add_owner(
            owner,
            parent=self.owners[parent] if parent else None,
            on_release=lambda: self.released.append(owner),
        )
        self.owners[owner] = made
        self.created.append(owner)
        if parent:
            assert self.table.offer(made, BASE, 2 * PAGE).offset == OFFSETS[owner] * PAGE
        return 0

    def destroy(self, owner: str) -> int:
        try:
            self.table.destroy(self.owners[owner])
        except PeerError as error:
            return error.errno
        return 0

    def map(self, mapping: str, offset: int, count: int, how: str = "shared") -> int:
        try:
            self.mappings[mapping] = self.table.map(
                offset * PAGE, count * PAGE, shared=how != "private", executable=how == "exec"
            )
        except PeerError as error:
            return error.errno
        return 0

    def unmap(self, mapping: str, first: int = 0, count: int = 2) -> int:
        self.mappings[mapping].unmap(pages(first, count))
        return 0

    def fork(self) -> int:
        self.inherited = [mapping.fork() for mapping in self.mappings.values()]
        return 0

    def exit_child(self) -> int:
        for mapping in self.inherited:
            mapping.unmap()
        return 0

    def close(self) -> int:
        self.table.close()
        return 0

    def find_nothing(self) -> int:
        return 0 if sorted(self.released) == sorted(self.created) else errno.EBUSY
