"""The virtio-iommu as a virtio device: moves requests, waits for others, reports faults.

Everything that decides is in :mod:`viommu.device`; here are the two queues.

Source: virtio 1.2, 5.13.2 "Virtqueues".
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from viommu.device import FEATURES, Parked
from viommu.errors import GuestMemoryError, RingError, TranslationFault
from viommu.pci import ResetKind
from viommu.spec import virtio_iommu as spec
from viommu.virtio.device import VirtioDevice
from viommu.virtio.runner import QueueRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from viommu.device import VirtioIommu
    from viommu.events import Event
    from viommu.loop import Loop
    from viommu.virtio.device import Transport
    from viommu.virtio.ring import Chain, SplitQueue

__all__ = ["VirtioIommuDevice"]

# The longest request is PROBE's 72 bytes; what a driver appends is not looked at.
_MAX_REQUEST: Final = 128


class VirtioIommuDevice(VirtioDevice):
    """Puts a :class:`~viommu.device.VirtioIommu` behind a virtio transport.

    The request queue is run until it is empty or a request is parked; then, and after
    a change of ``bypass``, no further request is taken until the exports that were
    revoked are released, and mappers that answer later have answered.
    ``loop`` does that waiting, and everything else goes on meanwhile.

    ``on_idle_kick`` is called, with the address of the available ring, when the
    driver kicks and there is no request: it may be that we don't see the memory
    that the driver writes to.
    """

    device_type = spec.DEVICE_ID
    class_code = 0x080600
    queue_sizes: tuple[int, ...] = (256, 64)
    features = FEATURES
    config_size = spec.CONFIG.size

    def __init__(
        self, iommu: VirtioIommu, loop: Loop, on_idle_kick: Callable[[int], None] | None = None
    ) -> None:
        self.iommu = iommu
        self.parked_total = 0
        self._loop = loop
        self._on_idle_kick = on_idle_kick
        self._transport: Transport | None = None
        self._requests: SplitQueue | None = None
        self._runner: QueueRunner | None = None
        self._events: SplitQueue | None = None
        self._parked: tuple[Chain, Parked] | None = None
        self._waits: list[Event] = []
        self._resetting = False
        self._scheduled = False
        iommu.on_fault(self._deliver_faults)

    @property
    def waiting(self) -> int:
        """How many clients must still release, and mappers answer, before the device goes on."""
        return len(self._waits)

    # -- VirtioDevice --

    def plug(self, transport: Transport) -> None:
        """Remember whom to tell of a reset that has finished."""
        self._transport = transport

    def read_config(self, offset: int, size: int) -> bytes:
        """Return part of ``struct virtio_iommu_config``."""
        return self.iommu.config_bytes()[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Let the driver change ``bypass``; what this revokes holds up the next request."""
        self._wait_for_more(self.iommu.write_config(offset, data))

    def start(
        self, transport: Transport, features: int, queues: Sequence[SplitQueue | None]
    ) -> None:
        """Begin to serve a driver."""
        self.iommu.accept_features(features)
        self._transport = transport
        self._requests, self._events = queues
        if self._requests is not None:
            self._runner = QueueRunner(self._requests, transport, self._handle)
        self._wait_for_more(self.iommu.settle())

    def notify(self, index: int) -> None:
        """Look at a queue."""
        if index == spec.EVENT_QUEUE:
            self._deliver_faults()
        elif self._runner is not None and self._requests is not None:
            self._answer_parked()
            if self._on_idle_kick and not self._runner.parked and not self._runner.has_work():
                self._on_idle_kick(self._requests.avail_address)
            self._serve()

    def reset(self, kind: ResetKind) -> bool:
        """Forget the driver; not finished before every revoked export is released."""
        if kind in {ResetKind.SYSTEM, ResetKind.DISCONNECT}:
            revoked = self.iommu.system_reset()
        else:
            revoked = self.iommu.reset()
        # A request that was parked is forgotten, but what it waited for still counts.
        self._parked = None
        self._wait_for_more(revoked)
        self._runner = self._requests = self._events = None
        self._resetting = bool(self._waits)
        return not self._resetting

    def close(self) -> None:
        """Stop waiting for releases."""
        waits, self._waits = self._waits, []
        for event in waits:
            self._loop.forget(event)
            event.close()

    # -- requests --

    def _serve(self) -> None:
        """Run the request queue; what a busy driver adds meanwhile comes in a later turn."""
        self._scheduled = False
        if self._runner is None or self._waits:
            return
        if self._runner.serve() and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._serve)
        if self.iommu.fault_pending:
            self._deliver_faults()

    def _handle(self, chain: Chain) -> int | None:
        queue = self._requests
        if queue is None:
            return 0
        reply = self.iommu.handle(queue.read(chain, _MAX_REQUEST), chain.writable_size)
        if isinstance(reply, Parked):
            self.parked_total += 1
            self._parked = (chain, reply)
            self._wait_for_more(reply.events)
            return None
        queue.write(chain, reply)
        return len(reply)

    # -- waiting for releases, and for mappers --

    def _wait_for_more(self, events: Iterable[Event]) -> None:
        """Wait for these events too; two requests may wait for the same one."""
        for event in events:
            if not any(event is other for other in self._waits):
                self._waits.append(event)
                self._loop.on_readable(event, partial(self._fired, event))

    def _fired(self, event: Event) -> None:
        if not event.is_set():
            return  # the loop meant an fd of this number that was closed meanwhile
        self._loop.forget(event)
        self._waits.remove(event)
        event.close()
        if self._waits:
            return
        self._wait_for_more(self.iommu.settle())
        if self._waits:
            return
        if self._resetting:
            self._resetting = False
            if self._transport is not None:
                self._transport.reset_done()
        else:
            self._answer_parked()
            self._serve()

    def _answer_parked(self) -> None:
        """Answer the parked request, if it has waited long enough and the bus is ours."""
        if self._parked is None or self._waits:
            return
        chain, parked = self._parked
        answer = parked.conclude()
        if isinstance(answer, Parked):
            self._parked = chain, answer
            self._wait_for_more(answer.events)
            return
        if (
            self._runner is None
            or self._requests is None
            or self._transport is None
            or not self._transport.active
        ):
            self._parked = chain, Parked((), answer)
            return
        self._parked = None
        try:
            self._requests.write(chain, answer)
            used = len(answer)
        except (GuestMemoryError, TranslationFault):
            used = 0
        self._runner.resume(chain, used)

    # -- faults --

    def _deliver_faults(self) -> None:
        """Fill the driver's event buffers with fault reports, as far as there are both.

        The driver adds buffers without a kick, so the ring is looked at here.
        """
        queue, transport = self._events, self._transport
        if queue is None or transport is None or not transport.active:
            return
        try:
            while self.iommu.fault_pending:
                chain = queue.pop()
                if chain is None:
                    break
                queue.push(chain, self._report(queue, chain))
            if queue.publish():
                transport.interrupt(spec.EVENT_QUEUE)
        except (RingError, GuestMemoryError, TranslationFault) as error:
            transport.needs_reset(str(error))

    def _report(self, queue: SplitQueue, chain: Chain) -> int:
        """Write one report; a buffer too small for it goes back empty (5.13.6.9)."""
        if chain.writable_size < spec.FAULT.size:
            return 0
        report = self.iommu.take_fault()
        if report is None:
            return 0
        try:
            queue.write(chain, report)
        except (GuestMemoryError, TranslationFault):
            return 0
        return len(report)
