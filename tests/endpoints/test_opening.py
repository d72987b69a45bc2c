from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.endpoints import host_kind
from viommu.endpoints import opening
from viommu.endpoints.emulated import EmulatedEndpoint
from viommu.endpoints.external import ExternalEndpoint
from viommu.endpoints.opening import EndpointPlace, has_function, open_endpoint
from viommu.endpoints.own_process import OwnProcessEndpoint
from viommu.errors import UsageError
from viommu.loop import Loop
from viommu.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from viommu.endpoints.host import HostKind


@pytest.fixture
def place(tmp_path: Path) -> Iterator[EndpointPlace]:
    loop = Loop()
    yield EndpointPlace("00:09.0", 0x1000, GuestMemory(), print, tmp_path / "door", loop)
    loop.close()


@pytest.mark.parametrize(
    ("description", "kind", "backend"),
    [
        ("edu", EmulatedEndpoint, "in this process"),
        ("edu,process=own", OwnProcessEndpoint, "its own; to have it let go: kill it after 8 s"),
        (
            "edu,hold=7,process=own,hold-limit=2,hold-policy=wait",
            OwnProcessEndpoint,
            "its own; to have it let go: wait on, and log it every 2 s",
        ),
        ("external", ExternalEndpoint, "door; to have it let go: wait on, and log it every 8 s"),
        ("external,hold-limit=1.5,hold-policy=kill", ExternalEndpoint, "kill it after 1.5 s"),
    ],
)
def test_an_endpoint_is_where_its_description_says(
    place: EndpointPlace, description: str, kind: type, backend: str
) -> None:
    endpoint = open_endpoint(description, place)

    assert isinstance(endpoint, kind)
    assert backend in endpoint.backend
    assert endpoint.mapper.get_mask() == 0x1000
    assert has_function(description) is (endpoint.function is not None)
    endpoint.close()


def test_a_door_may_be_elsewhere(place: EndpointPlace, tmp_path: Path) -> None:
    endpoint = open_endpoint(f"external,socket={tmp_path}/other", place)

    assert (tmp_path / "other").is_socket()
    assert not place.door.exists()
    endpoint.close()


def test_a_device_of_the_host_is_opened_elsewhere(
    place: EndpointPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_kind(name: str) -> HostKind:
        assert name == "dev"
        return host_kind.KIND

    monkeypatch.setattr(opening, "find_kind", find_kind)
    monkeypatch.setattr(opening, "parse_endpoint", lambda _: ("dev", {}))
    assert has_function("dev")
    with pytest.raises(UsageError, match="a device of the host"):
        open_endpoint("dev", place)
