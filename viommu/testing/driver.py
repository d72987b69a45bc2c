"""A guest's virtio-pci driver in Python: negotiates, sets queues up, kicks and waits.

It drives a device over the same socket that a VMM uses.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu.errors import UsageError
from viommu.spec import pci, vfio, virtio_config
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_config import Feature
from viommu.testing.pci_driver import PciDriver, wait_for
from viommu.testing.ring import DriverQueue, RingLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from viommu.events import Event
    from viommu.testing.guest_ram import DmaBuffer, DmaSpace
    from viommu.vfio_user.client import Client

__all__ = ["DEFAULT_TIMEOUT", "VirtioPciDriver", "Virtqueue"]

DEFAULT_TIMEOUT: Final = 5.0

_TRANSPORT_FEATURES: Final = (
    1 << Feature.VERSION_1
    | 1 << Feature.RING_INDIRECT_DESC
    | 1 << Feature.RING_EVENT_IDX
    | 1 << Feature.ACCESS_PLATFORM
)


class _Structure(NamedTuple):
    """Where a virtio structure is; ``extra`` is what follows the capability."""

    bar: int
    offset: int
    length: int
    extra: int


class Virtqueue:
    """One queue of a running driver; addresses in buffers are the device's.

    Made by :meth:`VirtioPciDriver.add_queue`.
    """

    def __init__(
        self, driver: VirtioPciDriver, index: int, ring: DriverQueue, notify: int, event: Event
    ) -> None:
        self.index = index
        self.ring = ring
        self.event = event
        self._driver = driver
        self._notify = notify
        self._tickets = itertools.count()
        self._ticket_of: dict[int, int] = {}  # by head of a chain that the device has
        self._lengths: dict[int, int] = {}  # by ticket of a chain that is back

    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]] = (),
        *,
        table: int | None = None,
    ) -> int:
        """Make a chain of ``(address, length)`` buffers ready and return a ticket for it.

        The device is told by :meth:`kick`. With ``table`` the chain goes into an
        indirect table at that address. No two chains have the same ticket, whereas
        the ring uses the head of a chain again as soon as it is back.
        """
        head = self.ring.add(readable, writable, table=table)
        self._ticket_of[head] = ticket = next(self._tickets)
        return ticket

    def kick(self, *, always: bool = False) -> bool:
        """Show the device what was added, and notify it if it wants (or ``always``)."""
        wanted = self.ring.publish() or always
        if wanted:
            self._driver.notify(self._notify, self.index)
        return wanted

    def poll(self) -> dict[int, int]:
        """Return ticket and used length of every chain that is back and was not waited for."""
        for used in self.ring.collect():
            self._lengths[self._ticket_of.pop(used.head)] = used.length
        return self._lengths

    def wait(self, ticket: int, timeout: float | None = None) -> int:
        """Wait until a chain comes back and return its used length.

        Raises:
            TimeoutError: It has not come back within ``timeout`` seconds, by default
                the driver's.
        """
        self._wait(lambda: ticket in self._lengths, timeout)
        return self._lengths.pop(ticket)

    def wait_any(self, timeout: float | None = None) -> tuple[int, int]:
        """Wait until some chain is back; return ticket and used length of the oldest.

        Raises:
            TimeoutError: As :meth:`wait` does.
        """
        self._wait(lambda: bool(self._lengths), timeout)
        ticket = next(iter(self._lengths))
        return ticket, self._lengths.pop(ticket)

    def _wait(self, found: Callable[[], bool], timeout: float | None) -> None:
        timeout = self._driver.timeout if timeout is None else timeout
        what = f"completion on queue {self.index}"
        wait_for(self.event, lambda: self._look(found), timeout, what)

    def _look(self, found: Callable[[], bool]) -> bool:
        self.poll()
        while not found():
            # What comes back after this raises an interrupt.
            if not self.ring.enable_interrupts():
                return False
            self.poll()
        return True


class VirtioPciDriver:
    """Drives a modern virtio-pci function behind ``client``, which stays the caller's.

    ``dma`` is where rings come from: guest memory itself
    (:class:`~viommu.testing.guest_ram.DirectDma`), or mapped memory for a device
    behind an IOMMU (:class:`~viommu.testing.iommu_driver.MappedDma`). Call
    :meth:`negotiate`, :meth:`add_queue` for each queue, then :meth:`start`. Every
    wait ends after ``timeout`` seconds.

    Raises:
        UsageError: This is no virtio function, or a legacy one.
    """

    def __init__(self, client: Client, dma: DmaSpace, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.client = client
        self.dma = dma
        self.timeout = timeout
        self.features = 0
        self.pci = PciDriver(client)
        vendor, device = self.pci.config_read(0, 2), self.pci.config_read(2, 2)
        if vendor != spec.VENDOR_ID or device < spec.DEVICE_ID_BASE:
            raise UsageError(f"{vendor:04x}:{device:04x} is no modern virtio device")
        self.device_type = device - spec.DEVICE_ID_BASE
        self._structures = self._find_structures()
        self._rings: list[DmaBuffer] = []
        self._queues: list[Virtqueue] = []

    @property
    def status(self) -> int:
        """The device status field."""
        return self._common_read("device_status")

    @property
    def offered(self) -> int:
        """The features that the device offers, as a mask."""
        mask = 0
        for half in range(2):
            self._common_write("device_feature_select", half)
            mask |= self._common_read("device_feature") << 32 * half
        return mask

    def reset(self) -> None:
        """Reset the device and wait until that is done.

        Raises:
            TimeoutError: It is not done in time; exports of endpoints may hold it up.
        """
        self._common_write("device_status", 0)
        deadline = time.monotonic() + self.timeout
        while self.status:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the reset has not finished within {self.timeout} s")
            time.sleep(0.001)  # there is no interrupt for it
        self._forget_queues()
        for ring in self._rings:
            self.dma.free(ring)
        self._rings.clear()

    def negotiate(self, wanted: int = ~0) -> int:
        """Reset, and agree on those offered features that are ``wanted``; return them.

        VERSION_1 and ACCESS_PLATFORM are always accepted; ring features that this
        driver doesn't know never.

        Raises:
            UsageError: The device refuses them.
        """
        self.reset()
        self.pci.set_bus_master()
        self.pci.enable_msix()
        self._add_status(virtio_config.STATUS_ACKNOWLEDGE)
        self._add_status(virtio_config.STATUS_DRIVER)
        always = 1 << Feature.VERSION_1 | 1 << Feature.ACCESS_PLATFORM
        known = virtio_config.DEVICE_FEATURES | _TRANSPORT_FEATURES
        self.features = self.offered & (wanted | always) & known
        for half in range(2):
            self._common_write("driver_feature_select", half)
            self._common_write("driver_feature", self.features >> 32 * half & 0xFFFF_FFFF)
        self._add_status(virtio_config.STATUS_FEATURES_OK)
        if not self.status & virtio_config.STATUS_FEATURES_OK:
            raise UsageError(f"the device refuses the features {self.features:#x}")
        return self.features

    def add_queue(self, index: int, size: int | None = None) -> Virtqueue:
        """Set a queue up with ``size`` entries, by default as many as it can have."""
        self._common_write("queue_select", index)
        size = size or self._common_read("queue_size")
        buffer = self.dma.allocate(RingLayout.at(0, size).end)
        self._rings.append(buffer)
        layout = RingLayout.at(buffer.address, size)
        event_idx = bool(self.features >> Feature.RING_EVENT_IDX & 1)
        ring = DriverQueue(self.dma.memory, size, layout, event_idx=event_idx)
        vector = index + 1  # the first one tells of changes of the configuration
        self._common_write("queue_size", size)
        self._common_write("queue_msix_vector", vector)
        for name, address in (
            ("desc", layout.desc),
            ("driver", layout.avail),
            ("device", layout.used),
        ):
            self._common_write(f"queue_{name}_lo", address & 0xFFFF_FFFF)
            self._common_write(f"queue_{name}_hi", address >> 32)
        self._common_write("queue_enable", 1)
        notify = self._structures[spec.CfgType.NOTIFY]
        doorbell = notify.offset + notify.extra * self._common_read("queue_notify_off")
        queue = Virtqueue(self, index, ring, doorbell, self.pci.enable_msix()[vector])
        self._queues.append(queue)
        return queue

    def start(self) -> None:
        """Let the device run (DRIVER_OK)."""
        self._add_status(virtio_config.STATUS_DRIVER_OK)

    def device_config(self, offset: int, size: int) -> bytes:
        """Read device configuration."""
        where = self._structures[spec.CfgType.DEVICE]
        return self.client.region_read(where.bar, where.offset + offset, size)

    def write_device_config(self, offset: int, data: bytes) -> None:
        """Write device configuration."""
        where = self._structures[spec.CfgType.DEVICE]
        self.client.region_write(where.bar, where.offset + offset, data)

    def notify(self, offset: int, index: int) -> None:
        """Write a queue's number to its doorbell, without waiting, as a VMM does."""
        bar = self._structures[spec.CfgType.NOTIFY].bar
        self.pci.write(bar, offset, index, 2, posted=True)

    def close(self) -> None:
        """Stop the device's DMA and interrupts; what it was given stays allocated."""
        self.pci.close()
        self._forget_queues()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _forget_queues(self) -> None:
        for queue in self._queues:
            queue.ring.close()
        self._queues.clear()

    def _find_structures(self) -> dict[int, _Structure]:
        found: dict[int, _Structure] = {}
        for at in self.pci.capabilities(pci.CAP_ID_VENDOR):
            data = self.client.region_read(vfio.PCI_CONFIG_REGION_INDEX, at + 2, 18)
            _, kind, bar, _, offset, length = spec.CAP_BODY.unpack_from(data)
            extra = int.from_bytes(data[spec.CAP_BODY.size :], "little")
            # "The driver SHOULD use the first instance of each virtio structure type."
            found.setdefault(kind, _Structure(bar, offset, length, extra))
        for kind in (spec.CfgType.COMMON, spec.CfgType.NOTIFY, spec.CfgType.ISR):
            if kind not in found:
                raise UsageError(f"the function has no {kind.name.lower()} structure")
        return found

    def _add_status(self, bit: int) -> None:
        self._common_write("device_status", self.status | bit)

    def _common_read(self, field: str) -> int:
        where = self._structures[spec.CfgType.COMMON]
        register = getattr(spec.CommonCfg, field)
        return self.pci.read(where.bar, where.offset + register.offset, register.size)

    def _common_write(self, field: str, value: int) -> None:
        where = self._structures[spec.CfgType.COMMON]
        register = getattr(spec.CommonCfg, field)
        self.pci.write(where.bar, where.offset + register.offset, value, register.size)
