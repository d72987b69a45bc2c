from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.vfio_user.conftest import PAGE
from tests.vfio_user.register_bank import HeldMemory
from viommu.deferred import Deferred
from viommu.errors import BackendError, GuestMemoryError, InternalError, PeerError
from viommu.memory import MappedFile, MappedFiles
from viommu.vfio_user.ioas_table import IoasLimits, IoasTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BASE = 0x100000  # where the apertures begin
LIMITS = IoasLimits(max_ioas=3, max_mappings=6)


class FussyMemory(HeldMemory):
    """Memory that refuses what begins at some addresses, as a host may."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[int] = set()

    def map(
        self,
        gpa: int,
        size: int,
        *,
        readable: bool,
        writable: bool,
        file: MappedFile | None,
        offset: int = 0,
    ) -> None:
        if gpa in self.refused:
            raise BackendError(errno.ENOMEM, f"nothing can be mapped at {gpa:#x}")
        super().map(gpa, size, readable=readable, writable=writable, file=file, offset=offset)


class House:
    """A device's memory, the table over it, and a file whose pages begin with their number."""

    def __init__(self, file: MappedFile, limits: IoasLimits = LIMITS) -> None:
        self.memory = FussyMemory()
        self.table = IoasTable(self.memory, limits)
        self.file = file
        for page in range(file.size // PAGE):
            file.view[page * PAGE] = page

    def map(
        self,
        ioas: int,
        page: int = 0,
        *,
        pages: int = 1,
        iova: int | None = None,
        readable: bool = True,
        writable: bool = True,
    ) -> int:
        """Map pages of the file and return the IOVA."""
        file = self.file.retain()
        try:
            return self.table.map(
                ioas,
                pages * PAGE,
                file,
                page * PAGE,
                readable=readable,
                writable=writable,
                iova=iova,
            )
        except (BackendError, PeerError):
            file.close()
            raise

    def map_legacy(self, gpa: int, page: int) -> None:
        self.table.legacy.map(
            gpa, PAGE, readable=True, writable=True, file=self.file.retain(), offset=page * PAGE
        )

    def attached(self) -> int:
        """Bind the device and attach it to a new IOAS, and return that."""
        self.table.bind()
        ioas = self.table.alloc()
        self.table.attach(ioas)
        return ioas

    def seen(self) -> dict[int, int]:
        """Return what the device sees: the number of the page at each address."""
        regions = self.memory.regions()
        return {region.gpa: region.offset // PAGE for region in regions}

    def dma(self, address: int) -> int | None:
        """Let the device read, and return the number of the page; ``None``: it can't."""
        try:
            return self.memory.read(address, 1)[0]
        except GuestMemoryError:
            return None


@pytest.fixture
def house(memfd: Callable[..., int]) -> Iterator[House]:
    files = MappedFiles()
    house = House(files.get(memfd(16 * PAGE), 0, 16 * PAGE, writable=True))
    yield house
    house.table.close()
    house.memory.unmap_all()
    house.table._check()
    assert house.file.uses == 1
    house.file.close()


def refusal(act: Callable[[], object]) -> int:
    with pytest.raises((PeerError, BackendError)) as caught:
        act()
    assert isinstance(caught.value, PeerError | BackendError)
    return caught.value.errno


# --- ids


def test_ids_are_never_zero_and_never_used_twice(house: House) -> None:
    table = house.table
    first, second = table.alloc(), table.alloc()
    table.destroy(second)
    device = table.bind()
    third = table.alloc()

    assert 0 < first < second < device < third
    assert refusal(lambda: table.destroy(second)) == errno.ENOENT
    assert refusal(lambda: table.attach(device)) == errno.ENOENT  # a device, not an IOAS


def test_ids_end(house: House) -> None:
    house.table._last_id = 0xFFFF_FFFE

    assert house.table.alloc() == 0xFFFF_FFFF
    assert refusal(house.table.alloc) == errno.ENOSPC
    assert refusal(house.table.bind) == errno.ENOSPC


def test_there_are_only_so_many_address_spaces(house: House) -> None:
    spaces = [house.table.alloc() for _ in range(LIMITS.max_ioas)]
    assert refusal(house.table.alloc) == errno.ENOSPC
    house.table.destroy(spaces[0])
    house.table.alloc()


def test_there_are_only_so_many_mappings_in_all(house: House) -> None:
    first, second = house.table.alloc(), house.table.alloc()
    for page in range(3):
        house.map(first, page)
        house.map(second, page)

    assert refusal(lambda: house.map(first)) == errno.ENOSPC
    assert refusal(lambda: house.table.copy(first, BASE, PAGE, second)) == errno.ENOSPC
    house.table.unmap(second, BASE, PAGE)
    house.map(first)
    house.table.unmap_all(first)
    house.map(second)
    house.table.destroy(second)
    house.map(first)


@pytest.mark.parametrize("ioas", [0, 2, 0xFFFF_FFFF])
def test_an_unknown_space_is_not_found(house: House, ioas: int) -> None:
    table = house.table
    known = table.alloc()
    house.map(known)
    table.bind()

    for act in (
        lambda: table.destroy(ioas),
        lambda: house.map(ioas),
        lambda: table.unmap(ioas, BASE, PAGE),
        lambda: table.unmap_all(ioas),
        lambda: table.copy(ioas, BASE, PAGE, known),
        lambda: table.copy(known, BASE, PAGE, ioas),
        lambda: table.attach(ioas),
    ):
        assert refusal(act) == errno.ENOENT
    table._check()
    assert table.attached is None


# --- what the device sees


def test_nothing_is_seen_of_a_space_that_the_device_is_not_in(house: House) -> None:
    first, second = house.table.alloc(), house.table.alloc()
    at = house.map(first, 1)
    assert house.map(second, 2) == at
    only_second = house.map(second, 3)

    assert house.dma(at) is None
    house.table.bind()
    house.table.attach(first)
    assert (house.dma(at), house.dma(only_second)) == (1, None)
    house.table.attach(second)  # replaces
    assert (house.dma(at), house.dma(only_second)) == (2, 3)
    house.table.detach()
    assert house.dma(at) is None


def test_what_is_mapped_and_unmapped_is_seen_at_once(house: House) -> None:
    ioas = house.attached()
    first, second = house.map(ioas, 1), house.map(ioas, 2, pages=2)
    assert house.seen() == {first: 1, second: 2}

    house.table.unmap(ioas, first, PAGE)
    assert house.seen() == {second: 2}
    house.map(ioas, 5)
    house.table.unmap_all(ioas)
    assert house.seen() == {}


def test_the_access_of_a_mapping_is_the_device_s(house: House) -> None:
    ioas = house.attached()
    readable, writable = house.map(ioas, 1, writable=False), house.map(ioas, 2, readable=False)

    assert house.dma(readable) == 1
    assert house.dma(writable) is None
    house.memory.write(writable, b"!")
    with pytest.raises(GuestMemoryError):
        house.memory.write(readable, b"!")


def test_attaching_again_changes_nothing(house: House) -> None:
    ioas = house.attached()
    house.map(ioas, 1)
    before = house.memory.generation

    assert house.table.attach(ioas) is None
    assert house.memory.generation == before


def test_legacy_mappings_are_the_space_of_a_device_that_is_in_none(house: House) -> None:
    table = house.table
    ioas = table.alloc()
    house.map(ioas, 9)
    house.map_legacy(0, 1)
    house.map_legacy(PAGE, 2)
    table.bind()
    assert house.seen() == {0: 1, PAGE: 2}

    table.attach(ioas)
    assert house.seen() == {BASE: 9}
    house.map_legacy(2 * PAGE, 3)  # accepted, and seen later
    table.legacy.unmap(0, PAGE)
    assert house.seen() == {BASE: 9}
    table._check()

    table.detach()
    assert house.seen() == {PAGE: 2, 2 * PAGE: 3}
    table._check()


def test_legacy_memory_without_a_file_comes_back_as_well(house: House) -> None:
    ioas = house.table.alloc()
    house.table.legacy.map(0, PAGE, readable=True, writable=True, file=None)
    house.table.bind()

    house.table.attach(ioas)
    house.table.detach()

    assert [region.shared for region in house.memory.regions()] == [False]


def test_a_device_that_is_not_bound_is_attached_to_nothing(house: House) -> None:
    ioas = house.table.alloc()

    assert refusal(lambda: house.table.attach(ioas)) == errno.EINVAL
    assert refusal(house.table.detach) == errno.EINVAL
    house.table.bind()
    assert refusal(house.table.detach) == errno.EINVAL
    assert refusal(house.table.bind) == errno.EEXIST
    house.table.attach(ioas)
    assert house.table.attached == ioas


def test_the_space_of_the_device_is_not_destroyed(house: House) -> None:
    ioas = house.attached()
    house.map(ioas, 1)

    assert refusal(lambda: house.table.destroy(ioas)) == errno.EBUSY
    assert house.dma(BASE) == 1
    house.table.detach()
    house.table.destroy(ioas)
    assert house.file.uses == 1  # what was mapped went with it


# --- copies


class Copy(NamedTuple):
    """A copy of [start, start + size) of a mapping, counted in bytes, and what it gives."""

    start: int
    size: int
    access: tuple[bool, bool] | None  # readable, writable
    mapped: tuple[bool, bool]
    number: int = 0


COPIES = {
    "all": Copy(0, 2 * PAGE, None, (True, True)),
    "a part": Copy(PAGE + 0x10, 0x20, None, (True, True)),
    "read-only": Copy(0, PAGE, None, (True, False)),
    "less access": Copy(0, PAGE, (True, False), (True, True)),
    "only writing": Copy(0, PAGE, (False, True), (True, True)),
    "more writing": Copy(0, PAGE, (True, True), (True, False), errno.EPERM),
    "more reading": Copy(0, PAGE, (True, False), (False, True), errno.EPERM),
    "behind it": Copy(PAGE, 2 * PAGE, None, (True, True), errno.ENOENT),
    "before it": Copy(-1, PAGE, None, (True, True), errno.ENOENT),
    "nothing there": Copy(4 * PAGE, PAGE, None, (True, True), errno.ENOENT),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_memory_of_what_is_copied(house: House, copy: Copy) -> None:
    table = house.table
    source, target = table.alloc(), table.alloc()
    readable, writable = copy.mapped
    at = house.map(source, 3, pages=2, readable=readable, writable=writable)
    uses = house.file.uses
    wanted_readable, wanted_writable = copy.access or (None, None)

    def act() -> int:
        return table.copy(
            source,
            at + copy.start,
            copy.size,
            target,
            readable=wanted_readable,
            writable=wanted_writable,
        )

    if copy.number:
        assert refusal(act) == copy.number
        assert house.file.uses == uses
        return
    iova = act()
    assert iova == BASE + copy.start % PAGE
    table.bind()
    table.attach(target)
    (region,) = house.memory.regions()
    assert (region.gpa, region.size, region.offset) == (iova, copy.size, 3 * PAGE + copy.start)
    assert (region.readable, region.writable) == (copy.access or copy.mapped)


def test_a_copy_outlives_what_was_copied(house: House) -> None:
    table = house.table
    source = table.alloc()
    target = house.attached()
    house.map(source, 7)
    iova = table.copy(source, BASE, PAGE, target, iova=0x5000)

    table.destroy(source)

    assert iova == 0x5000
    assert house.dma(0x5000) == 7


def test_a_copy_within_a_space_lies_beside_the_first(house: House) -> None:
    ioas = house.attached()
    first = house.map(ioas, 7)

    assert house.table.copy(ioas, first, PAGE, ioas) == first + PAGE
    assert refusal(lambda: house.table.copy(ioas, first, PAGE, ioas, iova=first)) == errno.EEXIST
    assert house.seen() == {first: 7, first + PAGE: 7}


# --- a device that has to let go first


def test_a_held_mapping_is_waited_for(house: House) -> None:
    ioas = house.attached()
    house.map(ioas, 1)
    house.map(ioas, 2)
    house.memory.held = True

    one = house.table.unmap(ioas, BASE, PAGE)
    everything = house.table.unmap_all(ioas)

    assert isinstance(one, Deferred)
    assert isinstance(everything, Deferred)
    assert [one, everything] == house.memory.releases
    assert house.seen() == {}


def test_a_held_space_is_left_before_the_next_is_entered(house: House) -> None:
    house.map_legacy(0, 1)
    house.memory.held = True
    house.table.bind()
    ioas = house.table.alloc()
    house.map(ioas, 2)

    entered = house.table.attach(ioas)

    assert entered is not None
    assert house.seen() == {}  # neither space
    assert not entered.done
    house.memory.releases.pop().resolve(None)
    entered.result()
    assert house.seen() == {BASE: 2}
    house.table._check()

    left = house.table.detach()
    assert left is not None
    house.memory.releases.pop().resolve(None)
    assert house.seen() == {0: 1}
    assert house.table.attached is None


def test_a_space_that_can_t_be_left_is_stayed_in(house: House) -> None:
    ioas = house.attached()
    house.map(ioas, 2)
    house.memory.held = True
    left = house.table.detach()
    assert left is not None
    house.memory.held = False

    house.memory.releases.pop().refuse(BackendError(errno.EBUSY, "it will not let go"))

    assert refusal(left.result) == errno.EBUSY
    assert house.table.attached == ioas
    assert house.seen() == {BASE: 2}


def test_a_client_that_leaves_meanwhile_is_not_waited_for(house: House) -> None:
    ioas = house.attached()
    house.map(ioas, 2)
    house.memory.held = True
    left = house.table.detach()
    assert left is not None

    house.table.close()
    house.memory.releases.pop().resolve(None)

    assert not left.done
    assert house.seen() == {}
    assert house.file.uses == 1


# --- a host that refuses


def test_what_the_host_refuses_is_not_mapped(house: House) -> None:
    ioas = house.attached()
    house.map(ioas, 1)
    house.memory.refused = {BASE + PAGE}

    assert refusal(lambda: house.map(ioas, 2)) == errno.ENOMEM
    assert house.seen() == {BASE: 1}
    house.table._check()
    house.memory.refused = set()
    assert house.map(ioas, 2) == BASE + PAGE


@pytest.mark.parametrize("held", [False, True])
def test_a_space_that_the_host_refuses_is_not_entered(house: House, *, held: bool) -> None:
    first = house.attached()
    second = house.table.alloc()
    house.map(first, 1)
    house.map(second, 2)
    house.map(second, 3)
    house.memory.refused = {BASE + PAGE}
    house.memory.held = held

    def attach() -> None:
        entered = house.table.attach(second)
        house.memory.held = False
        if entered is not None:
            house.memory.releases.pop().resolve(None)
            entered.result()

    assert refusal(attach) == errno.ENOMEM
    assert house.table.attached == first
    assert house.seen() == {BASE: 1}
    house.table._check()


def test_legacy_mappings_stay_when_a_space_is_refused(house: House) -> None:
    house.map_legacy(0, 4)
    ioas = house.table.alloc()
    house.map(ioas, 1)
    house.table.bind()
    house.memory.refused = {BASE}

    assert refusal(lambda: house.table.attach(ioas)) == errno.ENOMEM
    assert house.table.attached is None
    assert house.seen() == {0: 4}
    house.table._check()


def test_the_device_stays_when_legacy_mappings_are_refused(house: House) -> None:
    house.table.legacy.map(0, PAGE, readable=True, writable=True, file=None)
    ioas = house.attached()
    house.map(ioas, 1)
    house.memory.refused = {0}

    assert refusal(house.table.detach) == errno.ENOMEM
    assert house.table.attached == ioas
    assert house.seen() == {BASE: 1}
    house.table._check()


# --- the check


@pytest.mark.parametrize("damage", ["id", "count", "aside", "seen"])
def test_the_check_notices_damage(house: House, damage: str) -> None:
    table = house.table
    ioas = table.alloc()
    house.map(ioas)
    if damage == "id":
        table._spaces[0] = table._spaces.pop(ioas)
    elif damage == "count":
        table._mappings = 0
    elif damage == "aside":
        table._aside.map(0, PAGE, readable=True, writable=True, file=None)
    else:
        table._attached = table._spaces[ioas]

    with pytest.raises(InternalError):
        table._check()
    table._mappings = 1
