"""An endpoint without a device of ours: a door for whoever emulates it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import PAGE, RW, make_memory
from viommu.endpoints.external import ExternalEndpoint
from viommu.errors import TranslationFault
from viommu.ipc.client import ExportClient
from viommu.ipc.hold import HoldPolicy
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory import MappedFiles
from viommu.testing.serving import LoopThread

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from viommu.endpoints.host import OpenEndpoint


class House:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = Loop()
        self.memory = make_memory(MappedFiles(), 0)
        self.faults: list[TranslationFault] = []
        self.endpoint = ExternalEndpoint(
            "00:09.0",
            path,
            self.memory,
            0x1000,
            self.faults.append,
            loop=self.loop,
            policy=HoldPolicy(3),
        )

    def close(self) -> None:
        self.endpoint.close()
        self.endpoint.close()
        self.memory.close()
        self.loop.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "door")
    yield house
    house.close()


def test_it_is_an_endpoint_of_a_machine(house: House) -> None:
    endpoint: OpenEndpoint = house.endpoint

    assert endpoint.function is None
    assert endpoint.mapper.get_mask() == 0x1000
    assert endpoint.iova_range == (0, 1 << 64)
    assert endpoint.backend == (
        f"export session of whoever uses {house.path};"
        " to have it let go: wait on, and log it every 3 s"
    )
    assert house.path.is_socket()


def test_whoever_connects_reaches_what_the_guest_mapped(house: House) -> None:
    house.endpoint.mapper.add_map(MappingInfo(0x10000, 0x4000, PAGE, RW))
    with LoopThread(house.loop) as thread:
        with ExportClient(house.path) as client, client.start_export_session():
            (region,) = client.export(0x10000, 16)
            client.memory.write(region.gpa, b"from elsewhere")
            with pytest.raises(TranslationFault) as caught:
                client.export(0x20000, 1)
            client.report_fault(TranslationFault(caught.value.iova, RW))
            client.refresh_memory()  # by then it has been handled
            state = thread.call(house.endpoint.describe)
        thread.call(lambda: None)
    assert house.memory.read(0x4000, 14) == b"from elsewhere"
    assert [fault.iova for fault in house.faults] == [0x20000]
    assert (state["session"], state["held"]) == ("active", [[0x10000, 16, 1]])
    counters = state["counters"]
    assert isinstance(counters, dict)
    assert (counters["exports"], counters["fault reports"]) == (1, 1)


def test_the_door_goes_with_the_endpoint(house: House) -> None:
    house.endpoint.close()

    assert not house.path.exists()
