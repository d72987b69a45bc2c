"""A device with I/O address spaces of its own has one for each domain."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.backends.vfio_user.rig import PAGE, RW, Rig, Scripted, mapping
from viommu.errors import BackendError, PeerError
from viommu.memory.dma_target import AddressRange, MemoryKind
from viommu.vfio_user.protocol import Capabilities
from viommu_backends.bar_file import BarFile
from viommu_backends.vfio_user.space import DeviceSpace, IoasSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.mapper import MappingInfo

THEIRS = Capabilities(8, iommufd=True, fixed_iova=True)
BIND, ALLOC, DETACH = ("BIND",), ("ALLOC_IOAS",), ("DETACH_PT",)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def device(rig: Rig) -> Scripted:
    """A device that is in its first IOAS, with page 1."""
    device = rig.script(THEIRS)
    rig.add(mapping(1, 0))
    assert device.answer_all() == [BIND, ALLOC, (1, "attach"), (1, "map", 1, 1, 0, RW)]
    rig.settle()
    return device


def until(device: Scripted, what: tuple[Any, ...]) -> None:
    """Answer everything that comes up to this, which is refused."""
    refused = False
    while not refused:
        for each in device.asked():
            if each.what() == what:
                device.refuse(each, errno.ENOSPC)
                refused = True
            else:
                device.answer(each)


def refusal(rig: Rig) -> BackendError | None:
    rig.settle()
    return rig.mapper.take_refusal()


@pytest.mark.parametrize(
    ("mode", "theirs"),
    [
        ("shared", Capabilities(8)),
        ("shared", Capabilities(8, iommufd=True)),
        ("message", THEIRS),
    ],
)
def test_without_all_that_is_needed_the_device_is_told_by_dma_map(
    mode: Any, theirs: Capabilities
) -> None:
    rig = Rig(mode)
    device = rig.script(theirs)
    rig.add(mapping(1, 0))

    assert device.answer_all() == [("map", 1, 1, 0 if mode == "shared" else None, RW)]
    assert rig.mapper.protocol == "DMA_MAP"
    assert type(rig.mapper._space) is DeviceSpace
    rig.close()


def test_a_domain_is_an_ioas(rig: Rig, device: Scripted) -> None:
    assert rig.mapper.protocol == "IOAS"
    assert rig.mapper.attached is not None
    rig.add(mapping(2, 6, 4))
    assert device.answer_all() == [(1, "map", 2, 2, 6, RW), (1, "map", 4, 2, 8, RW & ~RW.WRITE)]
    rig.mapper.remove_map(PAGE, PAGE)
    assert device.answer_all() == [(1, "unmap", 1, 1)]
    rig.settle()
    assert refusal(rig) is None


def test_leaving_it_destroys_it(rig: Rig, device: Scripted) -> None:
    rig.mapper.reset_domain()
    assert device.answer_all() == [DETACH, (1, "destroy")]
    rig.settle()
    assert rig.mapper.attached is None
    rig.mapper.reset_domain()
    assert device.answer_all() == []
    rig.add(mapping(1, 0))
    assert device.answer_all() == [ALLOC, (2, "attach"), (2, "map", 1, 1, 0, RW)]


def test_what_was_not_made_yet_is_not_destroyed(rig: Rig, device: Scripted) -> None:
    rig.mapper.reset_domain()
    for _ in range(100):
        rig.add(mapping(1, 0), mapping(2, 0))
        rig.mapper.reset_domain()
    assert len(rig.mapper.orders) == 2
    assert device.answer_all() == [DETACH, (1, "destroy")]


def test_what_was_not_entered_yet_is_not_left(rig: Rig, device: Scripted) -> None:
    rig.mapper.reset_domain()
    device.answer_all()
    rig.add(mapping(1, 0))
    (alloc,) = device.asked()
    rig.mapper.reset_domain()
    device.answer(alloc)
    assert device.answer_all() == [(2, "destroy")]


def test_a_map_that_is_refused_does_not_spoil_the_domain(rig: Rig, device: Scripted) -> None:
    rig.add(mapping(2, 0))
    until(device, (1, "map", 2, 1, 0, RW))
    error = refusal(rig)
    assert error is not None
    assert error.errno == errno.ENOSPC
    rig.mapper.remove_map(2 * PAGE, PAGE)
    rig.add(mapping(3, 0))
    assert device.answer_all() == [(1, "map", 3, 1, 0, RW)]


@pytest.mark.parametrize("what", [ALLOC, (2, "attach")])
def test_a_device_that_makes_no_further_ioas_refuses_the_request(
    rig: Rig, device: Scripted, what: tuple[Any, ...]
) -> None:
    rig.mapper.reset_domain()
    device.answer_all()
    rig.add(mapping(1, 0), mapping(2, 0))
    until(device, what)
    device.answer_all()
    error = refusal(rig)
    assert error is not None
    assert "an I/O address space" in str(error)
    with pytest.raises(BackendError):
        rig.mapper.add_map(mapping(3, 0))
    rig.mapper.remove_map(PAGE, 2 * PAGE)
    device.answer_all()
    rig.add(mapping(1, 0))
    assert [each[-1] for each in device.answer_all()][-3:] == ["ALLOC_IOAS", "attach", RW]
    assert refusal(rig) is None
    assert not rig.lost


def test_an_ioas_that_nobody_wants_any_more_may_be_refused(rig: Rig, device: Scripted) -> None:
    rig.mapper.reset_domain()
    device.answer_all()
    rig.add(mapping(1, 0))
    (alloc,) = device.asked()
    rig.mapper.reset_domain()
    device.refuse(alloc)
    assert device.answer_all() == []
    assert refusal(rig) is None


def test_a_device_that_does_not_leave_is_cut_off(rig: Rig, device: Scripted) -> None:
    rig.mapper.reset_domain()
    until(device, DETACH)
    rig.settle()
    assert device.gone()
    assert "has not let go of IOAS 1" in str(rig.lost[0])


# -- from one domain to another in one step --


def test_a_device_changes_domains_in_one_step(rig: Rig, device: Scripted) -> None:
    assert rig.mapper.switch([mapping(5, 5), mapping(6, 6)], [])
    assert rig.mapper.mappings() == [mapping(5, 5), mapping(6, 6)]
    assert device.answer_all() == [
        ALLOC,
        (2, "map", 5, 1, 5, RW),
        (2, "map", 6, 1, 6, RW),
        (2, "attach"),
        (1, "destroy"),
    ]
    assert refusal(rig) is None
    rig.add(mapping(7, 7))
    assert device.answer_all() == [(2, "map", 7, 1, 7, RW)]


def test_an_empty_domain_is_entered_in_one_step_too(rig: Rig, device: Scripted) -> None:
    assert rig.mapper.switch([], [])
    assert device.answer_all() == [ALLOC, (2, "attach"), (1, "destroy")]
    assert refusal(rig) is None


@pytest.mark.parametrize("what", [ALLOC, (2, "map", 6, 1, 6, RW), (2, "attach")])
def test_a_switch_that_is_refused_leaves_the_device_where_it_was(
    rig: Rig, device: Scripted, what: tuple[Any, ...]
) -> None:
    there = rig.mapper.attached
    assert rig.mapper.switch([mapping(5, 5), mapping(6, 6)], [])
    until(device, what)
    assert (2, "attach") not in device.answer_all()
    assert refusal(rig) is not None
    assert rig.mapper.attached is there

    assert rig.mapper.switch([mapping(1, 0)], [])  # as the domain does that takes it back
    number = 2 if what == ALLOC else 3
    asked = device.answer_all()
    assert asked[:3] == [ALLOC, (number, "map", 1, 1, 0, RW), (number, "attach")]
    assert sorted(asked[3:]) == [(old, "destroy") for old in range(1, number)]
    assert refusal(rig) is None
    assert rig.mapper.entries() == [mapping(1, 0)]


def test_a_switch_that_is_refused_can_be_undone_by_leaving_everything(
    rig: Rig, device: Scripted
) -> None:
    assert rig.mapper.switch([mapping(5, 5)], [])
    until(device, (2, "attach"))
    assert refusal(rig) is not None
    rig.mapper.reset_domain()
    assert device.answer_all() == [DETACH, (1, "destroy"), (2, "destroy")]
    rig.add(mapping(1, 0))
    assert device.answer_all() == [ALLOC, (3, "attach"), (3, "map", 1, 1, 0, RW)]


def test_an_empty_domain_that_is_refused_is_told(rig: Rig, device: Scripted) -> None:
    assert rig.mapper.switch([], [])
    until(device, (2, "attach"))
    assert refusal(rig) is not None


def test_memory_that_goes_while_a_device_switches_is_gone_in_both(
    rig: Rig, device: Scripted
) -> None:
    assert rig.mapper.switch([mapping(5, 5)], [])
    (alloc,) = device.asked()
    rig.memory.unmap(0, 8 * PAGE)
    device.answer(alloc)
    assert device.answer_all() == [(2, "attach"), (1, "unmap", 1, 1), (1, "destroy")]
    assert rig.mapper.entries() == []
    rig.add_ram(0, 8)
    assert device.answer_all() == [(2, "map", 5, 1, 5, RW)]


def test_memory_that_comes_while_a_device_switches_comes_in_both_or_in_none(
    rig: Rig, device: Scripted
) -> None:
    rig.add(mapping(8, 20))
    device.answer_all()
    rig.settle()
    assert rig.mapper.switch([mapping(5, 20), mapping(6, 0)], [])
    rig.mapper.limit = 3
    with pytest.raises(PeerError):
        rig.add_ram(20, 1)
    assert spaces(rig) == [[mapping(1, 0)], [mapping(6, 0)]]

    rig.mapper.limit = 4
    rig.add_ram(20, 1)
    assert spaces(rig) == [[mapping(1, 0), mapping(8, 20)], [mapping(5, 20), mapping(6, 0)]]
    device.answer_all()
    assert spaces(rig) == [[mapping(5, 20), mapping(6, 0)]]


def spaces(rig: Rig) -> list[list[MappingInfo]]:
    """What the device is told of in each of the spaces that it has."""
    return [host.entries() for host in rig.mapper._hosts.values()]


def test_without_room_for_both_domains_there_is_no_one_step() -> None:
    rig = Rig(limit=2)
    device = rig.script(THEIRS)
    rig.add(mapping(1, 0))
    device.answer_all()
    rig.settle()

    assert not rig.mapper.switch([mapping(5, 5), mapping(6, 6)], [])
    assert device.answer_all() == []
    assert rig.mapper.mappings() == rig.mapper.entries() == [mapping(1, 0)]
    rig.settle()
    assert rig.mapper.switch([mapping(5, 5)], [])
    rig.close()


def test_while_clients_hold_something_there_is_no_one_step(rig: Rig, device: Scripted) -> None:
    with rig.mapper.start_export_session():
        rig.mapper.export(PAGE, 8)
        assert not rig.mapper.switch([mapping(5, 5)], [])
        rig.mapper.release(PAGE, 8)
    assert rig.mapper.switch([mapping(5, 5)], [])
    device.answer_all()


# -- death --


def test_a_successor_gets_a_whole_ioas_before_it_enters_it(rig: Rig, device: Scripted) -> None:
    rig.mapper.switch([mapping(5, 5), mapping(6, 6)], [])
    device.asked()
    device.close()
    rig.turn()
    assert refusal(rig) is None
    assert not rig.mapper.switch([], [])
    rig.add(mapping(7, 7))

    successor = rig.script(THEIRS)
    assert successor.answer_all() == [
        BIND,
        ALLOC,
        (1, "map", 5, 1, 5, RW),
        (1, "map", 6, 1, 6, RW),
        (1, "map", 7, 1, 7, RW),
        (1, "attach"),
    ]
    assert rig.has_given()


def test_a_successor_without_ioas_is_told_by_dma_map_and_the_other_way_round(
    rig: Rig, device: Scripted
) -> None:
    device.close()
    rig.turn()
    successor = rig.script()
    assert successor.answer_all() == [("map", 1, 1, 0, RW)]
    successor.close()
    rig.turn()
    third = rig.script(THEIRS)
    assert third.answer_all()[2:] == [(1, "map", 1, 1, 0, RW), (1, "attach")]


def test_a_successor_that_has_nothing_to_hold_is_in_no_ioas(rig: Rig, device: Scripted) -> None:
    rig.mapper.reset_domain()
    device.close()
    rig.turn()
    assert rig.script(THEIRS).answer_all() == [BIND]


@pytest.mark.parametrize("what", [BIND, ALLOC, (1, "attach")])
def test_a_successor_that_can_not_be_programmed_is_given_up(
    rig: Rig, device: Scripted, what: tuple[Any, ...]
) -> None:
    device.close()
    rig.turn()
    successor = rig.script(THEIRS)
    until(successor, what)
    rig.turn()

    assert successor.gone()
    assert "not a device to go on with" in str(rig.lost[1])
    assert rig.has_given()
    rig.settle()


def test_a_successor_may_refuse_some_of_memory(rig: Rig, device: Scripted) -> None:
    rig.add(mapping(2, 2))
    device.close()
    rig.turn()
    successor = rig.script(THEIRS)
    until(successor, (1, "map", 2, 1, 2, RW))
    assert successor.answer_all() == [(1, "attach")]
    assert rig.mapper.refused_memory == 1


# -- what no other process is given --


class _Device:
    """What a BarFile needs to know of a VFIO device."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("device", os.MFD_CLOEXEC)


def test_the_file_of_a_device_of_the_host_is_not_shared(rig: Rig) -> None:
    device = rig.script()
    host = _Device()
    file = BarFile(host)  # type: ignore[arg-type]
    os.close(host.fd)
    rig.add(mapping(100, 20, 4))
    rig.mapper.map_dma(
        AddressRange(20 * PAGE, 22 * PAGE),
        host_va=None,
        mappable=file,
        file_offset=0,
        writable=True,
        kind=MemoryKind.DEVICE,
    )

    assert device.answer_all() == []
    assert rig.mapper.host.refused_bars == 1
    file.close()
    assert isinstance(rig.mapper._space, DeviceSpace)
    assert not isinstance(rig.mapper._space, IoasSpace)
