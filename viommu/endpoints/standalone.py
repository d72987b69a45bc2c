"""An endpoint as a device of its own, which any vfio-user client can use: no IOMMU anywhere."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from viommu._version import __version__
from viommu.endpoints.client_memory import ClientMemory
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.registry import make_endpoint
from viommu.memory import MappedFiles
from viommu.vfio_user import Server, ServerLimits
from viommu.vfio_user.ioas_table import IoasLimits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.errors import TranslationFault
    from viommu.loop import Loop

__all__ = ["StandaloneDevice"]

_log: Final = logging.getLogger(__name__)

_LOGGED_FAULTS: Final = 16


class StandaloneDevice:
    """Serves the endpoint of a description at ``path``, to one client after the other.

    The endpoint is the same as behind an IOMMU. Its DMA reaches what the client maps
    (DMA_MAP, or the IOAS that it attaches the device to), at the addresses and with
    the protection that it says. Memory that comes without a file is reached by
    DMA_READ and DMA_WRITE if the client serves them at any time; then this process
    waits for it, so one process has one device.

    ``refused`` is told, once for each client, why its memory can't be used.

    Raises:
        UsageError: The description is wrong, a file it names can't be used, or there
            can be no socket at ``path``.
    """

    def __init__(
        self,
        loop: Loop,
        description: str,
        path: Path,
        *,
        limits: ServerLimits | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> None:
        self._description = description
        self.memory = ClientMemory(loop)
        self.dma = EndpointDma(self.memory.mapper, self.memory, self._blocked, loop)
        self.function = make_endpoint(description, path.name, self.memory, self.dma, loop)
        try:
            self.server = Server(
                loop,
                self.function,
                path,
                MappedFiles(),
                limits or ServerLimits(iommufd=IoasLimits()),
                on_memory_refused=refused,
            )
        except BaseException:
            self.function.close()
            raise

    def close(self) -> None:
        """Disconnect the client, remove the socket, and close what the device has open."""
        self.server.close()
        self.dma.close()
        self.function.close()

    def snapshot(self) -> dict[str, object]:
        """Return the state of everything, ready for JSON.

        ``maps`` are what the device reaches: IOVA, size, offset in the client's file
        (``None``: reached by messages) and access. What its client has unmapped and it
        has not let go of yet is in ``held`` only: IOVA, size and how often.
        """
        mapper = self.memory.mapper
        return {
            "version": __version__,
            "pid": os.getpid(),
            "device": self._description,
            "socket": str(self.server.path),
            "connected": self.server.connected,
            "maps": [
                [region.gpa, region.size, region.offset if region.shared else None, region.access]
                for region in self.memory.regions()
                if mapper.find(region.gpa) is not None
            ],
            "held": [list(held) for held in mapper.exports.held()],
            "counters": {
                "clients": self.server.clients,
                "turned away": self.server.turned_away,
                "blocked accesses": self.dma.blocked,
                "IOMMU faults": mapper.exports.faults,
            },
        }

    def _blocked(self, fault: TranslationFault) -> None:
        """Log an access that the client's mappings don't allow; the device sees the error."""
        if self.dma.blocked <= _LOGGED_FAULTS:
            _log.warning("%s: %s", self.function.name, str(fault))
