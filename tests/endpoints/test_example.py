"""The example device of the documents, behind a socket."""

from __future__ import annotations

import importlib
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.background_client import BackgroundClient
from viommu.endpoints.registry import find_kind
from viommu.endpoints.standalone import StandaloneDevice
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.pci_driver import PciDriver, wait_for
from viommu.testing.serving import LoopThread

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"
RAM_SIZE = 2 << 20
DONE, OUT_OF_REACH = 1, 2


@pytest.fixture(autouse=True)
def path_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


class Driver:
    """A driver of the device, which has all of ``ram`` at the same addresses."""

    def __init__(self, client: BackgroundClient, ram: GuestRam) -> None:
        self.crc = importlib.import_module("crc")
        self.ram = ram
        self.pci = PciDriver(client)
        self.pci.set_bus_master()
        self.event = self.pci.enable_msi()

    def work(self, address: int, size: int) -> tuple[int, int]:
        """Let the device work; return status and result."""
        self.pci.write(0, self.crc.STATUS, 0, 4)
        self.pci.write(0, self.crc.ADDRESS, address, 8)
        self.pci.write(0, self.crc.SIZE, size, 8)
        wait_for(self.event, lambda: self.status != 0, 20, "end")
        return self.status, self.pci.read(0, self.crc.CRC, 4)

    @property
    def status(self) -> int:
        return self.pci.read(0, self.crc.STATUS, 4)


@pytest.fixture(params=["shared", "by message"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    path = tmp_path / "crc.sock"
    with LoopThread() as thread, GuestRam(RAM_SIZE) as ram:
        device = thread.call(lambda: StandaloneDevice(thread.loop, "crc:KIND", path))
        client = BackgroundClient(path, ram.memory)
        client.dma_map(0, RAM_SIZE, fd=ram._fd if request.param == "shared" else None)
        ram.memory.write(0, os.urandom(RAM_SIZE))
        driver = Driver(client, ram)
        yield driver
        driver.pci.close()
        client.close()
        thread.call(device.close)


@pytest.mark.parametrize(
    ("address", "size"), [(0, 0), (0, 1), (PAGE - 1, 2), (5, 100_000), (PAGE, 1 << 20)]
)
def test_it_works_out_what_it_should(driver: Driver, address: int, size: int) -> None:
    expected = zlib.crc32(driver.ram.memory.read(address, size))
    assert driver.work(address, size) == (DONE, expected)


@pytest.mark.parametrize(("address", "size"), [(RAM_SIZE, 1), (RAM_SIZE - 1, 2), (1 << 63, 8)])
def test_what_is_not_mapped_is_out_of_reach(driver: Driver, address: int, size: int) -> None:
    assert driver.work(address, size) == (OUT_OF_REACH, 0)


def test_it_bounds_what_a_driver_can_ask_for(driver: Driver) -> None:
    expected = zlib.crc32(driver.ram.memory.read(0, 1 << 20))
    assert driver.work(0, (1 << 64) - 1) == (DONE, expected)


def test_a_reset_forgets(driver: Driver) -> None:
    driver.work(0, 4)
    driver.pci.client.reset()
    assert driver.status == 0


def test_it_is_short_and_shown() -> None:
    assert len((EXAMPLES / "crc.py").read_text().splitlines()) <= 60
    page = (DOCS / "standalone.md").read_text()
    assert re.findall(r"\{literalinclude\} (\S+)", page) == ["examples/crc.py"]
    assert find_kind("crc:KIND").help == "a CRC-32 of memory"
