"""An endpoint in a process of its own: ``python -m viommu.endpoints.worker``.

The endpoint is the same as in the server's process. It serves a vfio-user client, the
server, on one inherited socket; its DMA goes through an export session on another.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.registry import make_endpoint
from viommu.endpoints.worker_process import WorkerOrder
from viommu.errors import ExportError, PeerError, UsageError
from viommu.ipc.client import ExportClient
from viommu.loop import Loop
from viommu.memory import GuestMemory, MappedFiles
from viommu.vfio_user.served_client import ServedClient

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "work"]

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_PATIENCE: Final = (
    60.0  # seconds; a server that has ended is noticed at once, one that is slow isn't
)
_CANNOT: Final = 1  # exit status: the endpoint can't be made


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what a command line orders; return the exit status."""
    order = WorkerOrder.parse(list(sys.argv[1:] if arguments is None else arguments))
    _end_with(order.server)
    # What a terminal sends to everybody is for the server: it ends us when it is ready to.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=order.level,
        format=f"{order.name} (process {os.getpid()}) %(name)s: %(message)s",
        stream=sys.stderr,
    )
    device = socket.socket(fileno=order.device)
    exports = socket.socket(fileno=order.exports)
    return work(order.name, order.description, device, exports)


def work(name: str, description: str, device: socket.socket, exports: socket.socket) -> int:
    """Serve an endpoint until either socket is closed; return the exit status."""
    with contextlib.closing(Loop()) as loop, contextlib.ExitStack() as closing:
        closing.enter_context(device)
        try:
            client = ExportClient(exports, timeout=_PATIENCE, on_lost=lambda _: loop.stop())
        except PeerError:
            return _CANNOT  # the server has gone before it began
        closing.callback(client.close)
        dma = EndpointDma(client, client.memory, client.report_fault, loop)
        closing.callback(dma.close)
        memory = GuestMemory()  # the server maps nothing here: memory comes by exports
        try:
            function = make_endpoint(description, name, memory, dma, loop)
        except UsageError as error:
            client.leave(str(error))
            return _CANNOT
        closing.callback(function.close)
        served = ServedClient(loop, function, device, MappedFiles(), on_gone=lambda _: loop.stop())
        closing.callback(served.close)

        def attend() -> None:
            with contextlib.suppress(ExportError):
                client.attend()

        loop.on_readable(client, attend)
        loop.run()
        if client.fileno() >= 0:
            loop.forget(client)
    return 0


def _end_with(server: int) -> None:
    """Have the kernel kill this process when the server's ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:  # it ended before we asked
        sys.exit(_CANNOT)


if __name__ == "__main__":
    sys.exit(main())
