"""A synchronous vfio-user client: uses a device that another process serves.

It is :class:`~viommu.vfio_user.loop_client.LoopClient` with a loop of its own, which
turns while a call waits.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Self, TypeVar

from viommu.errors import PeerError
from viommu.loop import Loop
from viommu.spec import vfio
from viommu.vfio_user import requests
from viommu.vfio_user.loop_client import LoopClient, dial, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from viommu.deferred import Deferred
    from viommu.vfio_user.dma_service import DmaPort
    from viommu.vfio_user.protocol import Capabilities
    from viommu.vfio_user.requests import (
        DeviceInfo,
        FeatureReply,
        IoFdsReply,
        RegionWrite,
        Request,
    )
    from viommu.vfio_user.served import IrqInfo, RegionInfo

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Connects to ``path`` and negotiates; every call waits for its reply, at most ``timeout`` s.

    With ``memory`` the client serves DMA_READ and DMA_WRITE from it, whenever it
    waits for a reply or is in :meth:`serve`; without, it refuses them. ``offers`` are
    told to the server instead of :func:`~viommu.vfio_user.loop_client.default_offers`.

    Every call may raise :exc:`~viommu.errors.PeerError`. With the errno of an
    error reply the connection goes on. ETIMEDOUT (no reply), ECONNRESET (the
    server has gone) and EPROTO (it answered nonsense) close it, and from then on
    every call fails with ENOTCONN. What the server has not agreed to take, such as
    more data than it transfers at a time, is a :exc:`~viommu.errors.UsageError`.
    """

    def __init__(
        self,
        path: Path,
        *,
        timeout: float = 5.0,
        memory: DmaPort | None = None,
        offers: Capabilities | None = None,
    ) -> None:
        sock = dial(path)
        self._timeout = timeout
        self._loop = Loop()
        #: Why the connection has ended, until a caller is told.
        self._news: PeerError | None = None
        self._link = LoopClient(
            self._loop,
            sock,
            timeout=timeout,
            memory=memory,
            offers=offers,
            on_closed=self._ended,
        )
        try:
            wait(self._loop, self._link.negotiated)
        except BaseException:
            self.close()
            raise

    @property
    def minor(self) -> int:
        """The minor version that is spoken."""
        return self._link.minor

    @property
    def capabilities(self) -> Capabilities:
        """What the server can take."""
        return self._link.capabilities

    def close(self) -> None:
        """Close the connection; closing twice is harmless."""
        self._link.close()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed; readable: call :meth:`serve`."""
        return self._link.fileno()

    def submit(self, request: Request[T]) -> Deferred[T]:
        """Send a request of :mod:`viommu.vfio_user.requests` without waiting; :meth:`wait` does.

        Any number may be under way, and waiting for one lets the others be answered.
        """
        self._check_open()
        return self._link.submit(request)

    def wait(self, deferred: Deferred[T]) -> T:
        """Wait for what :meth:`submit` returned."""
        try:
            return wait(self._loop, deferred)
        except PeerError:
            self._news = None
            raise

    def call(self, request: Request[T]) -> T:
        """Send a request and wait for the answer."""
        return self.wait(self.submit(request))

    def dma_map(
        self,
        gpa: int,
        size: int,
        *,
        fd: int | None = None,
        offset: int = 0,
        readable: bool = True,
        writable: bool = True,
    ) -> None:
        """Give the server memory: ``[gpa, gpa + size)`` is the file ``fd`` from ``offset`` on.

        Without ``fd`` the server knows of the memory, but can't map it.
        """
        self.call(
            requests.dma_map(gpa, size, fd=fd, offset=offset, readable=readable, writable=writable)
        )

    def dma_unmap(self, gpa: int, size: int) -> None:
        """Take back what one :meth:`dma_map` gave."""
        self.call(requests.dma_unmap(gpa, size))

    def dma_unmap_all(self) -> None:
        """Take back all memory."""
        self.call(requests.dma_unmap_all())

    def device_info(self) -> DeviceInfo:
        """Ask what kind of device it is."""
        return self.call(requests.device_info())

    def region_info(self, index: int) -> RegionInfo:
        """Ask about a region; a file descriptor in the answer is the caller's to close."""
        self._check_open()
        return self.wait(self._link.region_info(index))

    def region_io_fds(self, index: int) -> IoFdsReply:
        """Ask which parts of a region have file descriptors; those are the caller's to close."""
        self._check_open()
        return self.wait(self._link.region_io_fds(index))

    def irq_info(self, index: int) -> IrqInfo:
        """Ask about a kind of interrupt."""
        return self.call(requests.irq_info(index))

    def set_irqs(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        *,
        bools: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """Send a SET_IRQS as it is; ``flags`` are ``VFIO_IRQ_SET_*``."""
        self.call(requests.set_irqs(index, flags, start, count, bools=bools, fds=fds))

    def assign_irqs(self, index: int, start: int, fds: Sequence[int]) -> None:
        """Have vectors from ``start`` on signalled by eventfds, which stay the caller's."""
        flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
        # A server may say that it takes more than a message can bring.
        chunk = max(1, min(self.capabilities.max_msg_fds, requests.MAX_REPLY_FDS))
        for first in range(0, len(fds), chunk):
            some = fds[first : first + chunk]
            self.set_irqs(index, flags, start + first, len(some), fds=some)

    def disable_irqs(self, index: int) -> None:
        """Have no vector of this kind signalled any more."""
        self.set_irqs(index, vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER, 0, 0)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read ``count`` bytes, at most what the server transfers at a time."""
        return self.call(requests.region_read(region, offset, count))

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write ``data``; a posted write is not answered, not even when it fails."""
        self._write(requests.region_write(region, offset, data), posted=posted)

    def region_write_multi(self, writes: Sequence[RegionWrite], *, posted: bool = False) -> None:
        """Do several writes of at most 8 bytes with one message, if the server takes that."""
        self._write(requests.region_write_multi(writes), posted=posted)

    def reset(self) -> None:
        """Reset the device."""
        self.call(requests.reset())

    def device_feature(
        self, flags: int, data: bytes = b"", argsz: int | None = None
    ) -> FeatureReply:
        """Get, set or probe a feature, see :func:`~viommu.vfio_user.requests.device_feature`."""
        return self.call(requests.device_feature(flags, data, argsz))

    def mig_data_read(self, size: int) -> bytes:
        """Read at most ``size`` bytes of the state of a device that is being saved."""
        return self.call(requests.mig_data_read(size))

    def mig_data_write(self, data: bytes) -> None:
        """Write a piece of the state of a device that is being restored."""
        self.call(requests.mig_data_write(data))

    def serve(self, until: Callable[[], bool]) -> None:
        """Serve the server's DMA_READ and DMA_WRITE until ``until()``, asked after each.

        Raises:
            PeerError: ETIMEDOUT when no command comes within the time-out.
        """
        while not until():
            self._serve_one()

    def _serve_one(self) -> None:
        served = self._link.dma.commands
        self._turn_until(lambda: self._link.dma.commands > served, "no command came")

    def _write(self, request: Request[None], *, posted: bool) -> None:
        if not posted:
            self.call(request)
            return
        self._check_open()
        refusal = self._link.post(request)
        if refusal is not None:
            raise refusal
        # The caller may not wait for anything any more: nothing must be left to send.
        self._turn_until(lambda: not self._link.sending, "the server does not read")

    def _turn_until(self, done: Callable[[], bool], why: str) -> None:
        self._check_open()
        deadline = self._loop.clock() + self._timeout
        while not done():
            left = deadline - self._loop.clock()
            if left <= 0:
                self._link.close()
                raise PeerError(errno.ETIMEDOUT, f"{why} within {self._timeout} s")
            self._loop.turn(left)
            self._check_open()

    def _check_open(self) -> None:
        if not self._link.closed:
            return
        news, self._news = self._news, None
        raise news or PeerError(errno.ENOTCONN, "the connection is closed")

    def _ended(self, why: PeerError) -> None:
        self._news = why
