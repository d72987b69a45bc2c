"""A kind of host devices as another package would offer it: an edu with an IOMMU of few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from viommu.basic import BasicMemoryMapper
from viommu.domain import X86_MSI_WINDOW
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.host import HostKind, HostPlace
from viommu.endpoints.registry import Option
from viommu.errors import BackendError, UsageError
from viommu.memory.dma_target import AddressRange, MemoryKind

if TYPE_CHECKING:
    from collections.abc import Mapping

LOG: list[str] = []
OPENED: list[FakeEndpoint] = []


class FakeEndpoint:
    backend = "a host's IOMMU"
    reserved = (X86_MSI_WINDOW,)

    def __init__(self, place: HostPlace, bits: int, mapper: BasicMemoryMapper) -> None:
        self.place = place
        self.iova_range = (0, 1 << bits)
        self.mapper = mapper
        dma = EndpointDma(mapper, place.memory, lambda _: None, place.loop)
        self.function = EduFunction(place.name, place.memory, dma, place.loop)
        bar = AddressRange(0xFE000000, 0xFE100000)
        self.bar = place.regions.add_region(f"BAR of {place.name}", bar, MemoryKind.DEVICE)

    def describe(self) -> dict[str, object]:
        return {"counters": {"resets": 0}}

    def close(self) -> None:
        LOG.append(f"close {self.place.name}")
        self.place.regions.remove_region(self.bar)


class FakeDevices:
    def __init__(self) -> None:
        LOG.append("start")
        self._mappers: dict[int, BasicMemoryMapper] = {}

    def open(self, place: HostPlace, options: Mapping[str, Any]) -> FakeEndpoint:
        LOG.append(f"open {place.name}")
        if options["bits"] == 13:
            raise BackendError(19, "no such device")
        group = options.get("group", len(self._mappers))
        mapper = self._mappers.setdefault(group, BasicMemoryMapper())
        OPENED.append(FakeEndpoint(place, options["bits"], mapper))
        return OPENED[-1]

    def close(self) -> None:
        LOG.append("end")


def _number(value: str) -> int:
    if not value.isdecimal():
        raise UsageError("expected a number")
    return int(value)


KIND = HostKind(
    "a device of a host",
    {
        "bits": Option(_number, "how many bits its IOVAs have", required=True),
        "group": Option(_number, "devices of one group can't be told apart"),
    },
    FakeDevices,
)
NO_KIND = "no kind"
