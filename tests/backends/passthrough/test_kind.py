from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pytest

from tests.backends.passthrough.fake_host import FakeHost
from viommu.endpoints import registry
from viommu.endpoints.host import HostDevices, HostKind
from viommu.endpoints.registry import parse_endpoint
from viommu.errors import UsageError
from viommu_backends.host_device import HostDevice
from viommu_backends.passthrough import VFIO

if TYPE_CHECKING:
    from pathlib import Path

ONE = "0000:04:00.0"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with one device, and our kind of endpoint installed."""
    FakeHost(tmp_path, monkeypatch).add(ONE, 7)
    monkeypatch.setattr(HostDevice.parse.__func__, "__defaults__", (tmp_path,))  # type: ignore[attr-defined] # a class method has one
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [EntryPoint("vfio", "viommu_backends.passthrough:VFIO", group)],
    )


def test_the_kind_starts_devices() -> None:
    devices: HostDevices = VFIO.start()

    assert isinstance(VFIO, HostKind)
    devices.close()


@pytest.mark.parametrize("backend", ["iommufd", "type1"])
def test_a_description_names_device_and_backend(backend: str) -> None:
    kind, options = parse_endpoint(f"vfio,host={ONE},backend={backend}")

    assert kind == "vfio"
    assert isinstance(options["host"], HostDevice)
    assert (options["host"].address, options["backend"]) == (ONE, backend)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("vfio", r"vfio needs host=\.\.\."),
        ("vfio,host=04:00.0", "write 0000:04:00.0"),
        ("vfio,host=0000:99:00.0", "no PCI device 0000:99:00.0"),
        (f"vfio,host={ONE},backend=vhost", "expected iommufd or type1"),
    ],
)
def test_mistakes_are_explained(description: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_endpoint(description)
