"""An endpoint that is emulated in a process of its own, behind an export session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.basic import BasicMemoryMapper
from viommu.domain import X86_MSI_WINDOW
from viommu.endpoints.dma import EndpointDma
from viommu.endpoints.remote import RemoteFunction
from viommu.endpoints.supervisor import Supervisor
from viommu.errors import BackendError, UsageError
from viommu.iova import ADDRESS_SPACE_END
from viommu.ipc.server import ExportServer
from viommu.memory import GuestMemory
from viommu.virtio.undertaker import Undertaker

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.errors import PeerError, TranslationFault
    from viommu.ipc.hold import HoldPolicy
    from viommu.loop import Loop
    from viommu.vfio_user.loop_client import LoopClient

__all__ = ["OwnProcessEndpoint"]

_START_TIME: Final = 20.0  # seconds for a process to start and describe its device


class OwnProcessEndpoint:
    """Implements :class:`~viommu.endpoints.host.OpenEndpoint` for an emulated endpoint.

    The VMM is served here, whatever becomes of the process. When that dies, all that it
    held is released, the driver of its device is told, and the next reset starts another.

    ``description`` is without the options that put it here. ``policy`` is for a process
    that does not let go of memory, ``report`` is told of accesses that the IOMMU blocks.

    Raises:
        UsageError: The description is wrong, or a file that it names can't be used.
        BackendError: No process can be started, or it does not become ready.
    """

    reserved: Final = (X86_MSI_WINDOW,)
    iova_range: Final = (0, ADDRESS_SPACE_END)

    def __init__(
        self,
        description: str,
        name: str,
        page_sizes: int,
        report: Callable[[TranslationFault], None],
        loop: Loop,
        *,
        policy: HoldPolicy,
    ) -> None:
        memory = GuestMemory()
        self.mapper = BasicMemoryMapper(page_sizes=page_sizes)
        self._exports = ExportServer(
            loop, name, self.mapper, memory, report, policy=policy, on_gone=self._client_gone
        )
        self._heir = _Heir(name, EndpointDma(self.mapper, memory, report, loop), loop)
        self._supervisor = Supervisor(loop, name, description, self._exports, self._heir.bar)
        try:
            self.function = RemoteFunction(
                name,
                memory,
                loop,
                self._supervisor.dial,
                watcher=self,
                afterlife=self._heir,
                connect_timeout=_START_TIME,
            )
        except (BackendError, UsageError) as error:
            self._close_process()
            if self._exports.farewell:
                raise UsageError(f"{name}: {self._exports.farewell}") from error
            raise

    @property
    def backend(self) -> str:
        """What translates its DMA, and which process does it."""
        pid = self._supervisor.pid
        process = "no process now" if pid is None else f"process {pid}"
        return f"export session of {process}, its own; to have it let go: {self._exports.policy}"

    def describe(self) -> dict[str, object]:
        """Return its process, its export session, what it holds, and counters."""
        ledger, supervisor = self.mapper.exports, self._supervisor
        exports, device = self._exports.describe(), self.function.describe()
        return {
            "session": ledger.state.value,
            "held": [list(held) for held in ledger.held()],
            "process": {
                "pid": supervisor.pid,
                "starts": supervisor.starts,
                "ended": supervisor.ended,
            },
            "exports": exports,
            "device": device,
            "counters": {
                "IOMMU faults": ledger.faults,
                **_counters(exports),
                **_counters(device),
            },
        }

    def close(self) -> None:
        """End the process and release what it holds; closing twice is harmless."""
        self.function.close()
        self._close_process()

    # LinkWatcher.

    def connected(self, client: LoopClient) -> None:
        """Nothing is to be told to a new process: it exports what it needs."""

    def lost(self, why: PeerError) -> None:
        """End a process that does not serve its device any more."""
        del why
        self._supervisor.kill()

    def bus_master(self, *, enabled: bool) -> None:
        """The device itself follows the guest in this."""

    def _client_gone(self, why: str) -> None:
        """A process without its export session is of no use."""
        del why
        self._supervisor.kill()

    def _close_process(self) -> None:
        self._supervisor.close()
        self._exports.close()
        self._heir.close()


class _Heir(Undertaker):
    """Ends the requests of a dead device, once its process is gone.

    Until then that may still be at work in the same memory, and its session is open.
    """

    def __init__(self, name: str, dma: EndpointDma, loop: Loop) -> None:
        super().__init__(name, dma, loop)
        self._dma = dma
        self._allowed = False  # by the guest
        self._barred = False

    def bar(self, barred: bool) -> None:  # noqa: FBT001  # called by position, with what is so
        """Keep away while there is a process."""
        self._barred = barred
        self._follow()

    def bus_master(self, *, enabled: bool) -> None:
        """Follow COMMAND.BUS_MASTER, as far as it may."""
        self._allowed = enabled
        self._follow()

    def close(self) -> None:
        """Do nothing any more, and hold nothing."""
        super().close()
        self._dma.close()

    def _follow(self) -> None:
        enabled = self._allowed and not self._barred
        self._dma.enabled = enabled
        super().bus_master(enabled=enabled)
        if not enabled:
            self._dma.leave()  # the session is the process's from now on


def _counters(description: dict[str, object]) -> dict[str, object]:
    """Return the counters of a part, to be shown among those of the endpoint."""
    counters = description.pop("counters")
    assert isinstance(counters, dict)  # noqa: S101 - both parts have them
    return counters
