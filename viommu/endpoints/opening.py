"""From the description of an endpoint to an endpoint that is ready, wherever it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from viommu.endpoints.emulated import EmulatedEndpoint
from viommu.endpoints.external import ExternalEndpoint
from viommu.endpoints.host import HostKind
from viommu.endpoints.own_process import OwnProcessEndpoint
from viommu.endpoints.registry import find_kind, parse_endpoint, running, without_common
from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.endpoints.host import OpenEndpoint
    from viommu.errors import TranslationFault
    from viommu.loop import Loop
    from viommu.memory import GuestMemory

__all__ = ["EndpointPlace", "has_function", "open_endpoint"]


class EndpointPlace(NamedTuple):
    """Where an endpoint goes that is no device of the host.

    ``name`` is what messages call it, ``page_sizes`` what its guest may map, ``memory`` its
    guest's as the IOMMU knows it. ``report`` takes blocked accesses to the guest. ``door``
    is where clients of its export sessions connect, if it has a door.
    """

    name: str
    page_sizes: int
    memory: GuestMemory
    report: Callable[[TranslationFault], None]
    door: Path
    loop: Loop


def open_endpoint(description: str, place: EndpointPlace) -> OpenEndpoint:
    """Open an endpoint; the loop of one with a process of its own must not be running yet.

    Raises:
        UsageError: The description is wrong, or a file that it names can't be used; or it
            is of a device of the host.
        BackendError: The host lets us start no process.
    """
    called, options = parse_endpoint(description)
    kind = find_kind(called)
    if isinstance(kind, HostKind):
        raise UsageError(f"{called} is a device of the host, which is opened elsewhere")
    own, policy = running(description)
    if kind.make is None:
        return ExternalEndpoint(
            place.name,
            options.get("socket", place.door),
            place.memory,
            place.page_sizes,
            place.report,
            loop=place.loop,
            policy=policy,
        )
    if own:
        return OwnProcessEndpoint(
            without_common(description),
            place.name,
            place.page_sizes,
            place.report,
            place.loop,
            policy=policy,
        )
    return EmulatedEndpoint(description, place.name, place.page_sizes, place.report, place.loop)


def has_function(description: str) -> bool:
    """Return whether a VMM gets a device from us for this endpoint.

    Raises:
        UsageError: The description is wrong.
    """
    kind = find_kind(parse_endpoint(description)[0])
    return isinstance(kind, HostKind) or kind.make is not None
