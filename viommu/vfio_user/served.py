"""What the server asks of a device; it knows nothing of PCI or virtio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from viommu.deferred import Deferred
    from viommu.memory import GuestMemory
    from viommu.vfio_user.irqs import IrqLines

__all__ = ["IrqInfo", "RegionInfo", "ServedDevice"]


class RegionInfo(NamedTuple):
    """One region (BAR, ROM, configuration space).

    ``size`` in bytes, 0 for a region that isn't there; ``flags`` are
    ``VFIO_REGION_INFO_FLAG_*``. A region that clients may map has a file ``fd``,
    which stays the device's, begins at ``offset`` in it, and is mappable in
    ``areas`` of (offset in the region, size), or as a whole when there are none.
    """

    size: int
    flags: int
    fd: int | None = None
    offset: int = 0
    areas: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """One kind of interrupt: how many vectors, and ``VFIO_IRQ_INFO_*`` flags."""

    count: int
    flags: int


class ServedDevice(Protocol):
    """A device behind a :class:`~viommu.vfio_user.server.Server`.

    The server calls from its loop's thread and never during another call. An
    access that the device refuses is a :exc:`~viommu.errors.ViommuError`; the
    client sees an errno. What :meth:`region_info` and :meth:`irq_info` answer
    must not change while a client is connected.

    A device that has to ask somebody else answers later: with a
    :class:`~viommu.deferred.Deferred`. Until that is done the server takes nothing
    further from this client, except behind a posted write, and serves everybody
    else. The client may leave meanwhile; the result is dropped then.
    """

    @property
    def name(self) -> str:
        """What messages call the device."""

    @property
    def memory(self) -> GuestMemory:
        """Where the server puts the client's memory."""

    @property
    def num_regions(self) -> int:
        """How many regions there are; 9 for a PCI device."""

    @property
    def num_irqs(self) -> int:
        """How many kinds of interrupt there are; 5 for a PCI device."""

    def region_info(self, index: int) -> RegionInfo:
        """Describe region ``index``, which is below ``num_regions``."""

    def irq_info(self, index: int) -> IrqInfo:
        """Describe interrupts of kind ``index``, which is below ``num_irqs``."""

    def region_read(self, index: int, offset: int, count: int) -> bytes | Deferred[bytes]:
        """Return exactly ``count`` bytes, at least one, that lie in the region."""

    def region_write(self, index: int, offset: int, data: bytes) -> Deferred[None] | None:
        """Store ``data``, at least one byte, which lies in the region."""

    def connect(self, irqs: IrqLines) -> None:
        """Serve a client that has just come; its interrupts are raised through ``irqs``."""

    def disconnect(self) -> None:
        """Be as after power-on: the client has gone, and its memory goes after this call."""

    def reset(self) -> Deferred[None] | None:
        """Perform a system reset; memory and interrupts stay."""
