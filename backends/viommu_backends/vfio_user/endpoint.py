"""A device that another process serves over vfio-user, as an endpoint behind our IOMMU."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.domain import X86_MSI_WINDOW
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.remote import RemoteFunction
from viommu.errors import PeerError, UsageError
from viommu.iova import ADDRESS_SPACE_END
from viommu.vfio_user import dial
from viommu.vfio_user.connection import peer_process
from viommu.vfio_user.loop_client import default_offers
from viommu.virtio.behind_iommu import BehindIommu
from viommu.virtio.undertaker import Undertaker
from viommu_backends.vfio_user.mapper import VfioUserMapper

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from viommu.deferred import Deferred
    from viommu.endpoints.host import HostPlace
    from viommu.vfio_user import LoopClient
    from viommu_backends.vfio_user.space import MemoryMode

__all__ = ["VfioUserEndpoint", "VfioUserOptions"]

_LISTED: Final = 256  # maps in a description


class VfioUserOptions(NamedTuple):
    """Where the device is, and how it is used.

    ``memory`` is ``shared`` or ``message``, ``timeout`` what it may take for an answer in
    seconds, and ``mappable`` whether the VMM may map its BARs.
    """

    socket: Path
    memory: MemoryMode = "shared"
    timeout: float = 4.0
    mappable: bool = True


class VfioUserEndpoint:
    """Implements :class:`~viommu.endpoints.host.OpenEndpoint`.

    Whatever it reads and writes by messages is translated and checked here; with
    ``memory="message"`` it can't do otherwise. What a disk leaves when it dies is
    reached in the same way.

    Raises:
        UsageError: Nobody listens there.
        BackendError: Whoever listens there is no device that can be used.
    """

    reserved: Final = (X86_MSI_WINDOW,)
    iova_range: Final = (0, ADDRESS_SPACE_END)

    def __init__(self, place: HostPlace, options: VfioUserOptions) -> None:
        self.mapper = VfioUserMapper(place.loop, memory=options.memory, max_hold=options.timeout)
        self._socket = options.socket
        self._peer = 0
        self._dma = EndpointDma(self.mapper, place.guest, place.report, place.loop)
        with contextlib.ExitStack() as closing:
            closing.callback(self.mapper.close)
            closing.callback(self._dma.close)
            registration = place.regions.register(self.mapper, place.name, self.mapper.needs)
            closing.callback(registration.release)
            self.function = RemoteFunction(
                place.name,
                place.memory,
                place.loop,
                self._dial,
                port=self._dma,
                watcher=_Watcher(self.mapper, self._dma),
                afterlife=Undertaker(place.name, self._dma, place.loop),
                access_filter=BehindIommu(),
                mappable=options.mappable,
                offers=self.mapper.offers(default_offers(serves=True)),
                timeout=options.timeout,
            )
            closing.callback(self.function.close)
            self._closing = closing.pop_all()

    @property
    def backend(self) -> str:
        """By what the device's DMA is translated, and what it gets of guest memory."""
        return f"a vfio-user device, {self.mapper.summary}"

    def describe(self) -> dict[str, object]:
        """Return its state, ready for JSON; ``maps`` are the device's, as a domain's are."""
        entries = self.mapper.entries()
        function, mapper = self.function.describe(), self.mapper.describe()
        counters = {
            **_take(function, "counters"),
            **_take(mapper, "counters"),
            "blocked accesses": self._dma.blocked,
        }
        return {
            "device": {
                "socket": str(self._socket),
                "process": self._peer or None,
                **function,
                **mapper,
                "maps": [
                    [entry.iova, entry.size, entry.gpa, entry.prot.letters]
                    for entry in islice(entries, _LISTED)
                ],
                "maps in all": len(entries),
            },
            "held": [list(held) for held in self.mapper.exports.held()],
            "counters": counters,
        }

    def close(self) -> None:
        """Disconnect from the device; closing twice is harmless."""
        self._closing.close()

    def _dial(self) -> socket.socket:
        try:
            sock = dial(self._socket)
        except PeerError as error:
            raise UsageError(str(error)) from error
        self._peer = peer_process(sock)
        return sock


class _Watcher:
    """Tells the mapper, and opens and closes the port for what is translated here."""

    def __init__(self, mapper: VfioUserMapper, dma: EndpointDma) -> None:
        self._mapper = mapper
        self._dma = dma

    def connected(self, client: LoopClient) -> Deferred[None]:
        """Have a device given its mappings."""
        return self._mapper.connected(client)

    def lost(self, why: PeerError) -> None:
        """Forget a device."""
        self._mapper.lost(why)

    def bus_master(self, *, enabled: bool) -> None:
        """Open the port or close it."""
        self._mapper.bus_master(enabled=enabled)
        self._dma.enabled = enabled


def _take(state: dict[str, object], key: str) -> dict[str, object]:
    part = state.pop(key)
    assert isinstance(part, dict)  # noqa: S101 - it is ours
    return part
