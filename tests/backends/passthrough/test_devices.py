from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from tests.backends.passthrough.fake_host import FakeHost
from viommu.endpoints.host import HostPlace
from viommu.errors import BackendError, UsageError
from viommu.memory import GuestMemory
from viommu.memory.regions import RegionManager
from viommu_backends.passthrough.devices import PassthroughDevices

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from viommu.loop import Loop
    from viommu_backends.passthrough.endpoint import PassthroughEndpoint

ONE, MATE, OTHER = "0000:04:00.0", "0000:04:00.1", "0000:05:00.0"


class Rig:
    def __init__(self, host: FakeHost, loop: Loop) -> None:
        self.host = host
        self.regions = RegionManager()
        self.devices = PassthroughDevices()
        self._loop = loop
        self._open: list[PassthroughEndpoint] = []

    def open(self, address: str, backend: str | None = None) -> PassthroughEndpoint:
        place = HostPlace(
            "00:06.0",
            GuestMemory(),
            GuestMemory(),
            self.regions,
            self._loop,
            lambda: None,
            lambda _: None,
        )
        options: dict[str, Any] = {"host": self.host.device(address)}
        if backend:
            options["backend"] = backend
        endpoint = self.devices.open(place, options)
        self._open.append(endpoint)
        return endpoint

    def close(self) -> None:
        for endpoint in self._open:
            endpoint.close()
        self.devices.close()
        self.devices.close()
        assert all(container.closed for container in self.host.containers)
        assert all(context.spaces == {} for context in self.host.contexts)


@pytest.fixture
def rig(tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    host = FakeHost(tmp_path, monkeypatch)
    host.add(ONE, 7)
    host.add(MATE, 7)
    host.add(OTHER, 8)
    rig = Rig(host, loop)
    yield rig
    rig.close()


def test_the_default_is_iommufd_once_for_all(rig: Rig) -> None:
    one, other = rig.open(ONE), rig.open(OTHER)

    assert one.backend == other.backend == "iommufd"
    assert len(rig.host.contexts) == 1
    assert one.mapper is not other.mapper


def test_type1_is_there_to_be_asked_for(rig: Rig) -> None:
    assert rig.open(ONE, "type1").backend == "VFIO type1"
    assert rig.open(OTHER, "iommufd").backend == "iommufd"
    assert len(rig.host.containers) == 1


def test_a_host_without_iommufd_gets_type1_and_says_why(rig: Rig) -> None:
    rig.host.no_iommufd = errno.ENOENT

    said = rig.open(ONE).backend

    assert said == (
        "VFIO type1, because iommufd is out of reach: "
        "can't open /dev/iommu: No such file or directory"
    )
    with pytest.raises(BackendError, match="/dev/iommu"):
        rig.open(OTHER, "iommufd")


def test_a_kernel_without_device_files_gets_type1_and_says_why(rig: Rig) -> None:
    rig.host.add("0000:06:00.0", 9, cdev=False)

    assert "0000:06:00.0 has no file in /dev/vfio/devices" in rig.open("0000:06:00.0").backend


def test_devices_of_a_group_share_its_mapper(rig: Rig) -> None:
    one, mate = rig.open(ONE, "type1"), rig.open(MATE)

    assert one.mapper is mate.mapper
    assert mate.backend == "VFIO type1"
    assert one.reserved == mate.reserved


def test_devices_of_a_group_can_not_have_different_backends(rig: Rig) -> None:
    rig.open(ONE, "type1")

    with pytest.raises(UsageError, match=r"0000:04:00\.1 can't have backend=iommufd: .*group 7"):
        rig.open(MATE, "iommufd")


def test_a_group_that_was_closed_can_be_opened_again_otherwise(rig: Rig) -> None:
    rig.open(ONE, "type1").close()

    assert rig.open(ONE, "iommufd").backend == "iommufd"


def test_a_device_that_another_driver_has_is_refused_with_what_to_do(rig: Rig) -> None:
    rig.host.add("0000:06:00.0", 9, driver="nvme")

    with pytest.raises(BackendError, match=r"driven by nvme, .*driver_override"):
        rig.open("0000:06:00.0")


def test_a_device_that_can_not_be_used_is_closed_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError(errno.EIO, "function")

    monkeypatch.setattr("viommu_backends.passthrough.endpoint.PassthroughFunction", refuse)

    with pytest.raises(BackendError, match="function"):
        rig.open(ONE)

    assert rig.host.log == [f"close {ONE}"]
