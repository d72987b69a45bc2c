"""A guest in Python whose endpoints are devices of this machine: drivers, sockets, a server."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from guest_tests.l1.function import host_device
from viommu.device import IommuConfig
from viommu.errors import Access
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.spec import pci
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import RequestType, Status
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.iommu_driver import IommuDriver
from viommu.testing.pci_driver import PciDriver
from viommu.testing.serving import LoopThread
from viommu.vfio_user.client import Client
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["DOMAIN", "IOMMU", "PassthroughGuest"]

IOMMU = "00:05.0"
DOMAIN = 3

_RAM_SIZE = 8 << 20
_SECONDS = 60.0  # this machine is emulated, and so is everything in it


class PassthroughGuest:
    """A served machine and its guest; a context manager.

    ``endpoints`` has the description of each endpoint by its address in the guest;
    devices of the host that are named in it are given to vfio-pci.
    """

    def __init__(self, endpoints: Mapping[str, str], *, boot_bypass: bool = False) -> None:
        self._closing = contextlib.ExitStack()
        for description in endpoints.values():
            _, found, address = description.partition("host=0000:")
            if found:
                host_device(address.partition(",")[0])
        try:
            self._serve(endpoints, boot_bypass=boot_bypass)
            self.ram = self._closing.enter_context(GuestRam(_RAM_SIZE))
            client = self.connect(IOMMU)
            self.iommu = self._closing.enter_context(
                IommuDriver(client, self.ram, timeout=_SECONDS)
            )
        except BaseException:
            self.close()
            raise

    def connect(self, bdf: str) -> Client:
        """Connect to a function, and give it guest memory as a VMM does."""
        path = self._directory / f"{bdf}.sock"
        client = self._closing.enter_context(Client(path, timeout=_SECONDS))
        self.ram.give(client)
        return client

    def edu(self, bdf: str) -> EduDriver:
        """Return a driver for the edu at ``bdf``, whose BAR is nowhere in guest memory."""
        return self._closing.enter_context(EduDriver(self.connect(bdf), timeout=_SECONDS))

    def function(self, bdf: str) -> PciDriver:
        """Return a driver for the function at ``bdf``."""
        return self._closing.enter_context(PciDriver(self.connect(bdf)))

    def attach(self, bdf: str, domain: int = DOMAIN, *, flags: int = 0) -> int | None:
        """Attach an endpoint and return the status."""
        return self.iommu.attach(domain, Bdf.parse(bdf).number, flags=flags)

    def detach(self, bdf: str, domain: int = DOMAIN) -> int | None:
        """Detach an endpoint and return the status."""
        return self.iommu.detach(domain, Bdf.parse(bdf).number)

    def map(
        self, iova: int, gpa: int, size: int = PAGE, access: Access = Access.READ | Access.WRITE
    ) -> None:
        """Map memory in the domain."""
        assert self.iommu.map(DOMAIN, iova, gpa, size, access) == Status.OK

    def map_bar(self, iova: int, gpa: int, size: int) -> None:
        """Map a BAR of another device in the domain."""
        flags = spec.MAP_F_READ | spec.MAP_F_WRITE | spec.MAP_F_MMIO
        request = spec.MAP.pack(RequestType.MAP, DOMAIN, iova, iova + size - 1, gpa, flags)
        assert self.iommu.request(request).status == Status.OK

    def unmap(self, iova: int, size: int = PAGE) -> None:
        """Unmap memory from the domain."""
        assert self.iommu.unmap(DOMAIN, iova, size) == Status.OK

    def page(self, content: bytes = b"") -> int:
        """Return the address of a page of guest memory that begins with ``content``."""
        gpa = self.ram.pages.allocate(PAGE)
        self.ram.memory.write(gpa, content.ljust(PAGE, b"\0"))
        return gpa

    def place(self, function: PciDriver, bar: int, address: int) -> None:
        """Write the address of a 64-bit BAR."""
        at = pci.BASE_ADDRESS_0 + 4 * bar
        function.config_write(at, address & 0xFFFFFFFF, 4)
        function.config_write(at + 4, address >> 32, 4)

    def call(self, method: str) -> object:
        """Call a method of the machine in its own thread, and return what it returns."""
        return self._server.call(getattr(self.machine, method))

    def close(self) -> None:
        """End drivers and server."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, endpoints: Mapping[str, str], *, boot_bypass: bool) -> None:
        self._directory = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
        options = MachineOptions(
            self._directory,
            Bdf.parse(IOMMU),
            [(Bdf.parse(bdf), description) for bdf, description in endpoints.items()],
            IommuConfig(boot_bypass=boot_bypass),
        )
        self._server = self._closing.enter_context(LoopThread(Loop()))
        self.machine = self._server.call(lambda: Machine(self._server.loop, options))
        self._closing.callback(lambda: self._server.call(self.machine.close))
