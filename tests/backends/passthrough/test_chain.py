"""The whole chain but for the kernel: guest drivers, sockets, a machine, devices of a fake host."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.backends.passthrough.fake_device import BAR0, BAR2, EXPRESS
from tests.backends.passthrough.fake_host import FakeHost
from viommu.device import IommuConfig
from viommu.endpoints import registry
from viommu.errors import PeerError
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.spec import pci, vfio
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import RequestType, ReservedKind, Status
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.iommu_driver import IommuDriver, Reserved
from viommu.testing.pci_driver import PciDriver
from viommu.testing.serving import LoopThread
from viommu.vfio_user.client import Client
from viommu.vmm import Bdf
from viommu_backends.host_device import HostDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

IOMMU, DEVICE, PEER = Bdf.parse("00:05.0"), Bdf.parse("00:06.0"), Bdf.parse("00:07.0")
HOST = {DEVICE: "0000:04:00.0", PEER: "0000:05:00.0"}
RAM_SIZE = 8 << 20
DOMAIN, OTHER_DOMAIN = 3, 4
IOVA = 0x5_0000_0000
PLACE, ELSEWHERE = 0x8_0000_0000, 0x9_0000_0000


class Guest:
    """A VM, its drivers, and a look at what the host's IOMMU was told."""

    def __init__(
        self, directory: Path, host: FakeHost, backend: str, stack: contextlib.ExitStack
    ) -> None:
        self.host = host
        self.backend = backend
        self._directory = directory
        self._stack = stack
        self.ram = stack.enter_context(GuestRam(RAM_SIZE))
        self.iommu = stack.enter_context(IommuDriver(self.connect(IOMMU), self.ram))
        self.device, self.peer = self.driver(DEVICE), self.driver(PEER)

    def connect(self, bdf: Bdf) -> Client:
        client = self._stack.enter_context(Client(self._directory / f"{bdf}.sock"))
        self.ram.give(client)
        return client

    def driver(self, bdf: Bdf) -> PciDriver:
        return self._stack.enter_context(PciDriver(self.connect(bdf)))

    def place(self, driver: PciDriver, address: int) -> None:
        driver.config_write(pci.BASE_ADDRESS_0 + 8, address & 0xFFFFFFFF, 4)
        driver.config_write(pci.BASE_ADDRESS_0 + 12, address >> 32, 4)

    def map(self, gpa: int, *, iova: int = IOVA, size: int = PAGE, flags: int = 3) -> int | None:
        kind = RequestType.MAP
        request = spec.MAP.pack(kind, DOMAIN, iova, iova + size - 1, gpa, flags)
        return self.iommu.request(request).status

    def holds(self, bdf: Bdf) -> list[int]:
        """The IOVAs that the host's IOMMU translates for a device."""
        if self.backend == "type1":
            group = 7 if bdf == DEVICE else 8
            entries = next(c.entries for c in self.host.containers if c.group == group)
        else:
            ioas = self.host.opened[HOST[bdf]].ioas
            entries = {} if ioas is None else self.host.contexts[0].spaces[ioas].entries
        return sorted(entries)


@pytest.fixture(params=["type1", "iommufd"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def boot_bypass() -> bool:
    return False


@pytest.fixture
def directory() -> Iterator[Path]:
    # A socket's path must be short; that of pytest's own directory need not be.
    with tempfile.TemporaryDirectory(prefix="viommu-") as name:
        yield Path(name)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    def entries(group: str) -> list[EntryPoint]:
        return [EntryPoint("vfio", "viommu_backends.passthrough:VFIO", group)]

    host = FakeHost(tmp_path, monkeypatch)
    host.add(HOST[DEVICE], 7)
    host.add(HOST[PEER], 8)
    parse = HostDevice.parse.__func__  # type: ignore[attr-defined] # a class method has one
    monkeypatch.setattr(parse, "__defaults__", (tmp_path,))
    monkeypatch.setattr(registry, "entry_points", entries)
    return host


@pytest.fixture
def server() -> Iterator[LoopThread]:
    with LoopThread(Loop()) as thread:
        yield thread
    thread.loop.close()


@pytest.fixture
def machine(
    directory: Path, host: FakeHost, backend: str, server: LoopThread, boot_bypass: bool
) -> Iterator[Machine]:
    endpoints = [(bdf, f"vfio,host={address},backend={backend}") for bdf, address in HOST.items()]
    config = IommuConfig(boot_bypass=boot_bypass)
    options = MachineOptions(directory, IOMMU, endpoints, config)
    machine = server.call(lambda: Machine(server.loop, options))
    yield machine
    server.call(machine.close)
    assert all(device.fd == -1 for device in host.opened.values())
    assert all(container.closed for container in host.containers)
    assert all(context.spaces == {} for context in host.contexts)


@pytest.fixture
def guest(directory: Path, host: FakeHost, backend: str, machine: Machine) -> Iterator[Guest]:
    with contextlib.ExitStack() as stack:
        yield Guest(directory, host, backend, stack)


def test_a_guest_is_offered_what_the_host_can_do(guest: Guest, machine: Machine) -> None:
    assert (guest.iommu.config.input_range.start, guest.iommu.config.input_range.end) == (
        0, (1 << 39) - 1,
    )  # fmt: skip
    status, reserved = guest.iommu.probe(DEVICE.number)
    assert (status, reserved) == (
        Status.OK, [Reserved(0xFEE00000, 0xFEF00000, ReservedKind.MSI)],
    )  # fmt: skip


def test_a_mapping_reaches_the_host_until_it_is_unmapped(guest: Guest) -> None:
    gpa = guest.ram.pages.allocate(PAGE)
    assert guest.iommu.attach(DOMAIN, DEVICE.number) == Status.OK

    assert guest.map(gpa) == Status.OK
    assert guest.holds(DEVICE) == [IOVA]
    assert guest.holds(PEER) == []
    assert guest.iommu.unmap(DOMAIN, IOVA, PAGE) == Status.OK

    assert guest.holds(DEVICE) == []


def test_detaching_leaves_nothing(guest: Guest) -> None:
    guest.iommu.attach(DOMAIN, DEVICE.number)
    guest.map(0)

    assert guest.iommu.detach(DOMAIN, DEVICE.number) == Status.OK

    assert guest.holds(DEVICE) == []


def test_one_mapping_reaches_every_device_of_a_domain(guest: Guest) -> None:
    for bdf in (DEVICE, PEER):
        assert guest.iommu.attach(DOMAIN, bdf.number) == Status.OK

    guest.map(0)

    assert guest.holds(DEVICE) == guest.holds(PEER) == [IOVA]


def test_a_vmm_uses_bars_and_interrupts_of_the_device_itself(guest: Guest) -> None:
    info = guest.device.client.region_info(0)
    assert info.fd is not None
    assert info.areas == ((0, 0x2000), (0x4000, 0x4000))
    with mmap.mmap(info.fd, 0x4000, offset=info.offset + 0x4000) as window:
        window[0x10:0x14] = b"mmap"
    os.close(info.fd)
    guest.device.set_bus_master()
    events = guest.device.enable_msix()

    guest.host.opened[HOST[DEVICE]].signal(vfio.PCI_MSIX_IRQ_INDEX, 5)

    assert guest.device.read(0, 0x4010, 4) == int.from_bytes(b"mmap", "little")
    assert [event.is_set() for event in events] == [n == 5 for n in range(8)]


def test_peer_to_peer(guest: Guest) -> None:
    guest.place(guest.peer, PLACE)
    guest.iommu.attach(DOMAIN, DEVICE.number)
    assert guest.map(PLACE, size=BAR2, flags=3 | spec.MAP_F_MMIO) == Status.OK
    seen = [guest.holds(DEVICE)]

    guest.peer.set_bus_master()
    seen.append(guest.holds(DEVICE))
    guest.place(guest.peer, ELSEWHERE)
    seen.append(guest.holds(DEVICE))
    guest.place(guest.peer, PLACE)
    seen.append(guest.holds(DEVICE))
    guest.peer.reset_function()
    seen.append(guest.holds(DEVICE))
    guest.peer.config_write(pci.COMMAND, 0, 2)
    seen.append(guest.holds(DEVICE))

    assert seen == [[], [IOVA], [], [IOVA], [IOVA], []]
    assert guest.host.opened[HOST[PEER]].log.count("reset") == 1


def test_a_write_of_one_byte_resets_the_function(guest: Guest) -> None:
    guest.device.config_write(EXPRESS + pci.EXP_DEVCTL + 1, 0x80, 1)

    assert guest.host.opened[HOST[DEVICE]].log.count("reset") == 1


@pytest.mark.parametrize("boot_bypass", [True])
def test_bypass_is_all_of_memory_as_it_comes_and_goes(guest: Guest) -> None:
    assert guest.holds(DEVICE) == guest.holds(PEER) == [0]
    guest.place(guest.peer, PLACE)
    guest.peer.set_bus_master()
    # Two pieces of the BAR that has the message table are never placed: BAR 0 is nowhere.
    assert guest.holds(DEVICE) == [0, PLACE]

    guest.iommu.attach(DOMAIN, DEVICE.number)
    assert guest.holds(DEVICE) == []
    guest.map(0)
    assert (guest.holds(DEVICE), guest.holds(PEER)) == ([IOVA], [0, PLACE])
    guest.iommu.detach(DOMAIN, DEVICE.number)

    assert guest.holds(DEVICE) == [0, PLACE]


def test_a_bypass_domain_is_like_bypass_at_boot(guest: Guest) -> None:
    assert guest.holds(DEVICE) == []

    flags = spec.ATTACH_F_BYPASS
    assert guest.iommu.attach(OTHER_DOMAIN, DEVICE.number, flags=flags) == Status.OK
    assert guest.holds(DEVICE) == [0]
    guest.ram.take_back(guest.iommu.virtio.client)

    assert guest.holds(DEVICE) == []


def test_memory_that_the_host_refuses_is_refused(guest: Guest) -> None:
    flags = spec.ATTACH_F_BYPASS
    guest.iommu.attach(OTHER_DOMAIN, DEVICE.number, flags=flags)

    with pytest.raises(PeerError, match="command 2 failed"):
        # Beyond what the host's IOMMU can map.
        guest.iommu.virtio.client.dma_map(1 << 39, PAGE, fd=guest.ram._fd)

    assert guest.holds(DEVICE) == [0]


def test_a_device_that_the_host_takes_back_leaves_the_others(
    guest: Guest, server: LoopThread, machine: Machine, directory: Path
) -> None:
    for bdf in (DEVICE, PEER):
        guest.iommu.attach(DOMAIN, bdf.number)
    guest.place(guest.peer, PLACE)
    guest.peer.set_bus_master()
    guest.map(PLACE, size=BAR2, flags=3 | spec.MAP_F_MMIO)
    guest.map(0, iova=2 * IOVA)
    assert guest.holds(DEVICE) == [IOVA, 2 * IOVA]

    guest.host.opened[HOST[PEER]].signal(vfio.PCI_REQ_IRQ_INDEX, 0)
    for _ in range(2):  # it has been seen when the loop has come round again
        server.call(lambda: None)

    assert guest.host.opened[HOST[PEER]].fd == -1
    assert not (directory / f"{PEER}.sock").exists()
    assert guest.holds(DEVICE) == [2 * IOVA]
    with pytest.raises(PeerError):
        guest.peer.config_read(0, 4)
    assert guest.map(PAGE, iova=3 * IOVA) == Status.OK
    assert guest.iommu.detach(DOMAIN, PEER.number) == Status.OK
    assert guest.holds(DEVICE) == [2 * IOVA, 3 * IOVA]
    snapshot = server.call(machine.snapshot)["endpoints"]
    assert isinstance(snapshot, list)
    assert snapshot[1]["host"]["gone"] == "the host wanted it back"


def test_the_next_vmm_finds_everything_as_after_power_on(
    directory: Path, host: FakeHost, backend: str, machine: Machine
) -> None:
    with contextlib.ExitStack() as stack:
        guest = Guest(directory, host, backend, stack)
        guest.place(guest.peer, PLACE)
        guest.iommu.attach(DOMAIN, DEVICE.number)
        guest.map(0)
        guest.device.set_bus_master()
        guest.device.enable_msix()
    with contextlib.ExitStack() as stack:
        guest = Guest(directory, host, backend, stack)

        assert guest.holds(DEVICE) == []
        assert guest.peer.config_read(pci.BASE_ADDRESS_0 + 12, 4) == 0
        assert host.opened[HOST[DEVICE]].command == pci.COMMAND_INTX_DISABLE
        assert vfio.PCI_MSIX_IRQ_INDEX not in host.opened[HOST[DEVICE]].eventfds
        assert guest.iommu.attach(DOMAIN, DEVICE.number) == Status.OK


def test_a_bar_behind_a_table_is_reached_around_it(guest: Guest) -> None:
    guest.peer.config_write(pci.BASE_ADDRESS_0 + 4, PLACE >> 32, 4)
    guest.peer.set_bus_master()
    guest.iommu.attach(DOMAIN, DEVICE.number)

    status = guest.map(PLACE, size=BAR0, flags=3 | spec.MAP_F_MMIO)

    assert status == Status.OK
    assert guest.holds(DEVICE) == [IOVA, IOVA + 0x4000]
