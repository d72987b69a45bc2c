from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testing.served import connected
from viommu.errors import UsageError
from viommu.events import Event
from viommu.memory import GuestMemory
from viommu.pci import Identity, PciFunction
from viommu.spec import pci
from viommu.testing.pci_driver import PciDriver, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.loop import Loop


class Bell(PciFunction):
    """Rings an MSI when bit 0 of its only register is written, MSI-X vector n for others."""

    def __init__(self, *, msix: bool) -> None:
        super().__init__("bell", GuestMemory(), Identity(0x1234, 1, 0xFF0000))
        self.value = 0
        self.add_bar(0, 4096, self)
        if msix:
            self.add_msix(3, 1)
        else:
            self.add_msi(1)

    def read(self, offset: int, count: int) -> bytes:
        return (self.value + offset).to_bytes(count, "little")

    def write(self, offset: int, data: bytes) -> None:
        self.value = int.from_bytes(data, "little")
        self.raise_msi(0)
        self.raise_msix(self.value)


@pytest.fixture
def driver() -> Iterator[PciDriver]:
    def make(loop: Loop) -> Bell:
        return Bell(msix=False)

    with connected(make) as client, PciDriver(client) as driver:
        yield driver


def test_registers(driver: PciDriver) -> None:
    assert driver.config_read(pci.VENDOR_ID, 2) == 0x1234
    driver.set_bus_master()
    assert driver.config_read(pci.COMMAND, 2) == pci.COMMAND_MASTER | pci.COMMAND_MEMORY
    driver.write(0, 0, 40, 4)
    assert driver.read(0, 2, 4) == 42
    driver.write(0, 0, 50, 4, posted=True)
    assert driver.read(0, 0, 4) == 50


def test_capabilities(driver: PciDriver) -> None:
    assert driver.config_read(driver.capability(pci.CAP_ID_MSI), 1) == pci.CAP_ID_MSI
    assert driver.capabilities(pci.CAP_ID_VENDOR) == []
    with pytest.raises(UsageError, match="no capability 0x11"):
        driver.capability(pci.CAP_ID_MSIX)


def test_a_broken_capability_chain_is_refused() -> None:
    def make(loop: Loop) -> Bell:
        bell = Bell(msix=False)
        bell.config.define(pci.CAPABILITY_LIST, b"\x10")
        return bell

    with connected(make) as client, pytest.raises(UsageError, match="broken at 0x10"):
        PciDriver(client).capability(pci.CAP_ID_MSI)


def test_msi(driver: PciDriver) -> None:
    event = driver.enable_msi()
    driver.set_bus_master()
    driver.write(0, 0, 1, 4)
    wait_for(event, lambda: driver.read(0, 0, 4) == 1, 5, "interrupt")
    assert event.clear()


def test_msix() -> None:
    def make(loop: Loop) -> Bell:
        return Bell(msix=True)

    with connected(make) as client, PciDriver(client) as driver:
        events = driver.enable_msix()
        assert driver.enable_msix() is events
        driver.set_bus_master()
        driver.write(0, 0, 2, 4)
        assert [event.clear() for event in events] == [False, False, True]


def test_a_function_level_reset_forgets_bus_mastering(driver: PciDriver) -> None:
    driver.set_bus_master()
    driver.reset_function()
    assert driver.config_read(pci.COMMAND, 2) == 0


def test_closing_after_the_server_is_gone_is_quiet() -> None:
    def make(loop: Loop) -> Bell:
        return Bell(msix=False)

    with connected(make) as client:
        driver = PciDriver(client)
        driver.enable_msi()
        client.close()
        driver.close()
        driver.close()


def test_a_wait_ends() -> None:
    with Event() as event:
        wait_for(event, lambda: True, 0, "nothing")
        with pytest.raises(TimeoutError, match="no bell within"):
            wait_for(event, lambda: False, 0.01, "bell")
        asked = iter([False, True])
        event.signal()
        wait_for(event, lambda: next(asked), 5, "bell")
        assert not event.is_set()
