"""The bus-master port of an endpoint: all its DMA goes through its export session.

It satisfies the ring's memory contract with IOVAs, so a virtio device behind
the IOMMU keeps its rings where the guest mapped them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.errors import (
    Access,
    ExportError,
    GuestMemoryError,
    SessionFaulted,
    TranslationFault,
)
from viommu.export import ExportedRegion
from viommu.iova import ADDRESS_SPACE_END
from viommu.spec.virtio_iommu import FaultReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.events import Event
    from viommu.loop import Loop
    from viommu.mapper import Exporter
    from viommu.memory.guest import GuestMemory

__all__ = ["EndpointDma"]


class EndpointDma:
    """Reads, writes and holds guest memory by IOVA, as one endpoint may.

    ``report`` is told of every access that the IOMMU blocks; it carries the
    fault to the guest's event queue. When the guest unmaps what is held, pinned
    views are dropped at once, and then each :meth:`on_fault` callback must let
    go of its exports, now or as soon as its transfer can end: the guest's unmap
    waits for it.

    ``enabled`` is COMMAND.BUS_MASTER. While it is off every access raises a
    :exc:`~viommu.errors.TranslationFault` that is not reported: such an access
    never leaves the device.
    """

    def __init__(
        self,
        mapper: Exporter,
        memory: GuestMemory,
        report: Callable[[TranslationFault], None],
        loop: Loop,
    ) -> None:
        self.mapper = mapper
        self.memory = memory
        self.blocked = 0
        self._enabled = False
        self._report = report
        self._loop = loop
        self._session: Event | None = None
        self._pinned: dict[tuple[int, int, bool], ExportedRegion] = {}
        self._epoch = 0
        self._callbacks: list[Callable[[], None]] = []

    @property
    def enabled(self) -> bool:
        """COMMAND.BUS_MASTER; turning it off drops the pinned views."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            self.drop_views()

    @property
    def generation(self) -> int:
        """Changes whenever pinned views may have become stale: ask for them again."""
        # Both only ever grow, so their sum repeats no value.
        return self._epoch + self.memory.generation

    def on_fault(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called after an IOMMU fault, to release what it exported."""
        self._callbacks.append(callback)

    def export(self, iova: int, size: int, access: Access) -> ExportedRegion:
        """Hold ``[iova, iova + size)`` open; use it as a context manager, or release it.

        Raises:
            TranslationFault: Not mapped like that; already reported to the guest.
            SessionFaulted: Exports that an IOMMU fault revoked are still held.
            ExportError: Too many exports, or no session can be started.
        """
        if not self.enabled:
            raise TranslationFault(iova, access, FaultReason.UNKNOWN)
        try:
            return self._export(iova, size, access)
        except TranslationFault as fault:
            self.blocked += 1
            self._report(fault)
            raise

    def read(self, iova: int, size: int) -> bytes:
        """Copy ``size`` bytes from ``iova``; nothing can be read anywhere.

        Raises:
            TranslationFault: Blocked, see :meth:`export`.
            GuestMemoryError: Mapped to what is not memory, or can't be exported now.
        """
        if not size:
            return b""
        with self._reach(iova, size, Access.READ) as region:
            return region.read()

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to ``iova``, all of it or nothing; raises as :meth:`read` does."""
        if len(data):
            with self._reach(iova, len(data), Access.WRITE) as region:
                region.write(data)

    def views(self, iova: int, size: int, *, write: bool) -> list[memoryview]:
        """Return views of a range that stays exported until :meth:`drop_views` or a fault.

        Meant for rings: asking again for the same range costs nothing and pins
        nothing more. Raises as :meth:`read` does; and
        :exc:`~viommu.errors.NotMappable` where only :meth:`read` and :meth:`write` do.
        """
        key = (iova, size, write)
        region = self._pinned.get(key)
        if region is None:
            access = Access.READ | Access.WRITE if write else Access.READ
            region = self._reach(iova, size, access)
            # Export may have met a fault, which dropped every other view.
            self._pinned[key] = region
        try:
            return region.views(copies=False)
        except GuestMemoryError:
            del self._pinned[key]
            region.release()
            raise

    def drop_views(self) -> None:
        """Release every pinned view: the device was reset or its queues changed."""
        self._epoch += 1
        for region in self._pinned.values():
            region.release()
        self._pinned.clear()

    def leave(self) -> None:
        """Release what is pinned and end the session, so that somebody else may start one."""
        self.drop_views()
        self._end()

    def close(self) -> None:
        """Release what is pinned and stop listening for faults."""
        self.enabled = False
        self._end()

    def _reach(self, iova: int, size: int, access: Access) -> ExportedRegion:
        """Export for the ring, to which what it can't have at all is memory that is not there."""
        try:
            return self.export(iova, size, access)
        except ExportError as error:
            raise GuestMemoryError(iova, size, f"can't be exported: {error}") from error

    def _export(self, iova: int, size: int, access: Access) -> ExportedRegion:
        if iova + size > ADDRESS_SPACE_END:
            # The address behind the last one can't be reported: blame the first.
            raise TranslationFault(iova, access)
        if self._session is None:
            self._start()
        try:
            return ExportedRegion(self.mapper, self.memory, iova, size, access)
        except SessionFaulted:
            # The fault is there but the loop has not come to it yet.
            self._faulted()
            self._start()
            return ExportedRegion(self.mapper, self.memory, iova, size, access)

    def _start(self) -> None:
        self._end()
        self._session = self.mapper.start_export_session()
        self._loop.on_readable(self._session, self._faulted)

    def _end(self) -> None:
        if self._session is not None:
            self._loop.forget(self._session)
            self._session.close()
            self._session = None

    def _faulted(self) -> None:
        """Let go of everything: the guest has unmapped something that is held."""
        self._end()
        self.drop_views()
        for callback in self._callbacks:
            callback()
