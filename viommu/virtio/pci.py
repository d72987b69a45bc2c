"""A virtio device as a PCI function: the modern transport.

Source: virtio 1.2, 4.1 "Virtio Over PCI Bus". BAR 0 has the structures, a page
each; BAR 1 is MSI-X's. There is one vector for configuration changes and one a
queue.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.errors import RingError, UsageError
from viommu.pci import Capability, Identity, PciFunction, ResetKind
from viommu.spec import pci
from viommu.spec import virtio_pci as spec
from viommu.spec._struct import sizeof
from viommu.spec.virtio_config import DEVICE_FEATURES, STATUS_DRIVER_OK, Feature
from viommu.virtio.common_config import COMMON_CONFIG_SIZE, CommonConfig, QueueRegisters
from viommu.virtio.config_window import ConfigWindow
from viommu.virtio.ring import SplitQueue
from viommu.virtio.status import Event, State

if TYPE_CHECKING:
    from viommu.memory import GuestMemory
    from viommu.virtio.device import VirtioDevice
    from viommu.virtio.ring_memory import RingMemory

__all__ = ["MSIX_BAR", "NOTIFY_MULTIPLIER", "STRUCTURES_BAR", "VirtioPciFunction"]

_log = logging.getLogger(__name__)

STRUCTURES_BAR: Final = 0
MSIX_BAR: Final = 1
NOTIFY_MULTIPLIER: Final = 4

# A driver can break its device and reset it in a loop: that must not fill a disk.
_LOGGED_BREAKS: Final = 16

_PAGE: Final = 4096
_COMMON: Final = 0 * _PAGE
_ISR: Final = 1 * _PAGE
_DEVICE: Final = 2 * _PAGE
_NOTIFY: Final = 3 * _PAGE
_BAR_SIZE: Final = 4 * _PAGE

_OFFERED: Final = (
    1 << Feature.VERSION_1 | 1 << Feature.RING_INDIRECT_DESC | 1 << Feature.RING_EVENT_IDX
)


class VirtioPciFunction(PciFunction):
    """Puts any :class:`~viommu.virtio.device.VirtioDevice` on the bus; is its transport.

    Args:
        name: What messages call the function.
        memory: Guest memory, which the server fills.
        device: What is behind the transport.
        ring_memory: Where its rings are: ``memory`` by default, or the DMA port of
            an endpoint that is behind an IOMMU.

    Raises:
        UsageError: The device has more queues or configuration than fit a page.
    """

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        device: VirtioDevice,
        ring_memory: RingMemory | None = None,
    ) -> None:
        if device.config_size > _PAGE or NOTIFY_MULTIPLIER * len(device.queue_sizes) > _PAGE:
            raise UsageError(f"{name}: configuration and notifications have a page each")
        super().__init__(name, memory, _identity(device))
        self.device = device
        self.active = False
        self.reset_reason: str | None = None  # why the device needs a reset
        self._ring_memory: RingMemory = memory if ring_memory is None else ring_memory
        self._queues: list[SplitQueue | None] = []
        self._isr = 0
        self._breaks_to_log = _LOGGED_BREAKS
        vectors = 1 + len(device.queue_sizes)
        self.common = CommonConfig(name, _offered(device), device.queue_sizes, vectors, self)
        self.add_bar(STRUCTURES_BAR, _BAR_SIZE, _Structures(self))
        self._add_structure(spec.CfgType.COMMON, _COMMON, COMMON_CONFIG_SIZE)
        self._add_structure(spec.CfgType.ISR, _ISR, 1)
        if device.config_size:
            self._add_structure(spec.CfgType.DEVICE, _DEVICE, device.config_size)
        self._add_structure(
            spec.CfgType.NOTIFY,
            _NOTIFY,
            NOTIFY_MULTIPLIER * len(device.queue_sizes),
            NOTIFY_MULTIPLIER.to_bytes(4, "little"),
        )
        self._window = ConfigWindow(self)
        device.plug(self)
        self.add_msix(vectors, MSIX_BAR)

    @property
    def features(self) -> int:
        """The feature bits that the driver accepted, as a mask."""
        return self.common.accepted

    @property
    def state(self) -> State:
        """How far the driver is with its device."""
        return self.common.status.state

    # Transport: what the device says.

    def interrupt(self, queue: int) -> None:
        """Tell the driver that buffers of ``queue`` were used."""
        if not self.msix_enabled:
            self._isr |= spec.ISR_QUEUE  # there is no pin: it is for a driver that polls
        elif (vector := self.common.queues[queue].vector) != spec.MSI_NO_VECTOR:
            self.raise_msix(vector)

    def config_changed(self) -> None:
        """Tell the driver that the device configuration has changed."""
        self.common.generation = (self.common.generation + 1) & 0xFF
        self._notify_config()

    def needs_reset(self, reason: str) -> None:
        """Give up until the driver resets the device (2.1.2)."""
        if self.common.status.feed(Event.BREAK):
            if self._breaks_to_log:
                self._breaks_to_log -= 1
                _log.warning("%s needs a reset: %s", self.name, reason)
            self.reset_reason = reason
            self._update_active()
            self._notify_config()

    def reset_done(self) -> None:
        """Say that a reset that the device left open has finished."""
        self.common.finish_reset()

    # CommonConfigHooks: what the driver says.

    def driver_ok(self) -> None:
        """Build the queues and start the device."""
        try:
            self._queues = [
                self._queue(index, registers) if registers.enabled else None
                for index, registers in enumerate(self.common.queues)
            ]
        except RingError as error:
            self._queues = []
            self.needs_reset(str(error))
            return
        self._update_active()
        self.device.start(self, self.common.accepted, tuple(self._queues))

    def driver_failed(self) -> None:
        """Leave the queues alone from now on."""
        self._update_active()

    def reset_requested(self) -> None:
        """Reset the device, not the function."""
        self._reset_device(ResetKind.DRIVER)

    # PciFunction: what the bus says.

    def on_bus_master(self, *, enabled: bool) -> None:
        """Stop touching queues, or look at all of them: kicks may have been lost."""
        self.device.on_bus_master(enabled=enabled)
        self._update_active()
        for index in range(len(self._queues)):
            self.kick(index)

    def on_reset(self, kind: ResetKind) -> None:
        """Reset the device with its function."""
        if kind is ResetKind.DISCONNECT:
            self._breaks_to_log = _LOGGED_BREAKS
        self.common.status.feed(Event.START_RESET)
        self._reset_device(kind)

    def close(self) -> None:
        """Close the device."""
        self.device.close()

    # The structures in BAR 0.

    def kick(self, index: int) -> None:
        """The driver has added buffers to a queue."""
        if self.active and index < len(self._queues) and self._queues[index] is not None:
            self.device.notify(index)

    def read_isr(self) -> int:
        """Return the ISR status, which reading clears."""
        isr, self._isr = self._isr, 0
        return isr

    def _queue(self, index: int, registers: QueueRegisters) -> SplitQueue:
        return SplitQueue(
            self._ring_memory,
            index,
            registers.size,
            registers.desc,
            registers.driver,
            registers.device,
            event_idx=bool(self.common.accepted >> Feature.RING_EVENT_IDX & 1),
            indirect=bool(self.common.accepted >> Feature.RING_INDIRECT_DESC & 1),
            max_chain_bytes=self.device.max_chain_bytes,
        )

    def _update_active(self) -> None:
        self.active = self.bus_master and self.state is State.RUNNING

    def _notify_config(self) -> None:
        self._isr |= spec.ISR_CONFIG
        # Nobody is told before DRIVER_OK (3.1.1).
        if self.common.status.byte & STATUS_DRIVER_OK and (
            self.common.config_vector != spec.MSI_NO_VECTOR
        ):
            self.raise_msix(self.common.config_vector)

    def _reset_device(self, kind: ResetKind) -> None:
        self._update_active()
        self.reset_reason = None
        self._isr = 0
        finished = self.device.reset(kind)
        for queue in self._queues:
            if queue is not None:
                queue.close()
        self._queues = []
        self.common.reset()
        if finished:
            self.common.finish_reset()

    def _add_structure(
        self, cfg_type: spec.CfgType, offset: int, length: int, extra: bytes = b""
    ) -> None:
        size = sizeof(spec.Cap) + len(extra)
        body = spec.CAP_BODY.pack(size, cfg_type, STRUCTURES_BAR, 0, offset, length)
        self.config.add_capability(Capability(pci.CAP_ID_VENDOR, body + extra))


class _Structures:
    """BAR 0: four structures on a page each; what is beside them reads as zero."""

    def __init__(self, function: VirtioPciFunction) -> None:
        self._function = function

    def read(self, offset: int, count: int) -> bytes:
        """Read one structure."""
        page, start = offset & -_PAGE, offset % _PAGE
        data = b""
        if page == _COMMON:
            data = self._function.common.read(start, count)
        elif page == _ISR and not start:
            data = bytes([self._function.read_isr()])
        elif page == _DEVICE:
            device = self._function.device
            inside = min(count, device.config_size - start)
            data = device.read_config(start, inside) if inside > 0 else b""
        return data.ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write one structure, or kick a queue."""
        if offset >= _NOTIFY:
            # The address says which queue; the data repeats it.
            index, rest = divmod(offset - _NOTIFY, NOTIFY_MULTIPLIER)
            if not rest:
                self._function.kick(index)
            return
        page, start = offset & -_PAGE, offset % _PAGE
        if page == _COMMON:
            self._function.common.write(start, data)
        elif page == _DEVICE:
            device = self._function.device
            data = data[: max(0, device.config_size - start)]
            if data:
                device.write_config(start, data)


def _identity(device: VirtioDevice) -> Identity:
    """Return a modern device's identity (4.1.2.1): revision 1 or more, any subsystem."""
    return Identity(
        spec.VENDOR_ID,
        spec.DEVICE_ID_BASE + device.device_type,
        device.class_code,
        revision=1,
        subsystem_vendor_id=spec.VENDOR_ID,
        subsystem_id=spec.DEVICE_ID_BASE + device.device_type,
    )


def _offered(device: VirtioDevice) -> int:
    """Return the device's features and ours.

    Raises:
        UsageError: The device claims bits that are not a device type's.
    """
    if device.features & ~DEVICE_FEATURES:
        raise UsageError(f"feature bits {device.features:#x} are not all a device type's own")
    platform = 1 << Feature.ACCESS_PLATFORM if device.behind_iommu else 0
    return device.features | _OFFERED | platform
