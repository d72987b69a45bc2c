"""An endpoint id whose device somebody else emulates, and only its DMA comes here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.basic import BasicMemoryMapper
from viommu.domain import X86_MSI_WINDOW
from viommu.iova import ADDRESS_SPACE_END
from viommu.ipc.server import ExportServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.errors import TranslationFault
    from viommu.ipc.hold import HoldPolicy
    from viommu.loop import Loop
    from viommu.memory import GuestMemory

__all__ = ["ExternalEndpoint"]


class ExternalEndpoint:
    """Implements :class:`~viommu.endpoints.host.OpenEndpoint`: a door for export sessions.

    The device is the client's business, and where it is on the VMM's bus as well. ``memory``
    is the guest's, as the IOMMU knows it; ``path`` where clients connect.

    Raises:
        UsageError: There can be no socket at ``path``.
    """

    reserved: Final = (X86_MSI_WINDOW,)
    iova_range: Final = (0, ADDRESS_SPACE_END)
    function: Final = None

    def __init__(
        self,
        name: str,
        path: Path,
        memory: GuestMemory,
        page_sizes: int,
        report: Callable[[TranslationFault], None],
        *,
        loop: Loop,
        policy: HoldPolicy,
    ) -> None:
        self.mapper = BasicMemoryMapper(page_sizes=page_sizes)
        self._exports = ExportServer(
            loop, name, self.mapper, memory, report, path=path, policy=policy
        )

    @property
    def backend(self) -> str:
        """What translates its DMA, and where whoever does it connects."""
        door = self._exports
        return f"export session of whoever uses {door.path}; to have it let go: {door.policy}"

    def describe(self) -> dict[str, object]:
        """Return its export session, its client, what that holds, and counters."""
        ledger = self.mapper.exports
        exports = self._exports.describe()
        counters = exports.pop("counters")
        assert isinstance(counters, dict)  # noqa: S101 - our own
        return {
            "session": ledger.state.value,
            "held": [list(held) for held in ledger.held()],
            "exports": exports,
            "counters": {"IOMMU faults": ledger.faults, **counters},
        }

    def close(self) -> None:
        """Disconnect the client, whose exports are released, and remove the socket."""
        self._exports.close()
