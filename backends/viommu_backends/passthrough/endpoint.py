"""One device of the host as an endpoint, until the host wants it back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.events import Event
from viommu.spec import vfio
from viommu_backends.passthrough.function import PassthroughFunction

if TYPE_CHECKING:
    from viommu.endpoints.host import HostPlace
    from viommu_backends.host_device import HostDevice
    from viommu_backends.passthrough.groups import Group
    from viommu_backends.passthrough.mapper import GroupMapper
    from viommu_backends.vfio_device import VfioDevice

__all__ = ["PassthroughEndpoint"]

_log: Final = logging.getLogger(__name__)

_ASSIGN: Final = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER


class PassthroughEndpoint:
    """Implements :class:`~viommu.endpoints.host.OpenEndpoint`; ``device`` is closed with it.

    When the host wants the device back (a driver is to have it, or it is to be
    unplugged) everything is given up at once: the host waits for that.

    Raises:
        BackendError: The device can't be used.
    """

    def __init__(
        self, place: HostPlace, host: HostDevice, group: Group, device: VfioDevice, backend: str
    ) -> None:
        self.backend = backend
        self.mapper: GroupMapper = group.mapper
        self.reserved = group.reserved
        self.iova_range = _span(group.ranges)
        self._place = place
        self._host = host
        self._group_number = host.group
        self._group = group
        self._device: VfioDevice | None = device
        self._gone = ""
        self.function = PassthroughFunction(
            place.name, place.memory, device, place.regions, place.loop
        )
        self._request = Event()
        try:
            self._await_request(device)
        except BaseException:
            self.function.close()
            self._request.close()
            raise

    def describe(self) -> dict[str, object]:
        """Return its state, ready for JSON."""
        function, device = self.function, self._device
        return {
            "host": {
                "address": self._host.address,
                "group": self._group_number,
                "gone": self._gone or None,
                "resettable": device is not None and device.can_reset,
                "reset pending": function.resetting.pending,
                "BARs": {str(bar): address for bar, address in function.bars.placed.items()},
                "mapped by": function.areas.holders(),
            },
            "counters": {
                "resets": function.resetting.resets,
                "failed resets": function.resetting.failed,
            },
        }

    def close(self) -> None:
        """Give the device back to the host; closing twice is harmless."""
        device, self._device = self._device, None
        if device is None:
            return
        self._place.loop.forget(self._request)
        self.function.close()
        self._group.leave(device)
        self._request.close()

    def _await_request(self, device: VfioDevice) -> None:
        self._place.loop.on_readable(self._request, self._requested)
        index = vfio.PCI_REQ_IRQ_INDEX
        if device.irqs[index].count:
            device.set_irqs(_ASSIGN, index, 0, 1, [self._request.fileno()])

    def _requested(self) -> None:
        self._request.clear()
        self._gone = "the host wanted it back"
        _log.warning("%s: %s: it is given up", self._host.address, self._gone)
        # Before the VMM is thrown out: what it has mapped then, it keeps for a while.
        self.function.close()
        self._place.withdrawn()
        self.close()


def _span(ranges: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    if not ranges:
        return 0, 1 << 64
    return min(start for start, _ in ranges), max(end for _, end in ranges)
