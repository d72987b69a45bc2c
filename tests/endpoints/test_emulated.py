from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from viommu.endpoints.emulated import EmulatedEndpoint
from viommu.errors import Access, TranslationFault, UsageError
from viommu.loop import Loop
from viommu.mapper import MappingInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.endpoints.host import OpenEndpoint


class Rig:
    def __init__(self) -> None:
        self.loop = Loop()
        self.faults: list[TranslationFault] = []
        self.endpoint = EmulatedEndpoint("edu", "00:06.0", 0x1000, self.faults.append, self.loop)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.endpoint.close()
    rig.loop.close()


def test_it_is_an_endpoint_of_a_machine(rig: Rig) -> None:
    endpoint: OpenEndpoint = rig.endpoint

    assert endpoint.mapper.get_mask() == 0x1000
    assert endpoint.function is not None
    assert endpoint.function.name == "00:06.0"
    assert endpoint.iova_range == (0, 1 << 64)
    assert "process" in endpoint.backend


def test_its_dma_goes_through_its_mapper_and_faults_are_reported(rig: Rig) -> None:
    dma = rig.endpoint.dma
    dma.enabled = True
    rig.endpoint.mapper.add_map(MappingInfo(0x1000, 0, 0x1000, Access.READ))

    with dma.export(0x1000, 0x10, Access.READ):
        state = rig.endpoint.describe()
    with pytest.raises(TranslationFault):
        dma.export(0x3000, 0x10, Access.READ)

    assert (state["session"], state["held"]) == ("active", [[0x1000, 0x10, 1]])
    assert [fault.iova for fault in rig.faults] == [0x3000]
    assert rig.endpoint.describe()["counters"] == {"blocked accesses": 1, "IOMMU faults": 0}


def test_a_wrong_description_makes_nothing() -> None:
    loop = Loop()
    with pytest.raises(UsageError, match="speed"):
        EmulatedEndpoint("edu,speed=1", "00:06.0", 0x1000, lambda _: None, loop)
    loop.close()
