from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.backends.passthrough.fake_host import FakeHost
from viommu.domain import IDENTITY, X86_MSI_WINDOW
from viommu.endpoints.host import HostPlace, OpenEndpoint
from viommu.errors import BackendError
from viommu.memory import GuestMemory
from viommu.memory.regions import RegionManager
from viommu.spec import pci, vfio
from viommu.vfio_user import IrqLines
from viommu_backends.passthrough.devices import PassthroughDevices
from viommu_backends.vfio_device import HostIrq

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.backends.passthrough.fake_device import FakeVfioDevice
    from viommu.loop import Loop
    from viommu_backends.passthrough.endpoint import PassthroughEndpoint

ONE = "0000:04:00.0"
CONFIG = vfio.PCI_CONFIG_REGION_INDEX


class Rig:
    def __init__(self, host: FakeHost, loop: Loop, backend: str) -> None:
        self.host = host
        self.loop = loop
        self.regions = RegionManager()
        self.withdrawn = 0
        self._devices = PassthroughDevices()
        place = HostPlace(
            "00:06.0",
            GuestMemory(),
            GuestMemory(),
            self.regions,
            loop,
            self._withdraw,
            lambda _: None,
        )
        options = {"host": host.device(ONE), "backend": backend}
        self.endpoint: PassthroughEndpoint = self._devices.open(place, options)

    @property
    def device(self) -> FakeVfioDevice:
        return self.host.opened[ONE]

    def _withdraw(self) -> None:
        self.withdrawn += 1
        assert self.device.fd >= 0, "whoever is served lets go first"
        self.endpoint.function.disconnect()

    def place(self) -> None:
        function = self.endpoint.function
        function.region_write(CONFIG, pci.BASE_ADDRESS_0 + 12, b"\x08\0\0\0")
        function.region_write(CONFIG, pci.COMMAND, b"\6\0")

    def close(self) -> None:
        self.endpoint.close()
        self._devices.close()
        assert self.regions.regions() == []
        assert self.regions.snapshot()["targets"] == []


@pytest.fixture(params=["type1", "iommufd"])
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    host = FakeHost(tmp_path, monkeypatch)
    host.add(ONE, 7)
    rig = Rig(host, loop, request.param)
    yield rig
    rig.close()


def test_it_is_what_a_machine_expects(rig: Rig) -> None:
    endpoint: OpenEndpoint = rig.endpoint

    assert endpoint.iova_range == (0, 1 << 39)
    assert endpoint.reserved == (X86_MSI_WINDOW,)
    assert endpoint.function is not None
    assert endpoint.function.name == "00:06.0"


def test_a_host_that_names_no_ranges_can_map_everything(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VFIO type1 before Linux 5.4."""
    host = FakeHost(tmp_path, monkeypatch)
    host.add(ONE, 7)
    monkeypatch.setattr("tests.backends.fake_kernel.TYPE1_RANGES", ())
    rig = Rig(host, loop, "type1")

    assert rig.endpoint.iova_range == (0, 1 << 64)
    rig.close()


def test_what_is_said_of_it(rig: Rig) -> None:
    rig.place()
    rig.endpoint.function.reset()
    rig.place()

    assert rig.endpoint.describe() == {
        "host": {
            "address": ONE,
            "group": 7,
            "gone": None,
            "resettable": True,
            "reset pending": False,
            "BARs": {"2": 0x8_0000_0000},
            "mapped by": {"2": ["DMA"]},
        },
        "counters": {"resets": 1, "failed resets": 0},
    }


def test_when_the_host_wants_it_back_everything_is_given_up(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.place()
    rig.endpoint.mapper.add_map(IDENTITY)

    rig.device.signal(vfio.PCI_REQ_IRQ_INDEX, 0)
    rig.loop.turn(0)

    assert rig.withdrawn == 1
    assert rig.device.fd == -1
    assert rig.regions.regions() == []
    assert f"{ONE}: the host wanted it back" in caplog.text
    host = rig.endpoint.describe()["host"]
    assert isinstance(host, dict)
    assert (host["gone"], host["BARs"], host["mapped by"]) == ("the host wanted it back", {}, {})
    # The guest may go on for a while.
    rig.endpoint.mapper.reset_domain()
    rig.endpoint.mapper.add_map(IDENTITY)


def test_a_vmm_that_has_mapped_bars_keeps_them_from_the_host(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    lines = IrqLines([0] * 5)
    rig.endpoint.function.connect(lines)
    rig.place()
    host = rig.endpoint.describe()["host"]
    assert isinstance(host, dict)
    assert host["mapped by"] == {"0": ["VMM"], "2": ["VMM", "DMA"]}

    rig.device.signal(vfio.PCI_REQ_IRQ_INDEX, 0)
    rig.loop.turn(0)

    assert f"{ONE}: in use as long as somebody maps BAR 0 (VMM), BAR 2 (VMM)" in caplog.messages
    assert rig.withdrawn == 1
    assert rig.device.fd == -1
    lines.close()


def test_a_device_is_stopped_and_out_of_reach_before_it_is_closed(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.place()

    rig.endpoint.close()

    assert rig.device.log[-2:] == ["decode not", "close"]
    assert caplog.text == ""


def test_a_closed_device_is_not_asked_for_again(rig: Rig) -> None:
    event = os.dup(rig.device.eventfds[vfio.PCI_REQ_IRQ_INDEX][0])

    rig.endpoint.close()
    os.eventfd_write(event, 1)
    rig.loop.turn(0)

    assert rig.withdrawn == 0
    os.close(event)


def test_a_host_that_can_not_ask_is_not_waited_for(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FakeHost(tmp_path, monkeypatch)
    host.add(ONE, 7)
    without = HostIrq(0, 0)
    monkeypatch.setattr("tests.backends.passthrough.fake_device.REQUEST", without)
    rig = Rig(host, loop, "iommufd")

    assert rig.device.eventfds == {}
    rig.close()


def test_a_device_whose_requests_can_not_be_had_is_not_used(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError(errno.EIO, "interrupts")

    host = FakeHost(tmp_path, monkeypatch)
    host.add(ONE, 7)
    monkeypatch.setattr("tests.backends.passthrough.fake_device.FakeVfioDevice.set_irqs", refuse)

    with pytest.raises(BackendError, match="interrupts"):
        Rig(host, loop, "iommufd")

    assert host.opened[ONE].fd == -1
