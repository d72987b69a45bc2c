"""A client that serves its memory whatever its driver does: it lives in a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import TYPE_CHECKING, TypeVar

from viommu.errors import PeerError
from viommu.testing.serving import LoopThread
from viommu.vfio_user import Client
from viommu.vfio_user.loop_client import LoopClient, dial

if TYPE_CHECKING:
    from pathlib import Path

    from viommu.deferred import Deferred
    from viommu.vfio_user.dma_service import DmaPort
    from viommu.vfio_user.requests import Request

T = TypeVar("T")


class BackgroundClient(Client):
    """A :class:`Client` for drivers that wait for interrupts while the device asks for memory."""

    def __init__(self, path: Path, memory: DmaPort | None = None) -> None:
        self._closed = False
        self._closing = contextlib.ExitStack()
        self._thread = self._closing.enter_context(LoopThread())
        self._link = self._thread.call(
            lambda: LoopClient(self._thread.loop, dial(path), memory=memory)
        )
        self._closing.callback(lambda: self._thread.call(self._link.close))
        self._join(self._link.negotiated)

    def close(self) -> None:
        """Close the connection; closing twice is harmless."""
        self._closed = True
        self._closing.close()

    def call(self, request: Request[T]) -> T:
        """Send a request and wait for the answer."""
        if self._closed:
            raise PeerError(errno.ENOTCONN, "the connection is closed")
        return self._join(self._thread.call(lambda: self._link.submit(request)))

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write, and wait also where no answer was wanted: order is all that matters here."""
        del posted
        super().region_write(region, offset, data)

    def _join(self, deferred: Deferred[T]) -> T:
        done = threading.Event()
        self._thread.call(lambda: deferred.then(lambda _: done.set()))
        assert done.wait(20), "no answer"
        return deferred.result()
