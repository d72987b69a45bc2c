"""One virtio-iommu and the endpoints behind it, each on a vfio-user socket of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from viommu._version import __version__
from viommu.device import IommuConfig, VirtioIommu
from viommu.endpoints.emulated import EmulatedEndpoint
from viommu.endpoints.host import HostKind, HostPlace
from viommu.endpoints.opening import EndpointPlace, open_endpoint
from viommu.endpoints.registry import find_kind, parse_endpoint
from viommu.errors import UsageError
from viommu.memory import GuestMemory, MappedFiles
from viommu.memory.managed import ManagedMemory
from viommu.memory.regions import RegionManager
from viommu.vfio_user import Server
from viommu.virtio.iommu import VirtioIommuDevice
from viommu.virtio.pci import VirtioPciFunction
from viommu.vmm import check_topology, door_name, socket_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from viommu.endpoints.host import HostDevices, OpenEndpoint
    from viommu.errors import TranslationFault
    from viommu.loop import Loop
    from viommu.vfio_user import ServedDevice
    from viommu.vmm import Bdf

__all__ = ["Machine", "MachineOptions"]

_LISTED: Final = 4096  # mappings in a snapshot, the lowest ones of each domain in turn
_LISTED_TOGETHER: Final = 256  # mappings of a domain, regions, ...


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


class Machine:
    """Makes the functions and serves them until :meth:`close`.

    The IOVAs that the guest is offered are narrowed to what the IOMMUs of the host
    can map, if devices of the host are among the endpoints.

    ``refused`` is told, once for each client, why its guest memory can't be used.

    Raises:
        UsageError: Two functions share an address, a description is wrong, a
            socket path is too long or another server listens on it; or a device of
            the host can't map what the guest is to be offered.
        OSError: A socket or a disk image can't be opened.
        BackendError: The host does not let us have one of its devices.
    """

    def __init__(
        self, loop: Loop, options: MachineOptions, refused: Callable[[str], None] | None = None
    ) -> None:
        check_topology(options.iommu, [bdf for bdf, _ in options.endpoints])
        self.loop = loop
        self.options = options
        #: Guest memory as devices of the host see it: what the IOMMU's VMM maps, and BARs.
        self.regions = RegionManager()
        self._refused = refused
        self._files = MappedFiles()
        self._servers: dict[Bdf, Server] = {}
        self._endpoints: dict[Bdf, OpenEndpoint] = {}
        self._hosts: dict[str, HostDevices] = {}
        self._closing = contextlib.ExitStack()
        self._memory = ManagedMemory(self.regions)
        try:
            for bdf, description in options.endpoints:
                self._open_host_device(bdf, description)
            self._narrowed_by, config = self._narrow(options.config)
            self.iommu = VirtioIommu(config)
            self._device = VirtioIommuDevice(self.iommu, loop, self._suspect_memory)
            self._closing.callback(self._device.close)
            function = VirtioPciFunction(
                str(options.iommu), self._memory, self._device, self._memory
            )
            self._serve(options.iommu, function)
            for bdf, description in options.endpoints:
                self._add_endpoint(bdf, description)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop serving: clients are disconnected, sockets removed, devices and files closed."""
        self._closing.close()
        self._servers.clear()
        self._endpoints.clear()

    def choices(self) -> list[tuple[str, str]]:
        """Return what was chosen, a name and a value each: nothing is silently so."""
        config = self.iommu.config
        start, end = config.input_range
        narrowed = f", which is all that {self._narrowed_by} reaches" if self._narrowed_by else ""
        return [
            ("unattached endpoints", "bypass" if self.iommu.bypass else "blocked"),
            ("page sizes", f"{config.page_size_mask:#x}"),
            ("input range", f"[{start:#x}, {end:#x}){narrowed}"),
            ("domains", f"[{config.domain_range[0]:#x}, {config.domain_range[1]:#x})"),
            *self._backends(),
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
            "endpoints": [self._endpoint(bdf, text) for bdf, text in self.options.endpoints],
            # What devices of the host reach; the others read and write what VMMs share.
            "memory": _shortened(self.regions.snapshot()) if self._hosts else None,
        }

    def _backends(self) -> list[tuple[str, str]]:
        """Return what translates the DMA of endpoints, once where it is the same for all."""
        backends = {bdf: self._endpoints[bdf].backend for bdf, _ in self.options.endpoints}
        if len(set(backends.values())) > 1:
            return [(f"backend of {bdf}", backend) for bdf, backend in backends.items()]
        return [("backend", next(iter(backends.values()), EmulatedEndpoint.backend))]

    def _open_host_device(self, bdf: Bdf, description: str) -> None:
        """Open an endpoint that is a device of the host; others have no part in this."""
        name, options = parse_endpoint(description)
        kind = find_kind(name)
        if not isinstance(kind, HostKind):
            return
        if name not in self._hosts:
            self._hosts[name] = kind.start()
            self._closing.callback(self._hosts[name].close)
        place = HostPlace(
            str(bdf),
            GuestMemory(),
            self._memory,
            self.regions,
            self.loop,
            partial(self._withdrawn, bdf),
            partial(self._report_fault, bdf),
        )
        self._keep(bdf, self._hosts[name].open(place, options))

    def _narrow(self, config: IommuConfig) -> tuple[str, IommuConfig]:
        """Return the configuration that all endpoints can fulfil, and which one narrowed it."""
        start, end = config.input_range
        narrowed_by = ""
        for bdf, endpoint in self._endpoints.items():
            first, behind = endpoint.iova_range
            if first <= start and end <= behind:
                continue
            start, end, narrowed_by = max(start, first), min(end, behind), str(bdf)
            if start >= end:
                raise UsageError(f"{bdf} reaches [{first:#x}, {behind:#x}), which others don't")
        return narrowed_by, dataclasses.replace(config, input_range=(start, end))

    def _add_endpoint(self, bdf: Bdf, description: str) -> None:
        endpoint = self._endpoints.get(bdf)
        if endpoint is None:
            place = EndpointPlace(
                str(bdf),
                self.iommu.config.page_size_mask,
                self._memory,
                partial(self.iommu.report_fault, bdf.number),
                self.options.directory / door_name(bdf),
                self.loop,
            )
            endpoint = open_endpoint(description, place)
            self._keep(bdf, endpoint)
        self.iommu.add_endpoint(bdf.number, endpoint.mapper, reserved=endpoint.reserved)
        if endpoint.function is not None:
            self._serve(bdf, endpoint.function)

    def _keep(self, bdf: Bdf, endpoint: OpenEndpoint) -> None:
        self._endpoints[bdf] = endpoint
        self._closing.callback(endpoint.close)

    def _serve(self, bdf: Bdf, function: ServedDevice) -> None:
        path = self.options.directory / socket_name(bdf)
        self._servers[bdf] = Server(
            self.loop, function, path, self._files, on_memory_refused=self._refused
        )
        self._closing.callback(self._servers[bdf].close)

    def _withdrawn(self, bdf: Bdf) -> None:
        """Serve an endpoint no more: its device is going."""
        if bdf in self._servers:
            self._servers[bdf].close()

    def _report_fault(self, bdf: Bdf, fault: TranslationFault) -> None:
        self.iommu.report_fault(bdf.number, fault)

    def _suspect_memory(self, gpa: int) -> None:
        """Have it checked that we see what the driver writes there: it kicked for nothing."""
        self._servers[self.options.iommu].suspect_memory(gpa)

    def _domains(self) -> list[dict[str, object]]:
        """Describe every domain and, so that a look is short, not every mapping."""
        found: list[dict[str, object]] = []
        left = _LISTED
        for domain in self.iommu.domains.values():
            first = list(islice(domain.map, min(left, _LISTED_TOGETHER)))
            left -= len(first)
            found.append(
                {
                    "id": domain.id,
                    "kind": domain.kind.value,
                    "endpoints": [str(number) for number in sorted(domain.endpoints)],
                    "mappings": len(domain.map),
                    "ranges": [[m.iova, m.size, m.gpa, m.prot.letters] for m in first],
                }
            )
        return found

    def _endpoint(self, bdf: Bdf, description: str) -> dict[str, object]:
        seen, endpoint = self.iommu.endpoints[bdf.number], self._endpoints[bdf]
        server = self._servers.get(bdf)
        return {
            "bdf": str(bdf),
            "id": bdf.number,
            "description": description,
            "backend": endpoint.backend,
            # None: there is nothing that a VMM could connect to.
            "connected": None if server is None else server.connected,
            "kind": seen.kind.value,
            "domain": seen.domain.id if seen.domain else None,
            **endpoint.describe(),
        }


def _shortened(value: object) -> object:
    """Return a value for JSON whose lists are no longer than what one looks at."""
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value[:_LISTED_TOGETHER]]
    return value
