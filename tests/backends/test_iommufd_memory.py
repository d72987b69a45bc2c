"""RAM in an IOAS of its own: what domains copy from it, and what they map themselves."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

import pytest

from tests.backends.fake_kernel import FakeDevice, FakeIommufd
from tests.backends.passthrough.fake_device import BAR0, FakeVfioDevice
from viommu.errors import Access, BackendError, InternalError
from viommu.memory.backing import FileBacking, PrivateBacking
from viommu.memory.dma_target import AddressRange, MemoryKind
from viommu.memory.regions import RegionManager
from viommu_backends import iommufd_memory
from viommu_backends.bar_file import BarFile
from viommu_backends.host_map import Piece
from viommu_backends.iommufd_memory import IommufdMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.memory.backing import Backing
    from viommu.memory.region import Region
    from viommu_backends.iommufd_context import Iommufd
    from viommu_backends.vfio_device import VfioDevice

R = Access.READ
RW = Access.READ | Access.WRITE
PAGE = 0x1000
MIB = 1 << 20
GPA = 0x10_0000
IOVA = 0x8000_0000


class Rig:
    """RAM of four pages, from the second page of a file on, and a domain with a device."""

    def __init__(self, *, files: bool = True) -> None:
        self.kernel = FakeIommufd(files=files)
        self.regions = RegionManager()
        self.file = memfd(5 * PAGE)
        self.ram = self.add(GPA, self.file, PAGE)
        context = cast("Iommufd", self.kernel)
        self.memory = IommufdMemory(context, self.regions.register)
        self.domain = self.kernel.alloc_ioas()
        FakeDevice(self.kernel).attach(self.domain)

    def add(
        self,
        gpa: int,
        backing: Backing,
        offset: int = 0,
        *,
        writable: bool = True,
        kind: MemoryKind = MemoryKind.RAM,
    ) -> Region:
        where = AddressRange(gpa, gpa + 4 * PAGE)
        region = self.regions.add_region(f"{gpa:#x}", where, kind)
        self.regions.add_mapping(region, AddressRange(0, 4 * PAGE), backing, offset)
        self.regions.enable(region, writable=writable)
        return region

    def map(self, piece: Piece, prot: Access = RW) -> object:
        """Map a piece in the domain; return what it was mapped to, and its protection."""
        self.memory.map(self.domain, IOVA, piece, prot)
        size, source, allowed = self.kernel.spaces[self.domain].entries[IOVA]
        assert (size, allowed) == (piece.size, prot)
        return source

    def close(self) -> None:
        self.memory.close()
        assert list(self.kernel.spaces) == [self.domain]
        assert self.regions.snapshot()["targets"] == []
        for region in self.regions.regions():
            self.regions.remove_region(region)

    @property
    def held(self) -> list[int]:
        """The addresses that can be copied."""
        return sorted(self.kernel.spaces[self.memory.ioas].entries)


def memfd(size: int) -> FileBacking:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    backing = FileBacking(fd)
    os.close(fd)
    return backing


def piece(
    gpa: int, file: FileBacking | None, offset: int = 0, va: int | None = None, pages: int = 1
) -> Piece:
    return Piece(gpa, pages * PAGE, va, file, offset, writable=True, device=False)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_ram_is_copied_from_where_it_is(rig: Rig) -> None:
    source = rig.map(piece(GPA + PAGE, rig.file, 2 * PAGE, pages=3), R)

    assert source == (rig.file.fileno(), 2 * PAGE)
    assert rig.kernel.copies == 1


def test_without_files_ram_is_copied_from_its_address() -> None:
    rig = Rig(files=False)
    (entry,) = rig.kernel.spaces[rig.memory.ioas].entries.values()
    _, va, _ = entry
    assert isinstance(va, int)

    assert rig.map(piece(GPA + PAGE, rig.file, 2 * PAGE, va + PAGE)) == va + PAGE
    assert rig.kernel.copies == 1
    rig.close()


def test_a_copy_has_no_more_rights_than_the_ram(rig: Rig) -> None:
    rig.add(GPA + 16 * PAGE, memfd(4 * PAGE), writable=False)

    with pytest.raises(BackendError) as caught:
        rig.map(piece(GPA + 16 * PAGE, rig.file))
    assert caught.value.errno == errno.EPERM


def test_ram_comes_and_goes_and_domains_keep_their_copies(rig: Rig) -> None:
    rig.map(piece(GPA, rig.file, PAGE))
    others = [rig.add(GPA + at * PAGE, memfd(4 * PAGE)) for at in (16, 4)]
    assert rig.held == [GPA, GPA + 4 * PAGE, GPA + 16 * PAGE]

    rig.regions.remove_region(rig.ram)
    rig.regions.remove_region(others[0])

    assert rig.held == [GPA + 4 * PAGE]
    assert list(rig.kernel.spaces[rig.domain].entries) == [IOVA]


def test_what_is_not_all_there_is_mapped_by_its_file(rig: Rig) -> None:
    for where in (piece(GPA + 3 * PAGE, rig.file, 0, pages=2), piece(GPA - PAGE, rig.file)):
        assert rig.map(where) == (rig.file.fileno(), 0)
        rig.memory.unmap(rig.domain, IOVA, where.size)
    assert rig.kernel.copies == 0


def test_ram_that_the_kernel_can_not_share_is_a_matter_of_each_domain(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError(errno.EINVAL, "no memfd")

    monkeypatch.setattr(rig.kernel, "map_file", refuse)

    rig.add(GPA + 16 * PAGE, memfd(4 * PAGE))

    assert rig.held == [GPA]
    with pytest.raises(BackendError, match="no memfd"):
        rig.map(piece(GPA + 16 * PAGE, rig.file))


def test_what_is_copied_too_often_is_mapped_by_its_file(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel looks at all copies of a page when another comes."""
    monkeypatch.setattr(iommufd_memory, "_COPIES", 3)
    second_block = rig.add(2 * MIB, memfd(4 * PAGE))

    def map_at(number: int, gpa: int, pages: int = 1) -> int:
        """Map a page and return how many copies that made."""
        before = rig.kernel.copies
        rig.memory.map(rig.domain, IOVA + number * PAGE, piece(gpa, rig.file, pages=pages), R)
        return rig.kernel.copies - before

    assert [map_at(number, GPA + number % 3 * PAGE) for number in range(6)] == [1, 1, 1, 0, 0, 0]
    assert map_at(6, second_block.where.start) == 1
    # One that was no copy makes no room, one that was does.
    rig.memory.unmap(rig.domain, IOVA + 5 * PAGE, PAGE)
    assert map_at(5, GPA) == 0
    rig.memory.unmap(rig.domain, IOVA + PAGE, PAGE)
    assert map_at(1, GPA) == 1
    assert map_at(7, GPA) == 0


def test_what_lies_in_several_blocks_needs_room_in_all(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iommufd_memory, "_COPIES", 1)
    rig.add(2 * MIB - 2 * PAGE, memfd(4 * PAGE))
    across, above = piece(2 * MIB - PAGE, rig.file, pages=2), piece(2 * MIB + PAGE, rig.file)

    rig.memory.map(rig.domain, IOVA, across, R)
    rig.memory.map(rig.domain, IOVA + 4 * PAGE, above, R)
    assert rig.kernel.copies == 1
    rig.memory.unmap(rig.domain, IOVA, 2 * PAGE)
    rig.memory.map(rig.domain, IOVA + 8 * PAGE, above, R)
    rig.memory.map(rig.domain, IOVA, across, R)
    assert rig.kernel.copies == 2


def test_an_unmap_finds_exactly_what_was_mapped(rig: Rig) -> None:
    rig.map(piece(GPA, rig.file))
    with pytest.raises(BackendError):
        rig.memory.unmap(rig.domain, IOVA + PAGE, PAGE)
    with pytest.raises(InternalError, match="not 0x2000"):
        rig.memory.unmap(rig.domain, IOVA, 2 * PAGE)


def test_private_memory_has_nothing_to_share(rig: Rig) -> None:
    with PrivateBacking(4 * PAGE) as private:
        rig.add(GPA + 16 * PAGE, private.retain())

        assert rig.held == [GPA]
        with pytest.raises(BackendError, match="no host virtual address"):
            rig.map(piece(GPA + 16 * PAGE, None))


def test_a_bar_is_mapped_by_dma_buf_each_time(rig: Rig) -> None:
    device = FakeVfioDevice()
    device.write(7, 4, b"\2\0")
    bar = BarFile(cast("VfioDevice", device))
    rig.add(GPA + 16 * PAGE, bar, BAR0, kind=MemoryKind.DEVICE)
    assert rig.held == [GPA]

    source = rig.map(piece(GPA + 17 * PAGE, bar, BAR0 + PAGE))

    assert isinstance(source, tuple)
    assert source[1] == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(source[0])
    device.close()


def test_an_address_space_that_memory_does_not_come_to_is_not_kept() -> None:
    kernel = FakeIommufd()

    def refuse(*_: object) -> None:
        raise BackendError(errno.ENOMEM, "register")

    with pytest.raises(BackendError, match="register"):
        IommufdMemory(cast("Iommufd", kernel), refuse)  # type: ignore[arg-type]
    assert kernel.spaces == {}
