"""One function on a socket, with its loop in another thread."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from viommu.memory import MappedFiles
from viommu.testing.serving import LoopThread
from viommu.vfio_user.client import Client
from viommu.vfio_user.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.loop import Loop
    from viommu.pci.function import PciFunction

__all__ = ["connected", "served"]


@contextlib.contextmanager
def served(make: Callable[[Loop], PciFunction]) -> Iterator[Path]:
    """Serve what ``make`` returns and yield the socket's path."""
    with tempfile.TemporaryDirectory(prefix="viommu-") as directory, LoopThread() as thread:
        path = Path(directory) / "socket"

        def start() -> Server:
            return Server(thread.loop, make(thread.loop), path, MappedFiles())

        server = thread.call(start)
        try:
            yield path
        finally:
            thread.call(server.close)


@contextlib.contextmanager
def connected(make: Callable[[Loop], PciFunction]) -> Iterator[Client]:
    """Serve what ``make`` returns and yield a client of it."""
    with served(make) as path, Client(path) as client:
        yield client
