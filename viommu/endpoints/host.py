"""What an endpoint is to the machine, and how one that is a device of the host gets there.

A backend package offers kinds of such endpoints as entry points of the group
:data:`ENTRY_POINTS`: each is a :class:`HostKind`, and its name is that of the kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from viommu.domain import ReservedRegion
    from viommu.endpoints.registry import Option
    from viommu.errors import TranslationFault
    from viommu.loop import Loop
    from viommu.mapper import MemoryMapper
    from viommu.memory import GuestMemory
    from viommu.memory.regions import RegionManager
    from viommu.vfio_user import ServedDevice

__all__ = ["ENTRY_POINTS", "HostDevices", "HostKind", "HostPlace", "OpenEndpoint"]

ENTRY_POINTS: Final = "viommu.backends"


class HostPlace(NamedTuple):
    """Where a device of the host goes.

    ``name`` is what messages call it, ``memory`` what its own VMM connection shares,
    ``guest`` the memory of its guest, as we read and write it, and ``regions`` the same
    as devices reach it, where its BARs go as well. It calls ``withdrawn`` when the host
    wants it back: then it is served to nobody any more. It calls ``report`` when its
    DMA was blocked here.
    """

    name: str
    memory: GuestMemory
    guest: GuestMemory
    regions: RegionManager
    loop: Loop
    withdrawn: Callable[[], None]
    report: Callable[[TranslationFault], None]


class OpenEndpoint(Protocol):
    """An endpoint that is ready: what is served, and what its DMA goes through."""

    @property
    def backend(self) -> str:
        """What translates its DMA, for people; and why that, where it was not asked for."""

    @property
    def mapper(self) -> MemoryMapper:
        """What the guest's mappings go to; endpoints that can't be told apart share it."""

    @property
    def reserved(self) -> Sequence[ReservedRegion]:
        """IOVAs that the guest must not use."""

    @property
    def iova_range(self) -> tuple[int, int]:
        """The first IOVA that can be mapped, and the one behind the last."""

    @property
    def function(self) -> ServedDevice | None:
        """What is served; ``None`` if the device is somebody else's, and only its DMA is ours."""

    def describe(self) -> dict[str, object]:
        """Return its state, ready for JSON: ``counters``, and what else there is to say."""

    def close(self) -> None:
        """Let go of everything; closing twice is harmless."""


class HostDevices(Protocol):
    """The devices of one kind that one machine uses, and what they share."""

    def open(self, place: HostPlace, options: Mapping[str, Any]) -> OpenEndpoint:
        """Open a device.

        Raises:
            UsageError: The options ask for what can't be.
            BackendError: The host refused.
        """

    def close(self) -> None:
        """Close what is shared; every endpoint is closed before."""


class HostKind(NamedTuple):
    """A kind of endpoints that are devices of the host. ``start`` is called for each machine."""

    help: str
    options: Mapping[str, Option]
    start: Callable[[], HostDevices]
