"""A machine, and a device of a process of its own behind its IOMMU; both in threads here."""

from __future__ import annotations

import contextlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from viommu.endpoints.standalone import StandaloneDevice
from viommu.errors import Access
from viommu.machine import Machine, MachineOptions
from viommu.spec.virtio_iommu import Status
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.iommu_driver import IommuDriver
from viommu.testing.serving import LoopThread
from viommu.vfio_user import Client
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Iterator

IOMMU: Final = Bdf.parse("00:05.0")
DEVICE: Final = Bdf.parse("00:06.0")
OTHER: Final = Bdf.parse("00:07.0")
RAM_SIZE: Final = 8 << 20
DISK_SIZE: Final = 1 << 20
DOMAIN: Final = 3
IOVA: Final = 0x5_0000_0000
READ_WRITE: Final = Access.READ | Access.WRITE


class Downstream:
    """A process with one device, as far as a socket can tell: it is killed and started again."""

    def __init__(self, description: str, path: Path) -> None:
        self.description = description
        self.path = path
        self._stack: contextlib.ExitStack | None = None

    def start(self) -> None:
        with contextlib.ExitStack() as stack:
            self._thread = stack.enter_context(LoopThread())
            loop, text = self._thread.loop, self.description
            self.device = self._thread.call(lambda: StandaloneDevice(loop, text, self.path))
            stack.callback(lambda: self._thread.call(self.device.close))
            self._stack = stack.pop_all()

    def maps(self) -> list[tuple[int, int, int]]:
        """What the device was told of: IOVA, size, offset in the file of guest memory."""

        def look() -> list[tuple[int, int, int]]:
            return [(r.gpa, r.size, r.offset) for r in self.device.memory.regions()]

        return self._thread.call(look)

    def kill(self) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()


class Chain:
    """A guest with an IOMMU and a device behind it, ``downstream``; and an ``edu`` of ours."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack, **options: Any) -> None:
        self.image = directory / "disk.img"
        self.image.write_bytes(os.urandom(DISK_SIZE))
        kind = options.pop("kind", "blk")
        text = f"blk,path={self.image}" if kind == "blk" else kind
        self.downstream = Downstream(text, directory / "device.sock")
        stack.callback(self.downstream.kill)
        self.downstream.start()
        self.server = stack.enter_context(LoopThread())
        words = ["vfio-user", f"socket={self.downstream.path}"]
        words += [f"{key}={value}" for key, value in options.items()]
        wanted = MachineOptions(directory, IOMMU, [(DEVICE, ",".join(words)), (OTHER, "edu")])
        self.machine = self.server.call(lambda: Machine(self.server.loop, wanted))
        stack.callback(lambda: self.server.call(self.machine.close))
        self._directory = directory
        self._stack = stack
        self.ram = stack.enter_context(GuestRam(RAM_SIZE))
        self.iommu = stack.enter_context(IommuDriver(self.connect(IOMMU), self.ram))
        assert self.iommu.probe(DEVICE.number)[0] == Status.OK

    def connect(self, bdf: Bdf) -> Client:
        client = self._stack.enter_context(Client(self._directory / f"{bdf}.sock"))
        self.ram.give(client)
        return client

    def attach(self, bdf: Bdf = DEVICE) -> None:
        assert self.iommu.attach(DOMAIN, bdf.number) == Status.OK

    def page(self, content: bytes = b"") -> int:
        gpa = self.ram.pages.allocate(PAGE)
        self.ram.memory.write(gpa, content.ljust(PAGE, b"\0"))
        return gpa

    def map(self, iova: int, gpa: int, size: int = PAGE, access: Access = READ_WRITE) -> None:
        assert self.iommu.map(DOMAIN, iova, gpa, size, access) == Status.OK

    def state(self) -> dict[str, Any]:
        """What the machine says of the device."""
        snapshot: Any = self.server.call(self.machine.snapshot)
        found: dict[str, Any] = snapshot["endpoints"][0]
        return found

    def ranges(self) -> list[tuple[int, int, int]]:
        """What the domain has mapped."""
        snapshot: Any = self.server.call(self.machine.snapshot)
        return [tuple(entry[:3]) for entry in snapshot["domains"][0]["ranges"]]


@contextmanager
def make_chain(**options: Any) -> Iterator[Chain]:
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="viommu-") as name, contextlib.ExitStack() as stack:
        yield Chain(Path(name), stack, **options)
