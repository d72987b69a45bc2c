"""Any device, at random: it answers in any order, refuses what it likes, dies, and comes back.

The device works in the order in which it is asked. It never sees two ranges overlap, nor
is it asked to unmap what it does not have; and when everything is answered it has what
the mapper says, all of it, and whoever asked for what it refused has heard of that.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.backends.vfio_user.rig import PAGE, RW, Rig, mapping
from viommu.errors import Access
from viommu.mapper import AddMapResult
from viommu.vfio_user.protocol import Capabilities

if TYPE_CHECKING:
    from tests.backends.vfio_user.rig import Asked, Scripted
    from viommu.mapper import MappingInfo

PLACES = 6
places = st.integers(0, PLACES - 1)
mappings = st.builds(
    mapping,
    st.integers(0, PLACES - 1).map(lambda place: 100 + 4 * place),
    st.sampled_from([0, 6, 14, 20, 30, 40]),
    st.integers(1, 4),
    st.sampled_from([RW, Access.READ]),
)
FEW = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Device:
    """What a device makes of its orders: address spaces by number, 0 that of DMA_MAP."""

    def __init__(self, scripted: Scripted) -> None:
        self.scripted = scripted
        self.spaces: dict[int, dict[int, tuple[int, Any, Access]]] = {0: {}}
        self.attached = 0
        self.unanswered: list[tuple[Asked, bool]] = []
        self.refused: set[int] = set()  # first pages

    def work(self, refuse: bool) -> None:
        """Take what has come, and do it, or perhaps refuse the first map."""
        for asked in self.scripted.asked():
            what = asked.what()
            space, what = (what[0], what[1:]) if isinstance(what[0], int) else (0, what)
            refused = False
            match what:
                case ("map", page, count, at, prot):
                    refused, refuse = refuse, False
                    if refused:
                        self.refused.add(page)
                    else:
                        self.map(space, page, count, at, prot)
                case ("unmap", page, count):
                    there = self.spaces[space].pop(page, None)
                    assert there is None or there[0] == count
                    refused = there is None
                    assert not refused or page in self.refused, "unmapped what is not there"
                case ("ALLOC_IOAS",):
                    self.spaces[self.scripted.ioases + 1 + self.pending(asked)] = {}
                case ("attach",):
                    self.attached = space
                    assert space in self.spaces
                case ("DETACH_PT",):
                    assert self.attached
                    self.attached = 0
                case ("destroy",):
                    assert self.attached != space
                    del self.spaces[space]
                case _:
                    assert what == ("BIND",)
            self.unanswered.append((asked, refused))

    def pending(self, asked: Asked) -> int:
        return sum(each.command == asked.command for each, _ in self.unanswered)

    def map(self, space: int, page: int, count: int, at: Any, prot: Access) -> None:
        there = self.spaces[space]
        for other, (length, _, _) in there.items():
            assert other + length <= page or page + count <= other, "overlap"
        there[page] = count, at, prot

    def answer(self, index: int) -> None:
        asked, refused = self.unanswered.pop(index)
        if refused:
            self.scripted.refuse(asked, errno.ENOSPC)
        else:
            self.scripted.answer(asked)

    def has(self) -> dict[int, tuple[int, Any, Access]]:
        return self.spaces[self.attached]


class RandomDevice(RuleBasedStateMachine):
    """Requests come one at a time, as a guest's do; memory, death and resets at any time."""

    mode: ClassVar[Any] = "shared"
    ioas: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(self.mode)
        self.mapper = self.rig.mapper
        self.device: Device | None = None
        self.wanted: dict[int, MappingInfo] = {}  # what the guest has mapped
        self.asked: list[MappingInfo] | None = None  # by the request that is not answered
        self.before: dict[int, MappingInfo] = {}
        self.moving = False
        self.came_from: int | None = None  # the IOAS that the device leaves in one step
        self.connect()

    def connect(self) -> None:
        theirs = Capabilities(8, iommufd=self.ioas, fixed_iova=self.ioas)
        self.device = Device(self.rig.script(theirs))

    def teardown(self) -> None:
        self.answer_everything()
        self.rig.close()

    @property
    def idle(self) -> bool:
        return self.asked is None

    def send(
        self, wanted: dict[int, MappingInfo], asked: list[MappingInfo], *, moving: bool = False
    ) -> None:
        self.before, self.wanted, self.asked = self.wanted, wanted, asked
        self.moving = moving
        self.conclude()

    def conclude(self) -> None:
        """Have the request's fate known, when everything is answered."""
        if self.asked is None or self.mapper.unsettled() is not None:
            return
        asked, self.asked = self.asked, None
        came_from, self.came_from = self.came_from, None
        refusal = self.mapper.take_refusal()
        if refusal is None:
            return
        assert asked, "nothing was asked for that could be refused"
        if came_from is not None and self.device is not None:
            assert self.device.attached == came_from
        self.nothing_is_there_by_halves(asked)
        # As a domain does; and nobody refuses that.
        if self.moving:
            self.mapper.reset_domain()
            for each in self.before.values():
                self.mapper.add_map(each)
        else:
            self.mapper.remove_map(asked[0].iova, asked[0].size)
        self.wanted = self.before
        self.answer_everything()

    def nothing_is_there_by_halves(self, asked: list[MappingInfo]) -> None:
        """What was refused is missing as a whole."""
        for each in asked:
            pages = [each.gpa + at for at in range(0, each.size, PAGE)]
            memory = sum(self.rig.memory.region_at(gpa) is not None for gpa in pages)
            entries = self.mapper.host._entries.overlapping(each.iova, each.iova + each.size)
            assert sum(entry.size for entry in entries) in {0, memory * PAGE}

    # What a guest does

    @precondition(lambda self: self.idle)
    @rule(each=mappings)
    def add(self, each: MappingInfo) -> None:
        if self.mapper.add_map(each) is AddMapResult.OK:
            self.send({**self.wanted, each.iova: each}, [each])
        else:
            assert any(
                m.iova < each.iova + each.size and each.iova < m.iova + m.size
                for m in self.wanted.values()
            )

    @precondition(lambda self: self.idle and self.wanted)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        iova = data.draw(st.sampled_from(sorted(self.wanted)))
        assert self.mapper.remove_map(iova, self.wanted[iova].size).ok
        self.send({i: m for i, m in self.wanted.items() if i != iova}, [])

    @precondition(lambda self: self.idle)
    @rule(domain=st.lists(mappings, max_size=3))
    def move(self, domain: list[MappingInfo]) -> None:
        """Go to another domain, in one step where that can be."""
        wanted = {each.iova: each for each in domain}
        if self.device is not None and self.mapper.switch(list(wanted.values()), []):
            self.came_from = self.device.attached
        else:
            self.mapper.reset_domain()
            for each in wanted.values():
                assert self.mapper.add_map(each) is AddMapResult.OK
        self.send(wanted, list(wanted.values()) or [mapping(0, 0)], moving=True)

    @rule(really=st.integers(0, 3))
    def reset(self, really: int) -> None:
        if not really:
            self.mapper.reset_domain()
            self.asked = self.came_from = None
            self.wanted = {}

    # What the VMM does

    @rule(size=st.integers(1, 6))
    def change_memory(self, size: int) -> None:
        region = self.rig.memory.region_at(20 * PAGE)
        if region is None:
            self.rig.add_ram(20, size)
        else:
            self.rig.memory.unmap(region.gpa, region.size)

    # What the device does

    @precondition(lambda self: self.device)
    @rule(refuse=st.booleans())
    def work(self, refuse: bool) -> None:
        assert self.device is not None
        self.device.work(refuse)
        self.conclude()

    @precondition(lambda self: self.device and self.device.unanswered)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        assert self.device is not None
        self.device.answer(data.draw(st.integers(0, len(self.device.unanswered) - 1)))
        self.conclude()

    @rule()
    def answer_everything(self) -> None:
        while self.device is not None and len(self.mapper.orders):
            self.device.work(refuse=False)
            while self.device.unanswered:
                self.device.answer(-1)
        self.conclude()

    @rule(really=st.integers(0, 5))
    def die(self, really: int) -> None:
        if self.device is not None and not really:
            self.device.scripted.close()
            self.rig.turn()
            self.device = None
            self.conclude()
            assert self.idle

    @precondition(lambda self: self.device is None)
    @rule()
    def come_back(self) -> None:
        self.connect()

    @invariant()
    def records_are_in_order(self) -> None:
        self.mapper._check()
        assert {m.iova: m for m in self.mapper.mappings()} == self.wanted
        assert not self.rig.lost or all(why.errno == errno.ECONNRESET for why in self.rig.lost)

    @invariant()
    def a_device_that_has_answered_has_what_it_was_told(self) -> None:
        if self.device is None or len(self.mapper.orders):
            return
        assert self.mapper.unsettled() is None
        held = {
            entry.iova // PAGE: (
                entry.size // PAGE,
                entry.gpa // PAGE if self.mode == "shared" else None,
                entry.prot,
            )
            for entry in self.mapper.entries()
        }
        assert self.device.has() == held
        if self.ioas:
            assert len(self.device.spaces) <= 2  # that of DMA_MAP, and the domain's
        if not self.mapper.refused_memory:
            self.nothing_is_missing()

    def nothing_is_missing(self) -> None:
        """Every page that leads to memory is there."""
        for each in self.mapper.mappings():
            for at in range(0, each.size, PAGE):
                region = self.rig.memory.region_at(each.gpa + at)
                entry = next(
                    (
                        e
                        for e in self.mapper.entries()
                        if e.iova <= each.iova + at < e.iova + e.size
                    ),
                    None,
                )
                assert (entry is None) is (region is None)


class RandomMessageDevice(RandomDevice):
    mode = "message"


class RandomIoasDevice(RandomDevice):
    ioas = True


@pytest.mark.parametrize("machine", [RandomDevice, RandomMessageDevice, RandomIoasDevice])
def test_any_device(machine: type[RandomDevice]) -> None:
    run_state_machine_as_test(machine, settings=FEW)
