"""Who accompanies a device in another process: told of it, between, or in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from viommu.deferred import Deferred
    from viommu.errors import PeerError
    from viommu.vfio_user import IrqLines
    from viommu.vfio_user.loop_client import LoopClient

__all__ = ["AccessFilter", "Afterlife", "LinkWatcher"]


class LinkWatcher(Protocol):
    """The mapper's side of a connection: it holds the device's address space."""

    def connected(self, client: LoopClient) -> Deferred[None] | None:
        """Give the device its mappings: it is there, again, and has none.

        It is not let work before the result is there, if there is one. Who can't go on
        with the device, now or later, gives up ``client``.
        """

    def lost(self, why: PeerError) -> None:
        """Forget the device: it holds nothing any more, and answers nothing."""

    def bus_master(self, *, enabled: bool) -> None:
        """Follow COMMAND.BUS_MASTER as the guest wrote it; it is off after a reset."""


class AccessFilter(Protocol):
    """Stands between a device and its driver, and may show each something else.

    It must not raise for what either of them does.
    """

    def follow(self, config: bytes) -> None:
        """Get to know the device by the first 256 bytes of its configuration space."""

    def seen(self, region: int, offset: int, data: bytes) -> bytes:
        """Return what the driver sees of what the device answered to a read of a BAR."""

    def passed(self, region: int, offset: int, data: bytes) -> bytes:
        """Return what the device gets of what the driver writes to a BAR; as many bytes."""


class Afterlife(Protocol):
    """Knows a kind of device, follows its driver, and stands in when the device has died.

    It must not raise for what a guest does.
    """

    def follow(self, config: bytes) -> None:
        """Get to know the device by the first 256 bytes of its configuration space."""

    def wrote(self, region: int, offset: int, data: bytes) -> bool:
        """Follow a write to a BAR, dead or alive; return whether it resets the device."""

    def answered(self, region: int, offset: int, data: bytes) -> None:
        """Follow what the device answered to a read of a BAR."""

    def read(self, region: int, offset: int, count: int) -> bytes | None:
        """Answer a read in place of the dead device; ``None`` for all ones."""

    def bus_master(self, *, enabled: bool) -> None:
        """Follow COMMAND.BUS_MASTER."""

    def died(self, lines: IrqLines | None) -> None:
        """Stand in from now on; ``lines`` are the client's interrupts, if there is one."""

    def reset(self) -> None:
        """Forget the driver: the function was reset, dead or alive."""

    def stayed_dead(self) -> None:
        """The device was reset, and did not come back."""

    def revived(self) -> None:
        """The device is back, reset."""

    def close(self) -> None:
        """Do nothing any more."""
