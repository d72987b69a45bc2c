"""The whole chain: a guest's drivers, vfio-user, viommu, the kernel's VFIO, and real devices."""

from __future__ import annotations

import logging
import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.layout import (
    APERTURE_BITS,
    EDU,
    GROUPED_EDU,
    MSI_WINDOW,
    NVME,
    OTHER_EDU,
    OTHER_GROUPED_EDU,
    PLUGGED_EDU,
    PLUGGED_EDU_ARGUMENTS,
    SHARED_MEMORY,
    SHARED_MEMORY_SIZE,
)
from guest_tests.l1.monitor import Monitor
from guest_tests.l1.passthrough import DOMAIN, PassthroughGuest
from guest_tests.l1.test_unplug import wait_until
from viommu.endpoints.edu_registers import Result
from viommu.errors import Access, PeerError
from viommu.spec import pci
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import ReservedKind, Status
from viommu.testing.guest_ram import PAGE
from viommu.testing.iommu_driver import Reserved
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.testing.edu_driver import EduDriver
    from viommu.testing.pci_driver import PciDriver

# Where endpoints are in the guest.
FIRST, SECOND, THIRD = "00:06.0", "00:07.0", "00:08.0"
IOVA, OTHER_IOVA = 0x40000000, 0x48000000
PLACE, ELSEWHERE = 0x2_0000_0000, 0x2_8000_0000
MASK = 0x0C  # a register of NVMe's that keeps the bits that are set in it, until a reset
WAIT_SECONDS = 30.0


def host(bdf: str, backend: str) -> str:
    return f"vfio,host=0000:{bdf},backend={backend}"


@pytest.fixture
def guest(backend: str) -> Iterator[PassthroughGuest]:
    """A guest with one edu."""
    with PassthroughGuest({FIRST: host(EDU, backend)}) as guest:
        yield guest


@pytest.fixture
def edu(guest: PassthroughGuest) -> EduDriver:
    return guest.edu(FIRST)


def test_a_guest_is_offered_what_the_host_can_map(guest: PassthroughGuest) -> None:
    config = guest.iommu.config

    assert (config.input_range.start, config.input_range.end) == (0, (1 << APERTURE_BITS) - 1)
    assert guest.iommu.probe(Bdf.parse(FIRST).number) == (
        Status.OK, [Reserved(*MSI_WINDOW, ReservedKind.MSI)],
    )  # fmt: skip


def test_dma_lands_where_the_guest_maps_it_byte_for_byte(
    guest: PassthroughGuest, edu: EduDriver
) -> None:
    assert guest.attach(FIRST) == Status.OK
    data = os.urandom(PAGE)
    source, target = guest.page(data), guest.page()
    # Neighbours for the device, and not in memory.
    guest.map(IOVA, source)
    guest.map(IOVA + PAGE, target)

    edu.read_memory(IOVA, PAGE)
    edu.write_memory(IOVA + PAGE, PAGE)

    assert guest.ram.memory.read(target, PAGE) == data
    assert guest.ram.memory.read(source, PAGE) == data


def test_dma_is_blocked_before_attach_after_unmap_and_after_detach(
    guest: PassthroughGuest, edu: EduDriver
) -> None:
    marker, page = guest.page(b"mark"), guest.page()

    def write_lands() -> bool:
        guest.ram.memory.write(page, bytes(4))
        edu.write_memory(IOVA, 4)
        return guest.ram.memory.read(page, 4) == b"mark"

    seen = [write_lands()]
    guest.attach(FIRST)
    guest.map(OTHER_IOVA, marker)
    edu.read_memory(OTHER_IOVA, 4)
    seen.append(write_lands())
    guest.map(IOVA, page)
    seen.append(write_lands())
    guest.unmap(IOVA)
    seen.append(write_lands())
    guest.map(IOVA, page)
    seen.append(write_lands())
    assert guest.detach(FIRST) == Status.OK
    seen.append(write_lands())

    assert seen == [False, False, True, False, True, False]


def test_a_mapping_for_reading_can_not_be_written(guest: PassthroughGuest, edu: EduDriver) -> None:
    guest.attach(FIRST)
    page, target = guest.page(b"precious"), guest.page()
    guest.map(IOVA, page, access=Access.READ)
    guest.map(OTHER_IOVA, target)

    edu.read_memory(IOVA + 4, 4)
    edu.write_memory(IOVA, 4)
    edu.write_memory(OTHER_IOVA, 4)

    assert guest.ram.memory.read(page, 8) == b"precious"
    assert guest.ram.memory.read(target, 4) == b"ious"


def test_memory_that_the_vmm_takes_back_is_out_of_reach(
    guest: PassthroughGuest, edu: EduDriver
) -> None:
    guest.attach(FIRST)
    page = guest.page(b"gone")
    guest.map(IOVA, page)
    edu.read_memory(IOVA, 4)

    guest.ram.take_back(guest.iommu.virtio.client)
    guest.ram.memory.write(page, bytes(4))
    edu.write_memory(IOVA, 4)
    assert guest.ram.memory.read(page, 4) == bytes(4)
    guest.ram.give(guest.iommu.virtio.client)
    edu.write_memory(IOVA, 4)

    assert guest.ram.memory.read(page, 4) == b"gone"


@pytest.mark.parametrize("way", ["boot", "domain"])
def test_bypass(backend: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with PassthroughGuest({FIRST: host(EDU, backend)}, boot_bypass=way == "boot") as guest:
        edu = guest.edu(FIRST)
        source, target = guest.page(b"bypass"), guest.page()
        if way == "domain":
            assert guest.attach(FIRST, DOMAIN + 1, flags=spec.ATTACH_F_BYPASS) == Status.OK

        edu.read_memory(source, 6)
        edu.write_memory(target, 6)
        assert guest.ram.memory.read(target, 6) == b"bypass"

        assert guest.attach(FIRST) == Status.OK
        edu.write_memory(target + 8, 6)
        assert guest.ram.memory.read(target + 8, 6) == bytes(6)
        guest.map(IOVA, target)
        edu.write_memory(IOVA + 16, 6)
        assert guest.ram.memory.read(target + 16, 6) == b"bypass"
        assert guest.detach(FIRST) == Status.OK
        edu.write_memory(target + 24, 6)
        landed = guest.ram.memory.read(target + 24, 6) == b"bypass"
        assert landed is (way == "boot")
    assert "not entered in one step" not in caplog.text


# Peer to peer.


@pytest.fixture
def pair(backend: str) -> Iterator[PassthroughGuest]:
    """A guest with an edu and, behind another mapper, a device whose BAR 2 is memory."""
    with PassthroughGuest(
        {FIRST: host(EDU, backend), SECOND: host(SHARED_MEMORY, backend)}
    ) as guest:
        guest.attach(FIRST)
        yield guest


def lands(guest: PassthroughGuest, edu: EduDriver, memory: PciDriver, iova: int, at: int) -> bool:
    """Have the edu write a word at ``iova``; return whether that is in BAR 2 at ``at``."""
    word = os.urandom(4)
    page = guest.page(word)
    guest.map(OTHER_IOVA, page)
    edu.read_memory(OTHER_IOVA, 4)
    guest.unmap(OTHER_IOVA)
    edu.write_memory(iova + at, 4)
    return memory.read(2, at, 4) == int.from_bytes(word, "little")


def test_one_device_writes_into_the_bar_of_another(pair: PassthroughGuest) -> None:
    edu, memory = pair.edu(FIRST), pair.function(SECOND)
    pair.place(memory, 2, PLACE)
    memory.set_bus_master()

    pair.map_bar(IOVA, PLACE, SHARED_MEMORY_SIZE)

    assert lands(pair, edu, memory, IOVA, 0x1234)
    assert lands(pair, edu, memory, IOVA, SHARED_MEMORY_SIZE - 4)
    assert _hosts(pair, "mapped by") == [{"0": ["VMM"]}, {"2": ["VMM", "DMA"]}]
    pair.unmap(IOVA, SHARED_MEMORY_SIZE)
    assert not lands(pair, edu, memory, IOVA, 0x1234)


def test_a_bar_that_moves_or_loses_decode_is_dropped_and_restored(pair: PassthroughGuest) -> None:
    edu, memory = pair.edu(FIRST), pair.function(SECOND)
    pair.map_bar(IOVA, PLACE, SHARED_MEMORY_SIZE)
    pair.map_bar(IOVA + SHARED_MEMORY_SIZE, ELSEWHERE, SHARED_MEMORY_SIZE)
    places = (IOVA, IOVA + SHARED_MEMORY_SIZE)
    seen = []

    def look() -> None:
        seen.append([lands(pair, edu, memory, place, 0x40) for place in places])

    pair.place(memory, 2, PLACE)
    memory.set_bus_master()
    look()
    pair.place(memory, 2, ELSEWHERE)
    look()
    pair.place(memory, 2, PLACE)
    look()
    memory.config_write(pci.COMMAND, 0, 2)
    memory.set_bus_master()
    look()
    memory.client.reset()
    pair.place(memory, 2, ELSEWHERE)
    memory.set_bus_master()
    look()

    assert seen == [[True, False], [False, True], [True, False], [True, False], [False, True]]


def test_a_bar_is_reached_again_after_a_function_level_reset(backend: str) -> None:
    with PassthroughGuest({FIRST: host(EDU, backend), SECOND: host(NVME, backend)}) as guest:
        edu, nvme = guest.edu(FIRST), guest.function(SECOND)
        guest.attach(FIRST)
        guest.map(OTHER_IOVA, guest.page(b"\x0f\0\x0f\0\x1f\0\x1f\0"))
        guest.place(nvme, 0, PLACE)
        nvme.set_bus_master()
        guest.map_bar(IOVA, PLACE, PAGE)

        for word, value in enumerate((0x000F000F, 0x001F001F)):
            edu.read_memory(OTHER_IOVA + 4 * word, 4)
            edu.write_memory(IOVA + MASK, 4)
            assert nvme.read(0, MASK, 4) == value

            nvme.reset_function()
            assert nvme.read(0, MASK, 4) == 0


def test_bypass_reaches_bars(backend: str) -> None:
    endpoints = {FIRST: host(EDU, backend), SECOND: host(SHARED_MEMORY, backend)}
    with PassthroughGuest(endpoints, boot_bypass=True) as guest:
        edu, memory = guest.edu(FIRST), guest.function(SECOND)
        guest.place(memory, 2, PLACE)
        memory.set_bus_master()

        edu.read_memory(guest.page(b"peer"), 4)
        edu.write_memory(PLACE + 0x100, 4)

        assert memory.read(2, 0x100, 4) == int.from_bytes(b"peer", "little")


# More than one device.


@pytest.mark.iommufd
def test_one_mapping_reaches_type1_iommufd_and_an_emulated_device() -> None:
    endpoints = {FIRST: host(EDU, "type1"), SECOND: host(OTHER_EDU, "iommufd"), THIRD: "edu"}
    with PassthroughGuest(endpoints) as guest:
        edus = [guest.edu(bdf) for bdf in endpoints]
        for bdf in endpoints:
            assert guest.attach(bdf) == Status.OK
        page = guest.page(b"all of them")
        guest.map(IOVA, page)

        for number, edu in enumerate(edus, 1):
            edu.read_memory(IOVA, 11)
            edu.write_memory(IOVA + 64 * number, 11)
        assert [guest.ram.memory.read(page + 64 * n, 11) for n in (1, 2, 3)] == [b"all of them"] * 3

        guest.unmap(IOVA)
        before = guest.ram.memory.read(page, PAGE)
        results = [edu.write_memory(IOVA, 64) for edu in edus]
        assert guest.ram.memory.read(page, PAGE) == before
        assert results[2] == Result.TRANSLATION_FAULT


@pytest.mark.bridges
def test_devices_of_a_group_move_together(backend: str) -> None:
    endpoints = {FIRST: host(GROUPED_EDU, backend), SECOND: host(OTHER_GROUPED_EDU, backend)}
    with PassthroughGuest(endpoints) as guest:
        first, second = guest.edu(FIRST), guest.edu(SECOND)
        assert guest.attach(FIRST) == Status.OK
        assert guest.attach(SECOND, DOMAIN + 1) == Status.UNSUPP
        assert guest.attach(SECOND) == Status.OK
        page = guest.page(b"twins")
        guest.map(IOVA, page)

        first.read_memory(IOVA, 5)
        first.write_memory(IOVA + 16, 5)
        second.read_memory(IOVA + 16, 5)
        second.write_memory(IOVA + 32, 5)

        assert guest.ram.memory.read(page + 32, 5) == b"twins"


def test_the_next_guest_finds_a_quiet_device(backend: str) -> None:
    """A VMM that goes away leaves nothing mapped and no DMA."""
    for _ in range(2):
        with PassthroughGuest({FIRST: host(EDU, backend)}) as guest:
            edu = guest.edu(FIRST)
            assert guest.attach(FIRST) == Status.OK
            page = guest.page(b"once more")
            guest.map(IOVA, page)
            edu.read_memory(IOVA, 9)
            edu.write_memory(IOVA + 16, 9)
            assert guest.ram.memory.read(page + 16, 9) == b"once more"


# Unplugging.


def test_a_device_that_is_unplugged_is_given_up_while_others_go_on(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    endpoints = {FIRST: host(EDU, backend), SECOND: host(PLUGGED_EDU, backend)}
    with Monitor() as monitor:
        with PassthroughGuest(endpoints) as guest:
            edu, plugged = guest.edu(FIRST), guest.edu(SECOND)
            for bdf in endpoints:
                assert guest.attach(bdf) == Status.OK
            page = guest.page(b"others")
            guest.map(IOVA, page)
            plugged.read_memory(IOVA, 6)

            monitor.execute("device_del", id=PLUGGED_EDU_ARGUMENTS["id"])
            monitor.wait_for("DEVICE_DELETED", device=PLUGGED_EDU_ARGUMENTS["id"])

            with pytest.raises(PeerError):
                plugged.read_memory(IOVA, 6)
            edu.read_memory(IOVA, 6)
            edu.write_memory(IOVA + 16, 6)
            assert guest.ram.memory.read(page + 16, 6) == b"others"
            guest.map(OTHER_IOVA, page)
            assert guest.detach(SECOND) == Status.OK
            assert _gone(guest) == [None, "the host wanted it back"]
            assert _hosts(guest, "mapped by") == [{"0": ["VMM"]}, {}]
            assert "in use as long as somebody maps BAR 0 (VMM)" in caplog.text
        wait_until(there=False)
        monitor.execute("device_add", **PLUGGED_EDU_ARGUMENTS)
        wait_until(there=True)


def test_a_vmm_that_has_mapped_a_bar_keeps_the_device_from_the_host(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Monitor() as monitor:
        with PassthroughGuest({FIRST: host(PLUGGED_EDU, backend)}) as guest:
            info = guest.function(FIRST).client.region_info(0)
            assert info.fd is not None
            window = mmap.mmap(info.fd, info.size, offset=info.offset)
            os.close(info.fd)

            monitor.execute("device_del", id=PLUGGED_EDU_ARGUMENTS["id"])
            assert _gone(guest) == ["the host wanted it back"]
            assert "in use as long as somebody maps BAR 0 (VMM)" in caplog.text
            wait_until(there=True)  # and so it would stay

            window.close()
            monitor.wait_for("DEVICE_DELETED", device=PLUGGED_EDU_ARGUMENTS["id"])
        wait_until(there=False)
        monitor.execute("device_add", **PLUGGED_EDU_ARGUMENTS)
        wait_until(there=True)


def _hosts(guest: PassthroughGuest, what: str) -> list[object]:
    """Return what the server says of every device of the host."""
    snapshot = guest.call("snapshot")
    assert isinstance(snapshot, dict)
    return [endpoint["host"][what] for endpoint in snapshot["endpoints"]]


def _gone(guest: PassthroughGuest) -> list[object]:
    """Return what the server says of the devices that are no longer there."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        gone = _hosts(guest, "gone")
        if any(gone) or time.monotonic() > deadline:
            return gone
        time.sleep(0.05)
