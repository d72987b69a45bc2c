"""What the guest maps becomes the device's maps, whatever the device makes of it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.backends.vfio_user.rig import PAGE, RW, R, Rig, mapping
from viommu.basic import BasicMemoryMapper
from viommu.errors import (
    Access,
    BackendError,
    InternalError,
    PeerError,
    TranslationFault,
    status_of,
)
from viommu.iova import ADDRESS_SPACE_END
from viommu.mapper import (
    AddMapResult,
    DeferredMapper,
    MappingInfo,
    MemRegion,
    RemoveMapResult,
    SwitchingMapper,
)
from viommu.memory.dma_target import DeferredTarget, DmaNeeds
from viommu.spec.virtio_iommu import Status
from viommu.vfio_user.protocol import Capabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

W = Access.WRITE
IDENTITY = MappingInfo(0, 0, ADDRESS_SPACE_END, RW)


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*args: str, **options: object) -> Rig:
        rigs.append(Rig(*args, **options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


def test_it_satisfies_the_protocols(rig: Rig) -> None:
    assert isinstance(rig.mapper, DeferredMapper)
    assert isinstance(rig.mapper, SwitchingMapper)
    assert isinstance(rig.mapper, DeferredTarget)
    assert rig.mapper.supports_detach()
    assert not rig.mapper.join(BasicMemoryMapper())
    assert not rig.mapper.switch([], [])
    with pytest.raises(BackendError) as caught:
        rig.mapper.vfio_dma_map(0, 0, PAGE, RW)
    assert caught.value.errno == errno.ENOTSUP


def test_every_device_has_a_space_of_its_own(make_rig: Callable[..., Rig]) -> None:
    assert make_rig().mapper.id() != make_rig().mapper.id()


# -- what the device is told --


def test_a_mapping_becomes_a_map_for_each_piece_of_memory(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(100, 6, 4), mapping(200, 30, 4), mapping(300, 20), mapping(400, 9, prot=W))

    assert device.answer_all() == [
        ("map", 100, 2, 6, RW),
        ("map", 102, 2, 8, R),  # ROM
        ("map", 202, 2, 32, RW),  # where page 30 leads, there is nothing
    ]
    rig.settle()
    assert rig.mapper.take_refusal() is None
    rig.mapper.remove_map(0, 500 * PAGE)
    assert device.answer_all() == [("unmap", 100, 2), ("unmap", 102, 2), ("unmap", 202, 2)]


def test_a_device_that_asks_for_every_byte_gets_no_file(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("message")
    device = rig.script()
    rig.add(mapping(100, 6, 4))

    assert device.answer_all() == [("map", 100, 2, None, RW), ("map", 102, 2, None, R)]
    assert rig.mapper.needs is DmaNeeds.NONE
    assert "memory=message (no file descriptor" in rig.mapper.summary


def test_the_identity_map_follows_memory(rig: Rig) -> None:
    device = rig.script()
    rig.add(IDENTITY)
    assert device.answer_all() == [
        ("map", 0, 8, 0, RW), ("map", 8, 8, 8, R), ("map", 32, 32, 32, RW),
    ]  # fmt: skip

    rig.memory.unmap(8 * PAGE, 8 * PAGE)
    assert device.answer_all() == [("unmap", 8, 8)]
    rig.add_ram(8, 4)
    assert device.answer_all() == [("map", 8, 4, 8, RW)]
    assert [(e.iova // PAGE, e.size // PAGE) for e in rig.mapper.entries()] == [
        (0, 8), (8, 4), (32, 32),
    ]  # fmt: skip


def test_an_unmap_is_done_when_the_device_says_so(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(100, 0))
    device.answer_all()
    rig.settle()

    assert rig.mapper.remove_map(100 * PAGE, PAGE) == RemoveMapResult(ok=True)
    event = rig.mapper.unsettled()
    assert event is not None
    (asked,) = device.asked()
    assert not event.is_set()
    device.answer(asked)
    assert event.is_set()
    event.close()


def test_what_was_not_sent_yet_is_never_sent(rig: Rig) -> None:
    device = rig.script()
    rig.add(*(mapping(number, 0) for number in range(100)))
    rig.mapper.reset_domain()
    assert device.answer_all() == []
    rig.add(*(mapping(number, 0) for number in range(100)))
    assert len(device.asked()) == 64
    rig.mapper.reset_domain()
    assert len(rig.mapper.orders) == 128  # those that were sent, and to take them back


def test_a_mapping_that_overlaps_is_not_sent(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(100, 0, 2))
    device.answer_all()

    assert rig.mapper.add_map(mapping(101, 0)) is AddMapResult.OVERLAP_FAILURE
    assert not rig.mapper.remove_map(101 * PAGE, PAGE).ok
    assert device.answer_all() == []


# -- what the device says to that --


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_map_that_is_refused_is_taken_back_as_a_whole(rig: Rig, order: list[int]) -> None:
    device = rig.script()
    rig.add(mapping(100, 6, 4))
    asked = device.asked()
    for index in order:
        if index:
            device.refuse(asked[index], errno.ENOMEM)
        else:
            device.answer(asked[index])
    assert device.answer_all() == [("unmap", 100, 2)]
    rig.settle()

    refusal = rig.mapper.take_refusal()
    assert refusal is not None
    assert status_of(refusal) == Status.NOMEM
    assert "[0x66000, 0x68000)" in str(refusal)
    assert rig.mapper.take_refusal() is None
    assert rig.mapper.mappings() == [mapping(100, 6, 4)]  # until whoever asked removes it
    assert rig.mapper.entries() == []
    assert rig.mapper.remove_map(100 * PAGE, 4 * PAGE).ok
    assert device.answer_all() == []
    rig.add(mapping(100, 6, 4))
    assert len(device.answer_all()) == 2


def test_of_several_refusals_the_first_is_told(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(1, 0), mapping(2, 0), mapping(3, 0))
    asked = device.asked()
    device.refuse(asked[1], errno.ENOSPC)
    device.refuse(asked[0], errno.EIO)
    device.answer(asked[2])
    rig.settle()

    refusal = rig.mapper.take_refusal()
    assert refusal is not None
    assert refusal.errno == errno.ENOSPC
    assert rig.mapper.take_refusal() is None


def test_a_refusal_of_what_is_gone_already_is_not_told(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(1, 0), mapping(2, 0), mapping(3, 0))
    asked = device.asked()
    device.refuse(asked[0])
    rig.mapper.remove_map(PAGE, PAGE)
    rig.mapper.remove_map(2 * PAGE, PAGE)
    device.refuse(asked[1])
    device.refuse(asked[2])
    rig.mapper.reset_domain()
    assert device.answer_all() == []
    rig.settle()

    assert rig.mapper.take_refusal() is None
    assert not rig.lost


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_map_and_its_unmap_may_both_be_refused(rig: Rig, order: list[int]) -> None:
    """The unmap was under way when the map was refused: there is nothing to unmap."""
    device = rig.script()
    rig.add(mapping(1, 0))
    asked = device.asked()
    rig.mapper.remove_map(PAGE, PAGE)
    asked += device.asked()
    for index in order:
        device.refuse(asked[index], [errno.EIO, errno.ENOENT][index])

    rig.settle()
    assert rig.mapper.take_refusal() is None
    assert not rig.lost


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_device_that_does_not_let_go_is_cut_off(rig: Rig, order: list[int]) -> None:
    device = rig.script()
    rig.add(mapping(1, 0), mapping(2, 0))
    asked = device.asked()
    rig.mapper.remove_map(PAGE, PAGE)
    event = rig.mapper.unsettled()
    assert event is not None
    maps = [asked[0], *device.asked()]
    for index in order:
        assert not event.is_set()
        if index:
            device.refuse(maps[1])
        else:
            device.answer(maps[0])

    assert event.is_set()
    event.close()
    assert device.gone()
    assert [why.errno for why in rig.lost] == [errno.EPROTO]
    assert "has not let go of [0x1000, 0x2000)" in str(rig.lost[0])
    assert rig.mapper.describe()["counters"]["cut off"] == 1  # type: ignore[index]
    assert rig.mapper.take_refusal() is None
    assert rig.mapper.mappings() == [mapping(2, 0)]
    rig.mapper._check()


def test_a_device_that_never_answers_is_cut_off(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(max_hold=0.02)
    device = rig.script()
    rig.add(mapping(1, 0))
    event = rig.mapper.unsettled()
    assert event is not None
    while not rig.lost:
        rig.loop.turn(1.0)

    assert [why.errno for why in rig.lost] == [errno.ETIMEDOUT]
    assert event.is_set()
    event.close()
    assert rig.mapper.take_refusal() is None
    assert device.gone()


# -- memory that comes and goes by itself --


def test_memory_that_a_device_refuses_later_is_logged_and_told_nobody(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    device = rig.script()
    rig.add(mapping(100, 20, 2))
    rig.settle()
    rig.add_ram(20, 2)
    (asked,) = device.asked()
    device.refuse(asked)
    rig.settle()

    assert "guest memory is out of a device's reach" in caplog.text
    assert rig.mapper.refused_memory == 1
    assert rig.mapper.take_refusal() is None
    assert rig.mapper.entries() == []
    rig.mapper.remove_map(100 * PAGE, 2 * PAGE)
    assert device.answer_all() == []


def test_the_next_request_does_not_hear_of_it_either(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(100, 20, 2))
    device.answer_all()
    rig.add_ram(20, 2)
    rig.add(mapping(200, 0))
    asked = device.asked()
    device.refuse(asked[0])
    device.answer(asked[1])
    rig.settle()

    assert rig.mapper.take_refusal() is None
    assert rig.mapper.refused_memory == 1


@pytest.mark.parametrize("first", ["remove_map", "unmap_dma"])
def test_nor_does_one_that_asks_for_nothing(rig: Rig, first: str) -> None:
    """The mapping was answered for long ago, before there was memory."""
    device = rig.script()
    rig.add(mapping(1, 0))
    device.answer_all()
    rig.settle()
    rig.add(mapping(100, 20, 2))
    rig.settle()
    if first == "remove_map":
        rig.mapper.remove_map(PAGE, PAGE)
    else:
        rig.memory.unmap(0, 8 * PAGE)
    rig.add_ram(20, 2)
    unmap, map_ = device.asked()
    device.refuse(map_)
    device.answer(unmap)
    rig.settle()

    assert rig.mapper.take_refusal() is None
    assert rig.mapper.refused_memory == 1


def test_a_bar_that_a_device_refuses_is_done_without(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    device = rig.script()
    rig.add_bar(20, 2)
    rig.add(IDENTITY)
    asked = {each.what()[1]: each for each in device.asked()}
    device.refuse(asked.pop(20))
    for each in asked.values():
        device.answer(each)
    rig.settle()

    assert rig.mapper.take_refusal() is None
    assert rig.mapper.host.refused_bars == 1
    assert "a BAR stays out of reach" in caplog.text


def test_a_bar_that_a_guest_asks_for_and_nothing_else_is_refused(rig: Rig) -> None:
    device = rig.script()
    rig.add_bar(20, 2)
    rig.add(mapping(100, 20, 2))
    (asked,) = device.asked()
    assert asked.what() == ("map", 100, 2, 0, RW)
    device.refuse(asked)
    rig.settle()

    assert rig.mapper.take_refusal() is not None
    assert rig.mapper.host.refused_bars == 0


def test_a_bar_without_a_file_is_reached_by_messages(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("message")
    rig.add_bar(20, 2, shared=False)
    device = rig.script()
    rig.add(mapping(100, 20, 4))
    assert device.answer_all() == [("map", 100, 2, None, RW)]


def test_memory_is_gone_from_the_device_when_it_says_so(rig: Rig) -> None:
    device = rig.script()
    rig.add(IDENTITY)
    device.answer_all()
    assert rig.mapper.settled() is None

    gone = rig.memory.unmap(0, 8 * PAGE)
    assert gone is not None
    (asked,) = device.asked()
    assert not gone.done
    device.answer(asked)
    assert gone.done


# -- what devices can take --


def test_no_more_ranges_than_the_device_takes(rig: Rig) -> None:
    device = rig.script(Capabilities(8, max_dma_maps=3))
    rig.add(mapping(1, 0), mapping(2, 0))
    with pytest.raises(BackendError) as caught:
        rig.mapper.add_map(mapping(100, 6, 4))

    assert "takes 3 maps and has 3 of them" in str(caught.value)
    assert status_of(caught.value) == Status.NOMEM
    assert device.answer_all() == [("map", 1, 1, 0, RW), ("map", 2, 1, 0, RW)]
    rig.mapper.remove_map(PAGE, PAGE)
    rig.add(mapping(100, 6, 4))
    assert len(device.answer_all()) == 3
    rig.settle()


def test_memory_for_which_there_is_no_room_is_refused_at_once(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(limit=3)
    device = rig.script()
    rig.add(IDENTITY)
    device.answer_all()
    with pytest.raises(PeerError) as caught:
        rig.add_ram(20, 2)
    assert caught.value.errno == errno.ENOSPC
    assert [region.gpa // PAGE for region in rig.memory.regions()] == [0, 8, 32]
    assert device.answer_all() == []


@pytest.mark.parametrize(
    ("pgsizes", "page"), [(None, 0x1000), (0x1000, 0x1000), (0x3000, 0x1000), (0x200000, 0x200000)]
)
def test_page_sizes_are_the_devices(rig: Rig, pgsizes: int | None, page: int) -> None:
    rig.script(Capabilities(8, pgsizes=pgsizes))

    assert rig.mapper.get_mask() == -page & ADDRESS_SPACE_END - 1


def test_a_larger_page_is_kept_to(rig: Rig) -> None:
    device = rig.script(Capabilities(8, pgsizes=0x4000))
    rig.add(mapping(100, 0, 4), mapping(104, 4, 2), mapping(112, 6, 8))

    assert device.answer_all() == [("map", 100, 4, 0, RW)]  # the others are no whole pages


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (Capabilities(8, pgsizes=0x4000), "its smallest page is 0x4000, 0x1000 was told before"),
        (Capabilities(8, max_dma_maps=1), "takes 1 maps and has 1 of them"),
        (Capabilities(0), "use memory=message"),
    ],
)
def test_a_device_that_can_not_take_the_place_of_another_is_given_up(
    rig: Rig, theirs: Capabilities, why: str
) -> None:
    first = rig.script()
    rig.add(mapping(100, 6, 4))
    first.answer_all()
    first.close()
    rig.turn()
    device = rig.script(theirs)
    rig.turn()

    assert device.gone()
    assert rig.has_given()
    assert why in str(rig.lost[1])
    assert rig.mapper.mappings() == [mapping(100, 6, 4)]
    rig.mapper._check()
    rig.settle()


# -- death, at every step, and after --


@pytest.mark.parametrize("step", range(7))
def test_a_device_that_dies_refuses_nothing_and_its_successor_gets_everything(
    rig: Rig, step: int
) -> None:
    device = rig.script()
    rig.add(mapping(1, 0), mapping(2, 0), mapping(30, 6, 4))
    asked = device.asked()
    for each in asked[:step]:
        device.answer(each)
    if step > 4:
        rig.mapper.remove_map(2 * PAGE, PAGE)
        asked += device.asked()
    if step > 5:
        device.answer(asked[4])
    event = rig.mapper.unsettled()
    assert (event is None) is (step in {4, 6})
    device.close()
    rig.turn()
    if event is not None:
        assert event.is_set()
        event.close()
    assert rig.mapper.unsettled() is None
    assert rig.mapper.take_refusal() is None

    rig.add(mapping(5, 0))
    rig.mapper.remove_map(PAGE, PAGE)
    assert rig.mapper.unsettled() is None
    rig.add_ram(20, 4)
    rig.mapper._check()
    successor = rig.script()
    assert not rig.has_given()
    assert successor.answer_all() == [
        *([] if step > 4 else [("map", 2, 1, 0, RW)]),
        ("map", 5, 1, 0, RW),
        ("map", 30, 2, 6, RW),
        ("map", 32, 2, 8, R),
    ]
    assert rig.has_given()
    rig.settle()


def test_a_successor_gets_what_the_one_before_has_refused(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(100, 20, 2))
    rig.settle()
    rig.add_ram(20, 2)
    device.refuse(device.asked()[0])
    assert rig.mapper.entries() == []
    device.close()
    rig.turn()

    assert rig.script().answer_all() == [("map", 100, 2, 20, RW)]


def test_a_successor_that_comes_before_the_loss_is_told(rig: Rig) -> None:
    rig.script()
    rig.add(mapping(1, 0))
    assert rig.script().answer_all() == [("map", 1, 1, 0, RW)]
    rig.settle()


def test_what_a_successor_refuses_is_nobodys_request(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.add(mapping(1, 0), mapping(2, 0))
    device = rig.script()
    first, second = device.asked()
    device.refuse(first)
    device.answer(second)

    assert rig.has_given()
    assert rig.mapper.take_refusal() is None
    assert rig.mapper.refused_memory == 1
    assert [entry.iova for entry in rig.mapper.entries()] == [2 * PAGE]
    assert "out of a device's reach" in caplog.text


def test_a_device_that_refuses_all_of_memory_is_logged_ever_more_rarely(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.add(*(mapping(number, 0) for number in range(10)))
    device = rig.script()
    for asked in device.asked():
        device.refuse(asked)

    assert rig.mapper.refused_memory == 10
    assert caplog.text.count("out of a device's reach") == 4  # 1st, 2nd, 4th, 8th


def test_a_closed_mapper_has_no_device(rig: Rig) -> None:
    device = rig.script()
    rig.add(mapping(1, 0))
    device.asked()
    event = rig.mapper.unsettled()
    assert event is not None
    rig.mapper.close()
    rig.mapper.close()

    assert event.is_set()
    event.close()
    rig.mapper.remove_map(0, 100 * PAGE)
    assert device.answer_all() == []


# -- exports --


def test_exports_are_translated_here_and_revoked(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("message")
    rig.script()
    rig.add(mapping(1, 0, 2))
    with rig.mapper.start_export_session() as fault:
        assert rig.mapper.export(PAGE + 8, 16) == [MemRegion(8, 16, RW)]
        assert rig.mapper.exports.total == 1
        with pytest.raises(TranslationFault):
            rig.mapper.export(0, 1)
        resolution = rig.mapper.remove_map(PAGE, 2 * PAGE).resolution
        assert resolution is not None
        revoked = fault.is_set()
        assert revoked
        rig.mapper.release(PAGE + 8, 16)
        assert resolution.is_set()
        resolution.close()


def test_its_state_is_told(rig: Rig) -> None:
    rig.script()
    rig.add(mapping(1, 0), mapping(100, 6, 4))

    assert rig.mapper.describe() == {
        "memory": "shared",
        "protocol": "DMA_MAP",
        "maps": 3,
        "maps limit": 65535,
        "unanswered": 3,
        "counters": {"orders": 0, "refused BARs": 0, "refused memory": 0, "cut off": 0},
    }
    assert "trusted to keep to its maps" in rig.mapper.summary


def test_check_finds_damage(rig: Rig) -> None:
    rig.add(mapping(1, 0))
    rig.mapper.host.clear()

    with pytest.raises(InternalError):
        rig.mapper._check()
