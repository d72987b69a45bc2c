from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

import pytest

from tests.backends.passthrough.fake_host import FakeHost
from viommu.domain import IDENTITY, X86_MSI_WINDOW
from viommu.errors import BackendError
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import AddressRange
from viommu.memory.regions import RegionManager
from viommu_backends.iommufd_memory import IommufdMemory
from viommu_backends.passthrough.groups import Group, IommufdGroup, Type1Group

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from viommu_backends.iommufd_context import Iommufd

ONE, TWO = "0000:04:00.0", "0000:04:00.1"
APERTURE = 1 << 39


def _file(size: int) -> FileBacking:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    backing = FileBacking(fd)
    os.close(fd)
    return backing


class Rig:
    """A host with two devices in one group, and a page of guest memory."""

    def __init__(self, host: FakeHost, backend: str) -> None:
        self.host = host
        host.add(ONE, 7)
        host.add(TWO, 7)
        self.regions = RegionManager()
        ram = self.regions.add_region("RAM", AddressRange(0, 0x1000))
        self.regions.add_mapping(ram, AddressRange(0, 0x1000), _file(0x1000))
        self.regions.enable(ram)
        self._ram = ram
        self.backend = backend
        self._context = host.context()
        context = cast("Iommufd", self._context)
        self._memory = IommufdMemory(context, self.regions.register)

    def group(self) -> Group:
        if self.backend == "type1":
            return Type1Group(self.host.device(ONE), self.regions)
        return IommufdGroup(self.host.device(ONE), self._memory)

    def entries(self) -> list[int]:
        """The IOVAs that the host's IOMMU holds, wherever."""
        tables = [
            *(container.entries for container in self.host.containers),
            *(
                space.entries
                for number, space in self._context.spaces.items()
                if number != self._memory.ioas
            ),
        ]
        return sorted(iova for table in tables for iova in table)

    def close(self) -> None:
        self._memory.close()
        assert self._context.spaces == {}
        assert all(container.closed for container in self.host.containers)
        assert self.regions.snapshot()["targets"] == []
        self.regions.remove_region(self._ram)


@pytest.fixture(params=["type1", "iommufd"])
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    rig = Rig(FakeHost(tmp_path, monkeypatch), request.param)
    yield rig
    rig.close()


def test_a_group_lives_from_its_first_device_to_its_last(rig: Rig) -> None:
    group = rig.group()
    one, two = (group.open(rig.host.device(address)) for address in (ONE, TWO))
    empty = [group.empty]
    for device in (one, two):
        assert "close container of group 7" not in rig.host.log
        group.leave(device)
        empty.append(group.empty)

    assert empty == [False, False, True]
    assert [line for line in rig.host.log if line.startswith("close 0000")] == [
        f"close {ONE}", f"close {TWO}",
    ]  # fmt: skip


def test_a_group_says_what_its_guest_may_use(rig: Rig) -> None:
    group = rig.group()
    device = group.open(rig.host.device(ONE))

    assert max(end for _, end in group.ranges) == APERTURE
    assert group.reserved == (X86_MSI_WINDOW,)
    group.leave(device)


def test_bypass_is_guest_memory_for_every_device(rig: Rig) -> None:
    group = rig.group()
    one = group.open(rig.host.device(ONE))
    group.mapper.add_map(IDENTITY)
    assert rig.entries() == [0]

    two = group.open(rig.host.device(TWO))

    if rig.backend == "iommufd":
        assert rig.host.opened[TWO].ioas == rig.host.opened[ONE].ioas is not None
    group.leave(one)
    assert rig.entries() == [0]
    group.leave(two)


def test_a_group_that_is_gone_maps_nothing(rig: Rig) -> None:
    group = rig.group()
    device = group.open(rig.host.device(ONE))
    group.mapper.add_map(IDENTITY)

    group.leave(device)
    group.mapper.add_map(IDENTITY)

    assert not any(container.entries for container in rig.host.containers if not container.closed)


def test_a_device_that_can_not_be_opened_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError(errno.EBUSY, "device")

    group = rig.group()
    name = "VfioDevice" if rig.backend == "type1" else "open_cdev"
    monkeypatch.setattr(f"viommu_backends.passthrough.groups.{name}", refuse)
    with pytest.raises(BackendError, match="device"):
        group.open(rig.host.device(ONE))

    assert group.empty


def test_a_group_whose_reserved_regions_are_unknown_is_not_used(rig: Rig) -> None:
    (rig.host.sysfs / "kernel/iommu_groups/7/reserved_regions").unlink()

    with pytest.raises(BackendError, match="reserved_regions"):
        rig.group().open(rig.host.device(ONE))


def test_a_host_that_refuses_to_let_go_is_left_all_the_same(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left ends with the process: nobody can do more."""
    group = rig.group()
    device = group.open(rig.host.device(ONE))
    group.mapper.add_map(IDENTITY)

    def refuse(*_: object) -> None:
        raise BackendError(errno.EBUSY, "not now")

    with monkeypatch.context() as busy:
        if rig.backend == "type1":
            busy.setattr(rig.host.containers[0], "unmap", refuse)
            busy.setattr(rig.host.containers[0], "close", refuse)
        else:
            busy.setattr(device, "detach", refuse)
            device_close = rig.host.opened[ONE].close
            busy.setattr(device, "close", lambda: None)
        group.leave(device)

    assert group.empty
    assert "not now" in caplog.text
    # Now it may: nothing was forgotten.
    if rig.backend == "type1":
        rig.regions.retry()
        rig.host.containers[0].close()
    else:
        device_close()
        assert isinstance(group, IommufdGroup)
        group._inner.reset_domain()


def test_a_group_that_is_in_use_is_told_at_once(rig: Rig) -> None:
    rig.host.busy_groups.add(7)
    rig.host.refuse_attach = errno.EBUSY

    with pytest.raises(BackendError, match=r"group 7|attach"):
        rig.group().open(rig.host.device(ONE))
