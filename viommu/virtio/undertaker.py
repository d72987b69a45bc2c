"""What a virtio device leaves when its process dies: a driver that must not wait for ever.

Linux waits without a time-out in three places: for requests of a disk, for the
status to become 0 after a reset, and for a queue's reset. All ones, which is what a
bus answers for a device that is gone, would keep it there. So while the device is
dead its status is the driver's last one with DEVICE_NEEDS_RESET, and 0 once the
driver has reset it; the driver is told by a configuration change; and the requests
of a disk end with an I/O error. Drivers of other devices get nothing back.

Source: virtio 1.2, 2.1.2 "Device Requirements: Device Status Field", 4.1.4
"Virtio Structure PCI Capabilities", 5.2.6 "Device Operation" of the block device;
Linux, ``drivers/virtio/virtio_pci_modern*.c`` and ``drivers/block/virtio_blk.c``.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from viommu.errors import RingError
from viommu.pci.layout import overlay
from viommu.spec import vfio
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import STATUS_DEVICE_NEEDS_RESET, STATUS_DRIVER_OK, Feature
from viommu.virtio.driver_registers import DriverRegisters, FollowedQueue
from viommu.virtio.orphaned_queue import OrphanedQueue
from viommu.virtio.ring import SplitQueue
from viommu.virtio.ring_memory import RingMemory
from viommu.virtio.structures import Structure, find_virtio, is_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.loop import Loop, Timer
    from viommu.vfio_user import IrqLines

__all__ = ["EstateMemory", "Undertaker"]

_log: Final = logging.getLogger(__name__)

_LAYOUT: Any = spec.CommonCfg
_STATUS: Final[int] = _LAYOUT.device_status.offset
_QUEUE_ENABLE: Final[int] = _LAYOUT.queue_enable.offset
_QUEUE_RESET: Final[int] = _LAYOUT.queue_reset.offset

_MAX_CONFIG: Final = 4096  # bytes of device configuration that are remembered
_BUDGET: Final = 64  # requests of a queue ended in one turn of the loop
_PATROL: Final = 0.5  # seconds; a kick in a page that the VMM maps is seen by nobody


class EstateMemory(RingMemory, Protocol):
    """The dead device's memory: what its guest lets it reach, and no more."""

    def drop_views(self) -> None:
        """Let go of all views."""

    def leave(self) -> None:
        """Let go of everything, so that another device can have it."""


class _State(enum.Enum):
    ALIVE = "alive"
    MOURNED = "its driver knows it alive"  # or has been told by an interrupt
    RESETTING = "its driver has asked for a reset"
    ABSENT = "its driver knows of no device"


class Undertaker:
    """Implements :class:`~viommu.endpoints.remote.companions.Afterlife` for virtio devices.

    While the device is alive it follows what the driver tells it, and keeps what the
    device answers of its configuration. Does nothing for a device that isn't virtio,
    or whose driver uses the legacy interface. ``memory`` is used while the device is
    dead and masters the bus; only split rings can be taken over.
    """

    def __init__(self, name: str, memory: EstateMemory, loop: Loop) -> None:
        #: Requests that were ended for a device that could not.
        self.ended = 0
        self._name = name
        self._memory = memory
        self._loop = loop
        self._state = _State.ALIVE
        self._structures: dict[spec.CfgType, Structure] = {}
        self._is_disk = False
        self._registers = DriverRegisters()
        self._config = bytearray()  # what the driver has seen of device configuration
        self._isr = 0
        self._master = False
        self._lines: IrqLines | None = None
        self._queues: dict[int, OrphanedQueue] = {}
        self._round: deque[int] = deque()  # queues that are still to be looked at
        self._again = False  # and then all of them
        self._scheduled = False
        self._patrol: Timer | None = None

    # Afterlife.

    def follow(self, config: bytes) -> None:
        """Get to know the device by its configuration space."""
        self._structures = find_virtio(config)
        self._is_disk = is_disk(config)
        area = self._structures.get(spec.CfgType.DEVICE)
        size = min(area.end - area.start, _MAX_CONFIG) if area is not None else 0
        self._config = bytearray(b"\xff" * size)

    def wrote(self, region: int, offset: int, data: bytes) -> bool:
        """Follow a write of the guest; return whether it resets the device."""
        if self._state is not _State.ALIVE and self._touches(
            spec.CfgType.NOTIFY, region, offset, len(data)
        ):
            self._schedule()
        common = self._structures.get(spec.CfgType.COMMON)
        if common is None:
            return False
        at = common.offset_of(region, offset, len(data))
        if at is None or not self._registers.wrote(at, data):
            return False
        self._let_go()
        if self._state is not _State.ALIVE:
            self._state = _State.RESETTING
        return True

    def answered(self, region: int, offset: int, data: bytes) -> None:
        """Follow what the device answered to a read."""
        for kind in (spec.CfgType.COMMON, spec.CfgType.DEVICE):
            structure = self._structures.get(kind)
            at = structure and structure.offset_of(region, offset, len(data))
            if at is None:
                continue
            if kind is spec.CfgType.COMMON:
                self._registers.answered(at, data)
            else:
                overlay(self._config, 0, at, data)

    def read(self, region: int, offset: int, count: int) -> bytes | None:
        """Answer a read in place of the dead device; ``None``: it has nothing to say."""
        data = bytearray(b"\xff" * count)
        found = False
        for structure, at, value in self._remains():
            start = structure.start + at
            if structure.bar == region and start < offset + count and offset < start + len(value):
                overlay(data, offset, start, value)
                found = True
        if self._touches(spec.CfgType.ISR, region, offset, count):
            self._isr = 0
        return bytes(data) if found else None

    def bus_master(self, *, enabled: bool) -> None:
        """Follow COMMAND.BUS_MASTER: without it nothing is ended."""
        if enabled and not self._master:
            self._queues.clear()  # one that was given up for it gets another chance
            self._schedule()
        self._master = enabled
        if not enabled:
            self._memory.drop_views()

    def died(self, lines: IrqLines | None) -> None:
        """Tell the driver, whose interrupts ``lines`` are, and end its requests."""
        self._lines = lines
        if not self._registers.status:
            self._state = _State.ABSENT
            return
        self._state = _State.MOURNED
        if not self._registers.status & STATUS_DRIVER_OK:
            return
        if self._is_disk and self._registers.features >> Feature.RING_PACKED & 1:
            _log.warning("%s: requests in packed rings can't be ended", self._name)
        self._interrupt(spec.ISR_CONFIG, self._registers.config_vector)
        self._schedule()
        self._watch()

    def reset(self) -> None:
        """Forget the driver: the function was reset."""
        self._registers.clear()
        self._let_go()
        if self._state is not _State.ALIVE:
            self._state = _State.ABSENT

    def stayed_dead(self) -> None:
        """End a reset for which the device did not come back."""
        if self._state is _State.RESETTING:
            self._state = _State.ABSENT

    def revived(self) -> None:
        """Leave everything to the device again, which was reset."""
        self._registers.clear()
        self._let_go()
        self._state = _State.ALIVE

    def close(self) -> None:
        """Do nothing any more."""
        self._let_go()

    # Inside.

    def _remains(self) -> Iterator[tuple[Structure, int, bytes]]:
        """Yield what registers read as that are not all ones: structure, offset, bytes."""
        if (common := self._structures.get(spec.CfgType.COMMON)) is not None:
            yield common, _STATUS, bytes([self._status()])
            yield common, _QUEUE_ENABLE, bytes(2)  # these two Linux wants to see become 0
            yield common, _QUEUE_RESET, bytes(2)
        if (isr := self._structures.get(spec.CfgType.ISR)) is not None:
            yield isr, 0, bytes([self._isr])
        if (device := self._structures.get(spec.CfgType.DEVICE)) is not None:
            # Its driver looks for what has changed: nothing but that it is gone.
            yield device, 0, bytes(self._config)

    def _status(self) -> int:
        match self._state:
            case _State.RESETTING:
                return STATUS_DEVICE_NEEDS_RESET  # not 0 before the reset is over
            case _State.MOURNED:
                return self._registers.status | STATUS_DEVICE_NEEDS_RESET
            case _:
                return 0

    def _touches(self, kind: spec.CfgType, region: int, offset: int, size: int) -> bool:
        structure = self._structures.get(kind)
        return (
            structure is not None
            and structure.bar == region
            and offset < structure.end
            and structure.start < offset + size
        )

    def _interrupt(self, cause: int, vector: int) -> None:
        self._isr |= cause
        if self._lines is None:
            return
        if not self._lines.vectors(vfio.PCI_MSIX_IRQ_INDEX):
            self._lines.trigger(vfio.PCI_INTX_IRQ_INDEX, 0)
        elif vector != spec.MSI_NO_VECTOR:
            self._lines.trigger(vfio.PCI_MSIX_IRQ_INDEX, vector)

    def _schedule(self) -> None:
        """Have every queue looked at from now on."""
        self._again = True
        self._go_on()

    def _go_on(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._serve)

    def _watch(self) -> None:
        """Look for requests now and then."""
        self._patrol = self._loop.call_later(_PATROL, self._watch)
        self._schedule()

    def _serve(self) -> None:
        """Look at one queue: others have their turn before the next, of which a guest has many."""
        self._scheduled = False
        registers = self._registers
        if (
            self._state is not _State.MOURNED
            or not self._is_disk
            or not self._master
            or not registers.status & STATUS_DRIVER_OK
            or registers.features >> Feature.RING_PACKED & 1
        ):
            self._round.clear()
            return
        if not self._round:
            self._again = False
            self._round.extend(index for index, queue in registers.queues.items() if queue.enabled)
        if self._round:
            self._serve_queue(self._round.popleft())
        if self._round or self._again:
            self._go_on()

    def _serve_queue(self, index: int) -> None:
        followed = self._registers.queues.get(index)
        if followed is None or not followed.enabled:
            return
        queue = self._queues.get(index) or self._take_over(index, followed)
        if queue is None:
            return
        before = queue.ended
        more, wanted = queue.serve(_BUDGET)
        self.ended += queue.ended - before
        if wanted:
            self._interrupt(spec.ISR_QUEUE, followed.vector)
        if more:
            self._schedule()

    def _take_over(self, index: int, followed: FollowedQueue) -> OrphanedQueue | None:
        try:
            queue = SplitQueue(
                self._memory,
                index,
                followed.size,
                followed.desc,
                followed.driver,
                followed.device,
                event_idx=bool(self._registers.features >> Feature.RING_EVENT_IDX & 1),
                indirect=bool(self._registers.features >> Feature.RING_INDIRECT_DESC & 1),
            )
        except RingError:
            return None  # such a queue the device can't have used either
        return self._queues.setdefault(index, OrphanedQueue(queue, self._memory))

    def _let_go(self) -> None:
        """Have nothing to do with the driver's requests any more."""
        if self._patrol is not None:
            self._patrol.cancel()
            self._patrol = None
        self._isr = 0
        self._queues.clear()
        self._round.clear()
        if self._state is not _State.ALIVE:
            self._memory.leave()
