from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testing.served import connected
from tests.virtio.harness import EchoDevice
from viommu.errors import UsageError
from viommu.memory import GuestMemory
from viommu.pci import Identity, PciFunction
from viommu.spec import virtio_config as config
from viommu.spec.virtio_config import Feature
from viommu.testing.driver import VirtioPciDriver, Virtqueue
from viommu.testing.guest_ram import PAGE, DirectDma, GuestRam
from viommu.virtio.pci import VirtioPciFunction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.loop import Loop
    from viommu.vfio_user.client import Client

RUNNING = (
    config.STATUS_ACKNOWLEDGE
    | config.STATUS_DRIVER
    | config.STATUS_FEATURES_OK
    | config.STATUS_DRIVER_OK
)


def make_echo(loop: Loop) -> VirtioPciFunction:
    return VirtioPciFunction("echo", GuestMemory(), EchoDevice())


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(32 * PAGE) as ram:
        yield ram


@pytest.fixture
def client(ram: GuestRam) -> Iterator[Client]:
    with connected(make_echo) as client:
        ram.give(client)
        yield client


@pytest.fixture
def driver(client: Client, ram: GuestRam) -> Iterator[VirtioPciDriver]:
    with VirtioPciDriver(client, DirectDma(ram)) as driver:
        yield driver


class Echo:
    """One queue of a running driver, with a buffer each way."""

    def __init__(self, driver: VirtioPciDriver, ram: GuestRam, features: int = ~0) -> None:
        self.ram = ram
        driver.negotiate(features)
        self.queue: Virtqueue = driver.add_queue(1)
        driver.start()
        self.source = ram.pages.allocate(PAGE)
        self.target = ram.pages.allocate(PAGE)

    def add(self, data: bytes, *, table: int | None = None) -> int:
        self.ram.memory.write(self.source, data)
        size = len(data)
        return self.queue.add([(self.source, size)], [(self.target, size)], table=table)


def test_finds_the_device(driver: VirtioPciDriver) -> None:
    assert driver.device_type == EchoDevice.device_type
    assert driver.device_config(0, 6) == b"config"
    driver.write_device_config(2, b"m")
    assert driver.device_config(0, 3) == b"com"
    assert driver.offered & 0xFF == EchoDevice.features


def test_what_is_no_virtio_function_is_refused(ram: GuestRam) -> None:
    def make(loop: Loop) -> PciFunction:
        return PciFunction("other", GuestMemory(), Identity(0x1234, 0x1041, 0xFF0000))

    with connected(make) as client, pytest.raises(UsageError, match="1234:1041 is no modern"):
        VirtioPciDriver(client, DirectDma(ram))


def test_a_reset_that_does_not_end_is_given_up(ram: GuestRam) -> None:
    device = EchoDevice()

    def make(loop: Loop) -> VirtioPciFunction:
        return VirtioPciFunction("stubborn", GuestMemory(), device)

    with connected(make) as client:
        ram.give(client)
        with VirtioPciDriver(client, DirectDma(ram)) as driver:
            driver.negotiate()
            device.finish_resets = False
            driver.timeout = 0.01
            with pytest.raises(TimeoutError, match="the reset has not finished"):
                driver.reset()


def test_refused_features_are_told(ram: GuestRam, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(loop: Loop) -> VirtioPciFunction:
        function = VirtioPciFunction("refusing", GuestMemory(), EchoDevice())
        monkeypatch.setattr(function.common, "refusal", lambda: "it is in a bad mood")
        return function

    with connected(make) as client:
        ram.give(client)
        with (
            VirtioPciDriver(client, DirectDma(ram)) as driver,
            pytest.raises(UsageError, match="refuses the features 0x130000005"),
        ):
            driver.negotiate()


class Picky(EchoDevice):
    """Insists on an IOMMU."""

    behind_iommu = True


def test_features_that_the_device_needs_are_always_accepted(ram: GuestRam) -> None:
    def make(loop: Loop) -> VirtioPciFunction:
        return VirtioPciFunction("picky", GuestMemory(), Picky())

    with connected(make) as client:
        ram.give(client)
        with VirtioPciDriver(client, DirectDma(ram)) as driver:
            assert driver.negotiate(0) == 1 << Feature.VERSION_1 | 1 << Feature.ACCESS_PLATFORM


def test_negotiates(driver: VirtioPciDriver) -> None:
    accepted = driver.negotiate(1 << 2)
    assert accepted == 1 << 2 | 1 << Feature.VERSION_1
    driver.start()
    assert driver.status == RUNNING
    driver.reset()
    assert driver.status == 0


@pytest.mark.parametrize("features", [~0, ~(1 << Feature.RING_EVENT_IDX), 0])
def test_waits_for_its_buffers(driver: VirtioPciDriver, ram: GuestRam, features: int) -> None:
    echo = Echo(driver, ram, features)
    for turn in range(40):  # more than the queue has entries
        ticket = echo.add(b"turn %02d" % turn)
        echo.queue.kick()
        assert echo.queue.wait(ticket) == 7
        assert ram.memory.read(echo.target, 7) == b"TURN %02d" % turn


def test_takes_several_back_in_any_order(driver: VirtioPciDriver, ram: GuestRam) -> None:
    echo = Echo(driver, ram)
    tickets = [echo.add(b"x" * length) for length in (1, 2, 3)]
    echo.queue.kick()
    assert echo.queue.wait(tickets[2]) == 3
    assert echo.queue.poll() == {tickets[0]: 1, tickets[1]: 2}
    assert echo.queue.wait_any() == (tickets[0], 1)
    assert echo.queue.wait(tickets[1]) == 2
    with pytest.raises(TimeoutError):
        echo.queue.wait_any(0.01)


def test_what_is_not_waited_for_is_not_mixed_up(driver: VirtioPciDriver, ram: GuestRam) -> None:
    echo = Echo(driver, ram)
    first, second = echo.add(b"x"), echo.add(b"xx")
    echo.queue.kick()
    assert echo.queue.wait(second) == 2  # the ring may now use both heads again
    third = echo.add(b"xxx")
    fourth = echo.add(b"xxxx")
    echo.queue.kick()
    assert [echo.queue.wait(ticket) for ticket in (third, first, fourth)] == [3, 1, 4]


def test_an_indirect_table(driver: VirtioPciDriver, ram: GuestRam) -> None:
    echo = Echo(driver, ram)
    room = echo.queue.ring.room
    ticket = echo.add(b"table", table=ram.pages.allocate(PAGE))
    assert echo.queue.ring.room == room - 1
    echo.queue.kick()
    assert echo.queue.wait(ticket) == 5


def test_a_device_that_does_not_answer_is_given_up(driver: VirtioPciDriver, ram: GuestRam) -> None:
    echo = Echo(driver, ram)
    ticket = echo.add(b"park")
    echo.queue.kick()
    with pytest.raises(TimeoutError, match="no completion on queue 1"):
        echo.queue.wait(ticket, 0.01)


def test_a_reset_gives_the_rings_back(driver: VirtioPciDriver, ram: GuestRam) -> None:
    first = ram.pages.allocate(PAGE)
    ram.pages.free(first)
    driver.negotiate()
    driver.add_queue(0)
    driver.start()
    driver.reset()
    assert ram.pages.allocate(PAGE) == first


def test_a_small_queue(driver: VirtioPciDriver) -> None:
    driver.negotiate()
    assert driver.add_queue(1, 4).ring.size == 4
