"""One virtio-iommu and the endpoints behind it, each on a vfio-user socket of its own."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from viommu._version import __version__
from viommu.basic import BasicMemoryMapper
from viommu.device import IommuConfig, VirtioIommu
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.registry import make_endpoint
from viommu.errors import Access
from viommu.memory import GuestMemory, MappedFiles
from viommu.vfio_user import Server
from viommu.virtio.iommu import VirtioIommuDevice
from viommu.virtio.pci import VirtioPciFunction
from viommu.vmm import check_topology, socket_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from viommu.loop import Loop
    from viommu.pci.function import PciFunction
    from viommu.vmm import Bdf

__all__ = ["Machine", "MachineOptions"]

_LISTED: Final = 4096  # mappings in a snapshot, the lowest ones of each domain in turn
_LISTED_OF_DOMAIN: Final = 256


@dataclass(frozen=True)
class MachineOptions:
    """What to serve: where the IOMMU is, and for each endpoint its address and description.

    ``endpoints`` pairs an address with what :mod:`viommu.endpoints.registry`
    reads, such as ``blk,path=disk.img``. Sockets are made in ``directory``.
    """

    directory: Path
    iommu: Bdf
    endpoints: Sequence[tuple[Bdf, str]] = ()
    config: IommuConfig = field(default_factory=IommuConfig)


@dataclass
class _Endpoint:
    """An endpoint and everything that was made for it."""

    bdf: Bdf
    description: str
    mapper: BasicMemoryMapper
    dma: EndpointDma
    function: PciFunction


class Machine:
    """Makes the functions and serves them until :meth:`close`.

    ``refused`` is told, once for each client, why its guest memory can't be used.

    Raises:
        UsageError: Two functions share an address, a description is wrong, a
            socket path is too long or another server listens on it.
        OSError: A socket or a disk image can't be opened.
    """

    def __init__(
        self, loop: Loop, options: MachineOptions, refused: Callable[[str], None] | None = None
    ) -> None:
        check_topology(options.iommu, [bdf for bdf, _ in options.endpoints])
        self.loop = loop
        self.options = options
        self.iommu = VirtioIommu(options.config)
        self._refused = refused
        self._files = MappedFiles()
        self._servers: dict[Bdf, Server] = {}
        self._endpoints: list[_Endpoint] = []
        self._device = VirtioIommuDevice(self.iommu, loop, self._suspect_memory)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            memory = GuestMemory()
            function = VirtioPciFunction(str(options.iommu), memory, self._device, memory)
            self._serve(options.iommu, function)
            for bdf, description in options.endpoints:
                self._add_endpoint(bdf, description)
            undo.pop_all()

    def close(self) -> None:
        """Stop serving: clients are disconnected, sockets removed, files closed."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        for endpoint in self._endpoints:
            endpoint.dma.close()
            endpoint.function.close()
        self._endpoints.clear()
        self._device.close()

    def choices(self) -> list[tuple[str, str]]:
        """Return what was chosen, a name and a value each: nothing is silently so."""
        config = self.options.config
        start, end = config.input_range
        return [
            ("unattached endpoints", "bypass" if self.iommu.bypass else "blocked"),
            ("page sizes", f"{config.page_size_mask:#x}"),
            ("input range", f"[{start:#x}, {end:#x})"),
            ("domains", f"[{config.domain_range[0]:#x}, {config.domain_range[1]:#x})"),
            ("backend", "in this process (BasicMemoryMapper)"),
            ("guest memory", "shared by file descriptor"),
            ("ring", "split, INDIRECT_DESC, EVENT_IDX"),
            ("polling", "off: a kick for each batch"),
            (
                "limits",
                ", ".join(f"{name} {value}" for name, value in vars(config.limits).items()),
            ),
        ]

    def snapshot(self) -> dict[str, object]:
        """Return the state of everything, ready for JSON."""
        iommu = self.iommu
        return {
            "version": __version__,
            "pid": os.getpid(),
            "directory": str(self.options.directory),
            "choices": dict(self.choices()),
            "iommu": {
                "bdf": str(self.options.iommu),
                "bypass": iommu.bypass,
                "connected": self._servers[self.options.iommu].connected,
                "counters": {
                    "requests": iommu.requests,
                    "refused": iommu.refused,
                    "parked": self._device.parked_total,
                    "mappings": iommu.mappings,
                    "faults": iommu.faults,
                    "faults dropped": iommu.faults_dropped,
                },
                "waiting": self._device.waiting,
            },
            "domains": self._domains(),
            "endpoints": [self._endpoint(endpoint) for endpoint in self._endpoints],
        }

    def _serve(self, bdf: Bdf, function: PciFunction) -> None:
        path = self.options.directory / socket_name(bdf)
        self._servers[bdf] = Server(
            self.loop, function, path, self._files, on_memory_refused=self._refused
        )

    def _suspect_memory(self, gpa: int) -> None:
        """Have it checked that we see what the driver writes there: it kicked for nothing."""
        self._servers[self.options.iommu].suspect_memory(gpa)

    def _add_endpoint(self, bdf: Bdf, description: str) -> None:
        memory = GuestMemory()
        mapper = BasicMemoryMapper(page_sizes=self.options.config.page_size_mask)
        self.iommu.add_endpoint(bdf.number, mapper)
        dma = EndpointDma(mapper, memory, partial(self.iommu.report_fault, bdf.number), self.loop)
        function = make_endpoint(description, str(bdf), memory, dma, self.loop)
        self._endpoints.append(_Endpoint(bdf, description, mapper, dma, function))
        self._serve(bdf, function)

    def _domains(self) -> list[dict[str, object]]:
        """Describe every domain and, so that a look is short, not every mapping."""
        found: list[dict[str, object]] = []
        left = _LISTED
        for domain in self.iommu.domains.values():
            first = list(islice(domain.map, min(left, _LISTED_OF_DOMAIN)))
            left -= len(first)
            found.append(
                {
                    "id": domain.id,
                    "kind": domain.kind.value,
                    "endpoints": [str(number) for number in sorted(domain.endpoints)],
                    "mappings": len(domain.map),
                    "ranges": [[m.iova, m.size, m.gpa, _letters(m.prot)] for m in first],
                }
            )
        return found

    def _endpoint(self, endpoint: _Endpoint) -> dict[str, object]:
        seen = self.iommu.endpoints[endpoint.bdf.number]
        exports = endpoint.mapper.exports
        return {
            "bdf": str(endpoint.bdf),
            "id": endpoint.bdf.number,
            "description": endpoint.description,
            "connected": self._servers[endpoint.bdf].connected,
            "kind": seen.kind.value,
            "domain": seen.domain.id if seen.domain else None,
            "session": exports.state.value,
            "held": [list(held) for held in exports.held()],
            "counters": {"blocked accesses": endpoint.dma.blocked, "IOMMU faults": exports.faults},
        }


def _letters(prot: Access) -> str:
    """Write a protection as ``rw``, ``r-``, ``-w`` or ``--``."""
    return ("r" if Access.READ in prot else "-") + ("w" if Access.WRITE in prot else "-")
