"""The memory mapper of a vfio-user device in another process: its maps are the guest's.

What the guest maps is recorded at once and sent; the device answers later. What leads to
guest memory becomes DMA_MAPs, one for each piece of memory that a mapping leads to, and
DMA_UNMAPs when it goes. A device that lets us choose IOVAs in I/O address spaces of its
own has one of these for each domain instead, and changes domains in one step.
"""

from __future__ import annotations

import errno
import logging
import mmap
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from viommu.basic import BasicMemoryMapper
from viommu.deferred import Deferred
from viommu.errors import BackendError, InternalError, PeerError
from viommu.iova import ADDRESS_SPACE_END
from viommu.mapper import AddMapResult, RemoveMapResult
from viommu.memory.dma_target import DmaNeeds, MemoryKind
from viommu.vfio_user import ioas_requests
from viommu_backends.host_map import HostMap, Piece
from viommu_backends.vfio_user.orders import OrderQueue
from viommu_backends.vfio_user.space import DeviceSpace, IoasSpace, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from viommu.errors import Access, ViommuError
    from viommu.events import Event
    from viommu.export import ExportLedger
    from viommu.loop import Loop
    from viommu.mapper import MappingInfo, MemoryMapper, MemRegion
    from viommu.memory.backing import FileBacking
    from viommu.memory.dma_target import AddressRange
    from viommu.vfio_user import LoopClient
    from viommu.vfio_user.protocol import Capabilities
    from viommu_backends.vfio_user.space import Entry, MemoryMode

__all__ = ["MAX_DMA_MAPS", "VfioUserMapper"]

_log: Final = logging.getLogger(__name__)

#: How many ranges a device takes that does not say ("max_dma_maps" of vfio-user).
MAX_DMA_MAPS: Final = 65535

_PAGE: Final = mmap.PAGESIZE
# How many orders are under way. A file descriptor in a socket counts against those that
# this process may have open, and there may be many devices.
_WINDOWS: Final = {"shared": 64, "message": 1024}
# Among IOVAs: a space as a whole.
_SPACE: Final = -1

_SUMMARIES: Final = {
    "shared": "guest memory shared by file descriptor: the device is trusted to keep to its maps",
    "message": "no file descriptor of guest memory: every access is translated and checked here",
}


class VfioUserMapper:
    """Satisfies :class:`~viommu.mapper.DeferredMapper` and ``SwitchingMapper``.

    It watches the connection to the device (``LinkWatcher``): one that comes (back) is
    given everything, one that goes holds nothing, and what the guest maps and unmaps
    meanwhile is recorded and succeeds. It is a DMA target as well, to be registered with
    the guest's memory (:attr:`needs`): before that nothing leads anywhere.

    Exports are translated here: DMA that the device does by messages goes through an
    :class:`~viommu.endpoints.dma.EndpointDma` over this mapper, and is checked.

    A device that refuses to unmap, or does not answer within ``max_hold`` seconds, is
    disconnected: what it can still reach then is not guest memory that others were given,
    unless it has mapped a file descriptor of it, which ``memory="shared"`` trusts it not
    to use.

    Args:
        loop: Where everything happens.
        memory: Whether the device gets file descriptors of guest memory (``shared``), or
            has to ask for every byte (``message``).
        limit: How many ranges the device is told of at most, if it takes that many.
        max_hold: How long a device may take to answer, in seconds.
    """

    def __init__(
        self, loop: Loop, *, memory: MemoryMode, limit: int = MAX_DMA_MAPS, max_hold: float = 4.0
    ) -> None:
        self.memory: Final = memory
        self.needs: Final = DmaNeeds.FILE if memory == "shared" else DmaNeeds.NONE
        #: The smallest page, and how many ranges the device takes.
        self.page_size = _PAGE
        self.limit = limit
        self.orders = OrderQueue(loop, patience=max_hold, cut_off=self._cut_off)
        self.attached: IoasSpace | None = None
        #: How often a device did not take memory that came by itself, and was cut off.
        self.refused_memory = 0
        self.cut_off = 0
        self._limit: Final = limit
        self._met = self._has_ioas = False
        self._client: LoopClient | None = None
        self._translations = BasicMemoryMapper()
        self._space = DeviceSpace(self)
        # All spaces that the device has: while it goes from one to another, two.
        self._hosts: dict[DeviceSpace, HostMap] = {self._space: HostMap(self._space)}
        # The IOVAs of mappings that were added since the device last had answered everything.
        self._fresh: set[int] = set()
        self._refusals: dict[int, BackendError] = {}

    # -- for people and tests --

    @property
    def host(self) -> HostMap:
        """What is mapped, and what of it the device was told."""
        return self._hosts[self._space]

    @property
    def protocol(self) -> str:
        """By which commands the device is told: ``IOAS`` or ``DMA_MAP``."""
        return "IOAS" if isinstance(self._space, IoasSpace) else "DMA_MAP"

    @property
    def summary(self) -> str:
        """What translates the device's DMA, for people."""
        return f"{self.protocol}, memory={self.memory} ({_SUMMARIES[self.memory]})"

    @property
    def exports(self) -> ExportLedger:
        """What clients hold."""
        return self._translations.exports

    def mappings(self) -> list[MappingInfo]:
        """Return what the guest mapped."""
        return self.host.mappings()

    def entries(self) -> list[MappingInfo]:
        """Return the device's maps, as they are when everything is answered."""
        return self.host.entries()

    def describe(self) -> dict[str, object]:
        """Return its state, ready for JSON."""
        return {
            "memory": self.memory,
            "protocol": self.protocol,
            "maps": len(self._space),
            "maps limit": self.limit,
            "unanswered": len(self.orders),
            "counters": {
                "orders": self.orders.answered,
                "refused BARs": self.host.refused_bars,
                "refused memory": self.refused_memory,
                "cut off": self.cut_off,
            },
        }

    # -- MemoryMapper --

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Map; see the contract. All pieces of memory that it leads to, or none.

        Raises:
            BackendError: ENOSPC, the device is told of as many ranges as it takes; EMFILE,
                no file descriptor is left here.
        """
        self._begin()
        if self._translations.add_map(mapping) is AddMapResult.OVERLAP_FAILURE:
            return AddMapResult.OVERLAP_FAILURE
        try:
            self._enter_space()
            self.host.add(mapping)
        except BackendError:
            self._translations.remove_map(mapping.iova, mapping.size)
            raise
        self._fresh.add(mapping.iova)
        return AddMapResult.OK

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Unmap; see the contract."""
        self._begin()
        removed = self.host.remove(iova_start, iova_start + size)
        if removed is None:
            return RemoveMapResult(ok=False)
        for mapping in removed:
            self._fresh.discard(mapping.iova)
            self._refusals.pop(mapping.iova, None)
        return self._translations.remove_map(iova_start, size)

    def get_mask(self) -> int:
        """Return every multiple of the device's smallest page."""
        return -self.page_size & ADDRESS_SPACE_END - 1

    def supports_detach(self) -> bool:
        """Return true: without maps the device reaches nothing."""
        return True

    def id(self) -> int:
        """Return a number no other mapper ever had."""
        return self._translations.id()

    def join(self, other: MemoryMapper) -> bool:
        """Return false: every device has address spaces of its own."""
        del other
        return False

    def reset_domain(self) -> Event | None:
        """Unmap everything; see the contract."""
        self._renew()
        return self._translations.reset_domain()

    def start_export_session(self) -> Event:
        """Start a session; see the contract."""
        return self._translations.start_export_session()

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Export a range; see the contract."""
        return self._translations.export(iova, size)

    def release(self, iova: int, size: int) -> None:
        """Release one export; see the contract."""
        self._translations.release(iova, size)

    def vfio_dma_map(self, iova: int, hva: int, size: int, prot: Access) -> AddMapResult:
        """Refuse: BARs are guest memory to this mapper, and come as pieces of it."""
        return self._translations.vfio_dma_map(iova, hva, size, prot)

    # -- DeferredMapper --

    def unsettled(self) -> Event | None:
        """Return an event for the device's last answer; see the contract."""
        return self.orders.unsettled()

    def take_refusal(self) -> BackendError | None:
        """Return what the device has refused first; see the contract."""
        refusals, self._refusals = self._refusals, {}
        return next(iter(refusals.values()), None)

    # -- SwitchingMapper --

    def switch(self, mappings: Iterable[MappingInfo], mates: Iterable[MemoryMapper]) -> bool:
        """Go to a new IOAS with ``mappings`` in one step, when all of them are in it.

        Not possible with a single address space, while clients hold exports, or
        while the device takes no more ranges.
        """
        del mates
        before = self._space
        if not isinstance(before, IoasSpace) or not before.opened or self.exports.total:
            return False
        if not self.orders.connected:
            return False
        space = IoasSpace(self)
        space.open()
        host = self._hosts[space] = HostMap(space, self.host.pieces())
        try:
            for mapping in mappings:
                host.add(mapping)
        except BackendError as error:
            _log.info("a domain is not entered in one step: %s", error)
            space.leave()
            del self._hosts[space]
            return False
        space.enter(whole=True)
        host.refused_bars = self.host.refused_bars
        self._space = space
        self._translations.reset_domain()
        self._refusals.clear()
        self._fresh = {_SPACE}
        for mapping in host.mappings():
            self._translations.add_map(mapping)
            self._fresh.add(mapping.iova)
        return True

    # -- DmaTarget --

    def map_dma(
        self,
        where: AddressRange,
        /,
        *,
        host_va: int | None,
        mappable: FileBacking | None,
        file_offset: int,
        writable: bool,
        kind: MemoryKind,
    ) -> None:
        """Let mappings that lead to ``where`` reach it; see the contract.

        Raises:
            BackendError: There is no file, or no room.
        """
        self._begin()
        device = kind is MemoryKind.DEVICE
        piece = Piece(where.start, where.size, host_va, mappable, file_offset, writable, device)
        done: list[HostMap] = []
        for host in self._hosts.values():
            try:
                host.add_memory(piece)
            except BackendError:
                for earlier in done:
                    earlier.remove_memory(where.start, where.end)
                raise
            done.append(host)

    def unmap_dma(self, where: AddressRange, /) -> None:
        """Withdraw whatever leads to ``where``; it is done when :meth:`settled`."""
        self._begin()
        for host in self._hosts.values():
            host.remove_memory(where.start, where.end)

    def settled(self) -> Deferred[None] | None:
        """Return a result for when the device has answered everything; ``None``: it has."""
        return self.orders.settled()

    # -- LinkWatcher --

    def offers(self, capabilities: Capabilities) -> Capabilities:
        """Return what a client that offers ``capabilities`` should offer the device."""
        if self.memory == "message":
            return capabilities
        return replace(capabilities, iommufd=True, fixed_iova=True)

    def connected(self, client: LoopClient) -> Deferred[None]:
        """Give a device everything, now that it is there; done when it has it.

        It must not be able to do DMA before. A device that can't hold what the guest has
        mapped is given up, and the result is there too.
        """
        if self._client is not None:
            self.lost(PeerError(errno.ENOTCONN, "another device has come"))
        self._fresh.clear()
        self._client = client
        try:
            self._meet(client.capabilities)
            self.orders.connect(client, _WINDOWS[self.memory])
            self._fill()
        except (BackendError, PeerError) as error:
            self._cut_off(PeerError(error.errno, f"not a device to go on with: {error}"))
        self.orders.flush()
        settled = self.orders.settled()
        if settled is None:
            settled = Deferred()
            settled.resolve(None)
        return settled

    def lost(self, why: PeerError) -> None:
        """Forget the device: it has nothing any more, and will answer nothing."""
        del why
        self._client = None
        self.attached = None
        self._hosts = {self._space: self.host}
        self._fresh.clear()
        self.orders.disconnect()

    def bus_master(self, *, enabled: bool) -> None:
        """Do nothing: a device that may not do DMA has its maps all the same."""

    def close(self) -> None:
        """Forget the device for good; closing twice is harmless."""
        self.lost(PeerError(errno.ENOTCONN, "closed"))
        self.orders.close()

    # -- SpaceOwner --

    def check_room(self) -> None:
        """Raise unless the device can be told of one more range.

        Raises:
            BackendError: ENOSPC.
        """
        there = sum(map(len, self._hosts))
        if there >= self.limit:
            raise BackendError(
                errno.ENOSPC, f"the device takes {self.limit} maps and has {there} of them"
            )

    def entry_refused(self, space: DeviceSpace, entry: Entry, error: BackendError) -> None:
        """Undo what the device has only a part of, if somebody waits to hear of it."""
        host = self._hosts[space]
        mapping = host.refuse(entry.iova)
        assert mapping is not None  # noqa: S101 - what a space has, its host map has
        device = entry.piece.device
        if mapping.iova in self._fresh and not (device and entry.piece.size != mapping.size):
            self._refusals.setdefault(mapping.iova, error)
            host.withdraw(mapping)
            if isinstance(space, IoasSpace):
                space.spoil(error)
        elif device:
            host.tolerate(error)
        else:
            self.refused_memory += 1
            # A guest may cause it as often as it likes: 1st, 2nd, 4th, 8th ...
            if not self.refused_memory & (self.refused_memory - 1):
                _log.error("guest memory is out of a device's reach: %s", error)

    def space_refused(self, space: IoasSpace, error: BackendError) -> None:
        """Tell whoever waits to hear of it; without, the device is of no use."""
        if space is not self._space:
            return
        if _SPACE in self._fresh:
            self._refusals.setdefault(_SPACE, error)
        else:
            self._cut_off(PeerError(error.errno, f"not a device to go on with: {error}"))

    def entered(self, space: IoasSpace) -> None:
        """Destroy the spaces that the device has left."""
        self.attached = space
        for other in [*self._hosts]:
            if other is not space and other is not self._space:
                other.leave()
                del self._hosts[other]

    def distrust(self, what: str, error: ViommuError) -> None:
        """Cut off a device that has not let go of ``what``."""
        self._cut_off(PeerError(errno.EPROTO, f"the device has not let go of {what}: {error}"))

    # -- inside --

    def _begin(self) -> None:
        """Forget who waits for what, if everything is answered."""
        if not len(self.orders):
            self._fresh.clear()

    def _cut_off(self, why: PeerError) -> None:
        client = self._client
        self.cut_off += 1
        self.lost(why)
        if client is not None:
            client.give_up(why)

    def _meet(self, theirs: Capabilities) -> None:
        """Take note of what the device can do.

        Raises:
            BackendError: It can't do what is needed.
        """
        pages = theirs.pgsizes or _PAGE
        page = max(pages & -pages, _PAGE)
        if self._met and page > self.page_size:
            raise BackendError(
                errno.EINVAL, f"its smallest page is {page:#x}, {self.page_size:#x} was told before"
            )
        if self.memory == "shared" and not theirs.max_msg_fds:
            raise BackendError(errno.EINVAL, "it takes no file descriptors: use memory=message")
        if not self._met:
            self._met, self.page_size = True, page
        most = MAX_DMA_MAPS if theirs.max_dma_maps is None else theirs.max_dma_maps
        self.limit = min(self._limit, most)
        self._has_ioas = self.memory == "shared" and theirs.iommufd and theirs.fixed_iova

    def _fill(self) -> None:
        """Tell a new device of everything.

        Raises:
            BackendError: It has no room.
        """
        before, host = self._space, self.host
        space = self._space = self._new_space()
        self._hosts = {space: HostMap(space)}
        if isinstance(space, IoasSpace):
            self.orders.add(Step(ioas_requests.bind_iommufd, lambda _: None, self._not_bound))
            if len(host):
                space.open()
        try:
            self._hosts[space] = host.moved_to(space)
        except BackendError:
            self._space, self._hosts = before, {before: host}
            raise
        if isinstance(space, IoasSpace) and space.opened:
            space.enter()

    def _new_space(self) -> DeviceSpace:
        return IoasSpace(self) if self._has_ioas else DeviceSpace(self)

    def _not_bound(self, error: ViommuError) -> None:
        self._cut_off(PeerError(errno.EPROTO, f"not a device to go on with: BIND: {error}"))

    def _enter_space(self) -> None:
        """Have the device in an IOAS, where it has any.

        Raises:
            BackendError: It has refused.
        """
        space = self._space
        if not isinstance(space, IoasSpace) or not self.orders.connected:
            return
        if space.failed is not None:
            if len(self.host):
                raise space.failed
            self._renew()
            space = self._space
        if isinstance(space, IoasSpace) and not space.opened:
            space.open()
            space.enter()
            self._fresh.add(_SPACE)

    def _renew(self) -> None:
        """Have an empty space instead of all that there are."""
        before = self.host
        for space in self._hosts:
            space.leave()
        self._space = self._new_space()
        self._hosts = {self._space: HostMap(self._space, before.pieces())}
        self.host.refused_bars = before.refused_bars
        self._fresh.clear()
        self._refusals.clear()

    def _check(self) -> None:
        """Raise InternalError when an invariant is broken."""
        for host in self._hosts.values():
            host._check()  # noqa: SLF001 - the invariants of our own part
        self._translations._check()  # noqa: SLF001 - likewise
        if self._translations.mappings() != self.host.mappings():
            raise InternalError("what is translated is not what is mapped")
