"""What the tests boot: a server with an IOMMU and three endpoints, a disk image, a guest."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from guest_tests.lab.initramfs import build
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.server import ViommuServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from guest_tests.lab.kernels import Kernel
    from guest_tests.lab.userland import Userland
    from viommu.vmm.qemu_binary import Qemu

__all__ = [
    "DISK",
    "DISK_SIZE",
    "EDU",
    "IOMMU",
    "MODES",
    "OTHER_EDU",
    "Lab",
    "Mode",
    "Rig",
    "endpoint_id",
]

IOMMU, EDU, DISK, OTHER_EDU = "00:05.0", "00:06.0", "00:07.0", "00:08.0"

DISK_SIZE = 64 << 20
_SETTLE_SECONDS = 20.0
_POLL_SECONDS = 0.02


class Mode(NamedTuple):
    """One way to boot: the kernel's command line, virtual CPUs, the server's options.

    The rest is what the guest is then expected to find.
    """

    command_line: str = ""
    smp: int = 1
    options: tuple[str, ...] = ()
    input_bits: int = 48
    page_mask: int = 0x40201000
    group_type: str = "DMA-FQ"


MODES = {
    "lazy": Mode(),
    "strict": Mode(
        command_line="iommu.strict=1",
        options=("--aw-bits", "39", "--page-sizes", "4K,2M"),
        input_bits=39,
        page_mask=0x201000,
        group_type="DMA",
    ),
    "passthrough": Mode(command_line="iommu.passthrough=1", group_type="identity"),
    "two-cpus": Mode(smp=2),
}


class Lab(NamedTuple):
    """What every boot takes from the lab."""

    qemu: Qemu
    userland: Userland


class Rig:
    """A server, its disk image, and the guest that uses them; a context manager that ends both.

    Booted when made; :meth:`boot` puts another QEMU on the same server. ``disk`` makes
    what the server is told of the disk from the path of its image, ``edu`` is what it is told
    of the first ``edu``; the other one is in the server's process. ``more`` are further
    endpoints by address, as ``--endpoint`` takes them.
    """

    def __init__(
        self,
        lab: Lab,
        kernel: Kernel,
        mode: Mode,
        directory: Path,
        *,
        reboots: bool = False,
        disk: Callable[[Path], str] = "blk,path={}".format,
        edu: str = "edu",
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.lab = lab
        self.kernel = kernel
        self.mode = mode
        self.disk = directory / "disk.img"
        self._directory = directory
        self._reboots = reboots
        self._closing = contextlib.ExitStack()
        with self.disk.open("wb") as image:
            image.truncate(DISK_SIZE)
        endpoints = {EDU: edu, DISK: disk(self.disk), OTHER_EDU: "edu", **(more or {})}
        self.server = ViommuServer(directory / "serve", IOMMU, endpoints, *mode.options)
        self._closing.callback(self.server.stop)
        try:
            self.boot()
        except BaseException as error:
            error.add_note(f"--- viommu serve ---\n{self.server.log()}")
            self._closing.close()
            raise

    def boot(self) -> None:
        """Start QEMU on the server and wait for the guest."""
        self.start()
        self.vm.wait_for_boot()

    def start(self) -> None:
        """Start QEMU on the server."""
        image = Image(self.kernel, build(self.kernel, self.lab.userland), self.mode.command_line)
        self.vm = VirtualMachine(
            self.lab.qemu,
            image,
            self.server.qemu_arguments(),
            self._directory,
            smp=self.mode.smp,
            reboots=self._reboots,
        )
        self._closing.callback(self.vm.kill)

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function in the guest; as :meth:`VirtualMachine.call`."""
        return self.vm.call(function, **arguments)

    def endpoint(self, bdf: str) -> dict[str, Any]:
        """Return what the server says of one endpoint."""
        found = self.server.snapshot()["endpoints"]
        return next(endpoint for endpoint in found if endpoint["bdf"] == bdf)

    def wait_until(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask the server until its snapshot fulfils ``condition``; return that snapshot."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            snapshot = self.server.snapshot()
            if condition(snapshot):
                return snapshot
            assert time.monotonic() < deadline, f"waited in vain until {what}: {snapshot}"
            time.sleep(_POLL_SECONDS)

    def wait_for_requests(self, count: int) -> None:
        """Wait until the guest has sent so many more requests to its IOMMU."""
        enough = self.server.snapshot()["iommu"]["counters"]["requests"] + count
        self.wait_until(
            f"{count} more requests",
            lambda snapshot: snapshot["iommu"]["counters"]["requests"] >= enough,
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End QEMU and the server."""
        self._closing.close()


def endpoint_id(bdf: str) -> int:
    """Return the endpoint number of a function: VIOT makes it the PCI requester ID."""
    bus, device, function = bdf.replace(".", ":").split(":")
    return int(bus, 16) << 8 | int(device, 16) << 3 | int(function)
