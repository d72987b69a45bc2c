"""An endpoint that is emulated in this process, with its own address space and bus-master port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.basic import BasicMemoryMapper
from viommu.domain import X86_MSI_WINDOW
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.registry import make_endpoint
from viommu.iova import ADDRESS_SPACE_END
from viommu.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.errors import TranslationFault
    from viommu.loop import Loop

__all__ = ["EmulatedEndpoint"]


class EmulatedEndpoint:
    """Implements :class:`~viommu.endpoints.host.OpenEndpoint`.

    ``report`` is told of every access that the IOMMU blocks.

    Raises:
        UsageError: The description is wrong, or a file that it names can't be used.
    """

    backend: Final = "in this process (BasicMemoryMapper)"
    reserved: Final = (X86_MSI_WINDOW,)
    iova_range: Final = (0, ADDRESS_SPACE_END)

    def __init__(
        self,
        description: str,
        name: str,
        page_sizes: int,
        report: Callable[[TranslationFault], None],
        loop: Loop,
    ) -> None:
        memory = GuestMemory()
        self.mapper = BasicMemoryMapper(page_sizes=page_sizes)
        self.dma = EndpointDma(self.mapper, memory, report, loop)
        self.function = make_endpoint(description, name, memory, self.dma, loop)

    def describe(self) -> dict[str, object]:
        """Return its export session, what it holds, and counters."""
        exports = self.mapper.exports
        return {
            "session": exports.state.value,
            "held": [list(held) for held in exports.held()],
            "counters": {"blocked accesses": self.dma.blocked, "IOMMU faults": exports.faults},
        }

    def close(self) -> None:
        """Release what is held, and close its files."""
        self.dma.close()
        self.function.close()
