"""A PCI device that another process serves, served to a VMM: an interposer that outlives it."""

from __future__ import annotations

import contextlib
import errno
import logging
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from viommu.deferred import Deferred, all_done
from viommu.endpoints.remote.access import read_region, write_region
from viommu.endpoints.remote.config import RemoteConfig
from viommu.endpoints.remote.irqs import RemoteIrqs
from viommu.endpoints.remote.link import DeviceLink
from viommu.errors import BackendError, PeerError, ViommuError
from viommu.spec import pci, vfio
from viommu.vfio_user import requests
from viommu.vfio_user.loop_client import wait

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from viommu.endpoints.remote.companions import AccessFilter, Afterlife, LinkWatcher
    from viommu.endpoints.remote.description import Description
    from viommu.loop import Loop
    from viommu.memory import GuestMemory
    from viommu.vfio_user import IrqInfo, IrqLines, RegionInfo
    from viommu.vfio_user.dma_service import DmaPort
    from viommu.vfio_user.loop_client import LoopClient
    from viommu.vfio_user.protocol import Capabilities

__all__ = ["RemoteFunction"]

_log: Final = logging.getLogger(__name__)

_CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
_DEFAULT_TIMEOUT: Final = 4.0  # seconds: less than the 5 after which QEMU forgets what it asked


class RemoteFunction:
    """Implements :class:`~viommu.vfio_user.served.ServedDevice` over a vfio-user device.

    Configuration space and BARs are passed on message by message, or mapped by the
    VMM itself where the device allows that and ``mappable`` does; interrupts are the
    VMM's own eventfds. Every write is passed on with a reply, one after the other.

    A device that goes away, doesn't answer in time or answers nonsense is dead: reads
    give all ones (or what ``afterlife`` says), writes are dropped, and nothing fails.
    Once nothing of a guest's is in it, which a reset sees to, it is dialled again, and
    taken if it is the same as before. A VMM is not served before there is a device.

    Args:
        name: What messages call the device.
        memory: Where the server puts what the VMM shares; nothing here uses it.
        loop: Is turned until the device has described itself; not to be running yet.
        dial: Returns a socket that is connected to the device, whenever it is to be
            there (again); raises a ViommuError if it can't be.
        port: What the device reaches by DMA_READ and DMA_WRITE.
        watcher: Who gives the device its address space.
        afterlife: What a driver of the dead device needs not to hang.
        access_filter: What stands between the device and its driver.
        mappable: Whether VMMs may map BARs. A device whose BARs a VMM has mapped can't
            come back before the VMM does: its new memory can't get there.
        offers: What the device is offered, by default what fits ``port``.
        timeout: Seconds for any answer.
        connect_timeout: Seconds for all that a new connection takes, by default as long.

    Raises:
        UsageError: Nobody can be reached.
        BackendError: The device does not describe itself as what can be served.
    """

    num_regions: Final = vfio.PCI_NUM_REGIONS
    num_irqs: Final = vfio.PCI_NUM_IRQS

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        loop: Loop,
        dial: Callable[[], socket.socket],
        *,
        port: DmaPort | None = None,
        watcher: LinkWatcher | None = None,
        afterlife: Afterlife | None = None,
        access_filter: AccessFilter | None = None,
        mappable: bool = True,
        offers: Capabilities | None = None,
        timeout: float = _DEFAULT_TIMEOUT,
        connect_timeout: float | None = None,
    ) -> None:
        self.name = name
        self.memory = memory
        #: Accesses that the device refused, or that came when it was dead.
        self.refused = 0
        self.missed = 0
        self.deaths = 0
        #: Why there is no device, and since when.
        self.dead: tuple[str, datetime] | None = ("it is being connected", datetime.now(UTC))
        self._loop = loop
        self._watcher = watcher
        self._afterlife = afterlife
        self._filter = access_filter
        self._mappable = mappable
        self._device: Description
        self._config: RemoteConfig
        self._irqs: RemoteIrqs
        self._known = False  # whether there has been a device, of which those three are
        self._closed = False
        self._master = False
        self._in_use = False  # whether a driver has written anything since the last reset
        limit = timeout if connect_timeout is None else connect_timeout
        self._link = DeviceLink(
            loop, dial, self, port=port, offers=offers, timeout=timeout, connect_timeout=limit
        )
        self._connect_first()

    @property
    def client(self) -> LoopClient | None:
        """What reaches the device; ``None`` while it is dead."""
        return self._link.client

    def describe(self) -> dict[str, object]:
        """Return its state, ready for JSON."""
        state: dict[str, object] = {"state": self._link.state.value}
        if self.dead is not None:
            why, since = self.dead
            state["dead"] = {"why": why, "since": since.isoformat(timespec="seconds")}
        state["counters"] = {
            "deaths": self.deaths,
            "refused accesses": self.refused,
            "accesses of the dead": self.missed,
            "refused interrupts": self._irqs.refused,
        }
        return state

    def close(self) -> None:
        """Let go of the device; closing twice is harmless."""
        self._closed = True
        self._link.close()
        if self._known:
            self._irqs.leave()
            self._device.close()
        if self._afterlife is not None:
            self._afterlife.close()

    # ServedDevice.

    def region_info(self, index: int) -> RegionInfo:
        """Describe a BAR or configuration space; there is no ROM and no VGA."""
        return self._device.region_info(index, mappable=self._mappable)

    def irq_info(self, index: int) -> IrqInfo:
        """Describe one kind of interrupt."""
        return self._irqs.info(index)

    def region_read(self, index: int, offset: int, count: int) -> bytes | Deferred[bytes]:
        """Read from the device, or what is left of it."""
        client = self._link.client
        if client is None:
            return self._read_dead(index, offset, count)
        return self._read_alive(client, index, offset, count)

    def region_write(self, index: int, offset: int, data: bytes) -> Deferred[None] | None:
        """Write to the device; what it refuses is dropped, and so is what comes too late."""
        if index == _CONFIG:
            return self._write_config(offset, data)
        resets = self._afterlife is not None and self._afterlife.wrote(index, offset, data)
        if self._filter is not None:
            data = self._filter.passed(index, offset, data)
        client = self._link.client
        if client is not None:
            self._in_use = not resets
            return self._pass_on(client, index, offset, data)
        self.missed += 1
        if resets:
            self._revive()
        return None

    def connect(self, irqs: IrqLines) -> None:
        """Serve a VMM that has just come.

        Raises:
            PeerError: ENODEV, there is no device: a VMM needs one while it starts. It is
                dialled, for the next one.
        """
        if self.dead is not None:
            self._link.open()
            raise PeerError(errno.ENODEV, f"there is no device: {self.dead[0]}")
        self._irqs.follow(irqs)

    def disconnect(self) -> None:
        """Stop the device and reset it: the VMM has gone."""
        self._irqs.leave()
        self.reset()

    def reset(self) -> Deferred[None] | None:
        """Perform a system reset, or take the device again if it is dead."""
        self._forget_guest()
        client = self._link.client
        return self._revive() if client is None else self._reset_device(client)

    # LinkOwner.

    def accept(self, client: LoopClient, description: Description) -> Deferred[None]:
        """Take the device if it is what the VMM knows."""
        try:
            self._check_same(description)
        except PeerError:
            description.close()
            raise
        if not self._known or self._irqs.lines is None:
            self._take(description)
        else:
            description.close()  # the VMM has the files of the one before
        steps = []
        if self._watcher is not None:
            if (mapped := self._watcher.connected(client)) is not None:
                steps.append(mapped)
            self._watcher.bus_master(enabled=self._master)
        return all_done([*steps, self._reset_device(client)])

    def alive(self) -> None:
        """Give the device what it was reset without."""
        client = self._link.client
        assert client is not None  # noqa: S101 - that is what alive means
        self._irqs.connected(client)
        for offset, data in self._config.kept():
            self._pass_on(client, _CONFIG, offset, data)
        self.dead = None
        if self.deaths:
            _log.warning("%s: there is a device again", self.name)
        if self._afterlife is not None:
            self._afterlife.revived()

    def lost(self, why: PeerError) -> None:
        """Be dead."""
        self._irqs.lost()
        if self._watcher is not None:
            self._watcher.lost(why)
        if self.dead is not None or self._closed:
            return  # it was not in service yet, or is not any more
        self.deaths += 1
        self.dead = str(why), datetime.now(UTC)
        _log.warning("%s: the device is dead: %s", self.name, why)
        if self._afterlife is not None:
            self._afterlife.died(self._irqs.lines)
        if not self._in_use:
            self._link.keep_trying()

    def failed(self, why: ViommuError) -> None:
        """Stay dead, and try again later: a reset has left nothing of a guest's in the device."""
        if not self.deaths or self._closed:
            return  # __init__ says so, or nobody wants it
        if self.dead is not None and self.dead[0] != str(why):
            self.dead = str(why), self.dead[1]
            _log.warning("%s: there is still no device: %s", self.name, why)
        if self._afterlife is not None:
            self._afterlife.stayed_dead()
        self._link.keep_trying()

    # Inside: connecting.

    def _connect_first(self) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            why = wait(self._loop, self._link.open())
            if isinstance(why, PeerError):
                raise BackendError(why.errno, f"{self.name}: {why}")
            if why is not None:
                raise why
            undo.pop_all()

    def _check_same(self, description: Description) -> None:
        """Compare with the device that the VMM knows.

        Raises:
            PeerError: It is another one, or can't be reached by what the VMM has mapped.
        """
        if not self._known or self._irqs.lines is None:
            return
        if (what := self._device.change(description)) is not None:
            raise PeerError(errno.ESTALE, f"it is not the device that was there: {what}")
        bar = self._device.other_file(description) if self._mappable else None
        if bar is not None:
            why = f"the VMM has mapped BAR {bar} of the one before, and must come anew"
            raise PeerError(errno.ESTALE, why)

    def _take(self, description: Description) -> None:
        if self._known:
            self._device.close()
        self._known = True
        self._device = description
        self._config = RemoteConfig(description)
        self._irqs = RemoteIrqs(self.name, description.irqs, self._loop)
        for companion in (self._afterlife, self._filter):
            if companion is not None:
                companion.follow(description.config)

    def _revive(self) -> Deferred[None]:
        """Try to get a device; done when there is one, or none."""
        done: Deferred[None] = Deferred()
        self._link.open().then(lambda _: done.resolve(None))
        return done

    # Inside: resets.

    def _forget_guest(self) -> None:
        """Everything that a guest wrote is gone with a reset of the function."""
        self._in_use = False
        self._config.forget()
        self._set_master(enabled=False)
        if self._afterlife is not None:
            self._afterlife.reset()

    def _reset_device(self, client: LoopClient) -> Deferred[None]:
        """Stop the device and reset it, in whatever way it knows."""
        steps = [self._pass_on(client, _CONFIG, pci.COMMAND, bytes(2))]
        if self._device.can_reset:
            steps.append(self._noted(client, client.submit(requests.reset())))
        elif (write := self._config.reset_write()) is not None:
            steps.append(self._pass_on(client, _CONFIG, *write))
        return all_done(steps)

    def _reset_function(self, client: LoopClient, offset: int, data: bytes) -> Deferred[None]:
        """Pass the guest's reset on, and see whether DMA is still allowed after it.

        Not every device forgets its command register, and then the guest, which
        restores what differs, does not write it.
        """
        allowed = self._master
        done: Deferred[None] = Deferred()

        def read(answer: Deferred[bytes]) -> None:
            try:
                command = int.from_bytes(answer.result(), "little")
            except ViommuError:
                command = 0
            if not client.closed:
                self._config.keep_command(command if allowed else command & ~pci.COMMAND_MASTER)
            self._set_master(enabled=self._config.bus_master)
            done.resolve(None)

        self._in_use = False
        if self._afterlife is not None:
            self._afterlife.reset()
        self._pass_on(client, _CONFIG, offset, data)
        client.submit(requests.region_read(_CONFIG, pci.COMMAND, 2)).then(read)
        return done

    # Inside: accesses.

    def _write_config(self, offset: int, data: bytes) -> Deferred[None] | None:
        client = self._link.client
        data, resets = self._config.wrote(offset, data)
        if client is None:
            self.missed += 1
            if resets:
                self._forget_guest()
                return self._revive()
            self._set_master(enabled=self._config.bus_master)
            return None
        if resets:
            return self._reset_function(client, offset, data)
        master = self._config.bus_master
        if master:
            self._set_master(enabled=True)
        done = self._pass_on(client, _CONFIG, offset, data)
        if not master:
            self._set_master(enabled=False)
        return done

    def _set_master(self, *, enabled: bool) -> None:
        if enabled == self._master:
            return
        self._master = enabled
        if self._watcher is not None:
            self._watcher.bus_master(enabled=enabled)
        if self._afterlife is not None:
            self._afterlife.bus_master(enabled=enabled)

    def _pass_on(self, client: LoopClient, index: int, offset: int, data: bytes) -> Deferred[None]:
        """Write to the device; done whatever it answers."""
        return self._noted(client, write_region(client, index, offset, data))

    def _noted(self, client: LoopClient, asked: Deferred[None]) -> Deferred[None]:
        """Return what is done when ``asked`` is; a refusal is counted."""
        done: Deferred[None] = Deferred()

        def finish(answer: Deferred[None]) -> None:
            try:
                answer.result()
            except ViommuError:
                self.refused += not client.closed
            done.resolve(None)

        asked.then(finish)
        return done

    def _read_alive(
        self, client: LoopClient, index: int, offset: int, count: int
    ) -> Deferred[bytes]:
        shown: Deferred[bytes] = Deferred()

        def finish(answer: Deferred[bytes]) -> None:
            try:
                data = answer.result()
            except ViommuError:
                if client.closed:  # everybody will know in a moment, and then say what is left
                    late = partial(self._read_dead, index, offset, count)
                    self._loop.call_soon(lambda: shown.resolve(late()))
                    return
                self.refused += 1
                data = b"\xff" * count
            else:
                data = self._seen(index, offset, data)
            shown.resolve(data)

        read_region(client, index, offset, count).then(finish)
        return shown

    def _seen(self, index: int, offset: int, data: bytes) -> bytes:
        """Return what the guest sees of what the device has answered."""
        if index == _CONFIG:
            return self._config.seen(offset, data)
        if self._afterlife is not None:
            self._afterlife.answered(index, offset, data)
        return data if self._filter is None else self._filter.seen(index, offset, data)

    def _read_dead(self, index: int, offset: int, count: int) -> bytes:
        self.missed += 1
        left = None
        if index != _CONFIG and self._afterlife is not None:
            left = self._afterlife.read(index, offset, count)
        return b"\xff" * count if left is None else left
