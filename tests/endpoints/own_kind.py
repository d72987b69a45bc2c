"""A kind of endpoint as somebody else would write it: an edu that holds on for a moment."""

from __future__ import annotations

from viommu.endpoints import EduFunction, EndpointKind

KIND = EndpointKind(
    "an edu that holds on",
    {},
    lambda place, _: EduFunction(place.name, place.memory, place.dma, place.loop, hold_ms=7),
)
NO_KIND = "no kind"
