"""One disk in viommu, one in a process of its own, two behind the interposer: all the same.

The endpoint that the tests of DMA use is in a process of its own here, too.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest_tests.disk_checks import check_file_system, check_raw_sectors, check_size
from guest_tests.disks import BY_MESSAGE, DISKS, INSIDE, OWN, PROWLER, REMOTE, SHARED, DiskRig
from guest_tests.rig import EDU, MODES, OTHER_EDU
from guest_tests.test_dma import (  # noqa: F401 - tests that run here too, with this guest
    CLOCKS_AGREE,
    assert_reported,
    test_an_endpoint_moves_to_another_domain,
    test_an_unmap_ends_a_transfer_that_lets_go,
    test_memory_is_copied_through_the_device,
    test_strays_are_blocked_and_reported,
    test_two_endpoints_share_one_domain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

FILES = {f"file{number}": 2 << 20 for number in range(4)}
LOOKS = 8  # at the maps while the disk is busy, with the guest stopped and without
REQUESTS = 4  # of the guest, from one look to the next
BUSY_REQUESTS = 20
RAW_OFFSET = 50 << 20
SIGN = 60 << 20  # where the host tells the guest to stop
HOLD_MS = 3000
DEAD = {bdf: name for name, bdf in DISKS.items() if bdf != INSIDE}


@pytest.fixture(scope="module", params=["lazy", "strict"])
def guest(
    request: pytest.FixtureRequest,
    lab: Lab,
    kernel: Kernel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[DiskRig]:
    """A guest with a disk in every place."""
    directory = tmp_path_factory.mktemp("processes")
    with DiskRig(lab, kernel, MODES[request.param], directory) as rig:
        yield rig


@pytest.mark.parametrize("disk", DISKS.values(), ids=DISKS)
class TestADiskIsTheSameEverywhere:
    """The tests of a disk, in each place."""

    def test_a_file_system_is_made_filled_and_found_whole(self, guest: DiskRig, disk: str) -> None:
        check_file_system(guest, disk, guest.images[disk])

    def test_raw_sectors_arrive_where_they_were_written(self, guest: DiskRig, disk: str) -> None:
        check_raw_sectors(guest, disk, guest.images[disk])

    def test_the_guest_sees_the_size_of_the_image(self, guest: DiskRig, disk: str) -> None:
        check_size(guest, disk, guest.images[disk])

    def test_it_survives_its_drivers_and_works_beside_an_edu(
        self, guest: DiskRig, disk: str
    ) -> None:
        files = {"a": 2 << 20}
        guest.call("disk.make", bdf=disk, megabytes=16)
        assert guest.call("dma.beside_disk", bdf=EDU, disk_bdf=disk, files=files) > 0
        written = guest.call("disk.sums", bdf=disk)
        guest.call("disk.rebind", bdf=disk)

        assert guest.call("disk.sums", bdf=disk) == written


@pytest.mark.parametrize("bdf", REMOTE, ids=["shared", "by message"])
def test_a_device_is_told_exactly_what_the_guest_has_mapped(guest: DiskRig, bdf: str) -> None:
    guest.call("disk.make", bdf=bdf, megabytes=48)
    assert_maps_agree(guest, bdf)

    guest.vm.start("disk.write_until_told", bdf=bdf, offset=RAW_OFFSET, sign=SIGN)
    seen = []
    for _ in range(LOOKS):
        guest.wait_for_requests(REQUESTS)
        with guest.frozen():
            seen.append(assert_maps_agree(guest, bdf))
        assert_maps_agree(guest, bdf)
    with guest.images[bdf].open("r+b") as image:
        image.seek(SIGN)
        image.write(os.urandom(16))
    assert guest.vm.finish() > 0

    assert_maps_agree(guest, bdf)
    assert any(maps != seen[0] for maps in seen), "nothing was mapped or unmapped meanwhile"


def test_only_a_process_that_shares_guest_memory_has_it(guest: DiskRig) -> None:
    assert has_guest_memory(guest.devices[SHARED].pid)
    assert has_guest_memory(guest.endpoint(OWN)["process"]["pid"])
    assert not has_guest_memory(guest.devices[BY_MESSAGE].pid)
    assert not has_guest_memory(guest.devices[PROWLER].pid)


def test_a_hostile_device_gets_only_what_is_mapped(guest: DiskRig) -> None:
    for outcome in guest.call("prowl.everywhere", bdf=PROWLER):
        assert_reported(outcome, PROWLER, outcome["kind"])


def test_an_unmap_waits_for_its_device_and_nobody_else_does(guest: DiskRig) -> None:
    guest.vm.start("beside.held_unmap", bdf=EDU, other=OTHER_EDU, milliseconds=HOLD_MS)
    snapshot = guest.wait_until(
        "the unmap is parked", lambda snapshot: snapshot["iommu"]["waiting"]
    )
    looks = 0
    while snapshot["iommu"]["waiting"]:
        looks += 1
        snapshot = guest.server.snapshot()
    outcome = guest.vm.finish()

    times = outcome["times"]
    assert times["released"] - times["exported"] >= HOLD_MS * 1_000_000
    waited = (times["released"] - times["faulted"]) / 1e9
    assert outcome["seconds"] >= waited * CLOCKS_AGREE, "it returned before the release"
    assert outcome["arrived"], "the unmap returned before the data was there"
    # Each third of that time has answers to us, and transfers of the other device.
    assert looks > 3
    for third in range(3):
        start, end = (outcome["seconds"] / 3 * (third + number) for number in range(2))
        assert any(start <= when < end for when in outcome["others"]), outcome


@pytest.mark.parametrize("bdf", DEAD, ids=DEAD.values())
def test_a_disk_whose_process_is_killed_while_it_writes(guest: DiskRig, bdf: str) -> None:
    guest.call("disk.make", bdf=bdf, megabytes=48)
    written = guest.call("disk.fill", bdf=bdf, files=FILES)
    guest.vm.start("disk.write_until_error", bdf=bdf, offset=RAW_OFFSET)
    guest.wait_for_requests(BUSY_REQUESTS)
    if bdf == OWN:
        os.kill(guest.endpoint(bdf)["process"]["pid"], signal.SIGKILL)
    else:
        guest.devices[bdf].kill()

    assert guest.vm.finish() == errno.EIO
    assert " dead " in inspected(guest, bdf)
    guest.call("dma.both_ways", bdf=EDU)
    guest.call("dma.both_ways", bdf=OTHER_EDU)
    guest.call("disk.write_raw", bdf=INSIDE, offset=RAW_OFFSET, count=4096)
    # Nobody has told the guest that it is gone: what it knew of it must not change.
    check_size(guest, bdf, guest.images[bdf])

    # Its driver goes, which unmaps what the dead device had, and resets it. One of our own
    # starts again then; the others are started before or after.
    if bdf == SHARED:
        guest.start_device(bdf)
    guest.call("pci.unbind", bdf=bdf)
    assert guest.endpoint(bdf)["held"] == []
    if bdf == BY_MESSAGE:
        guest.start_device(bdf)
    guest.wait_until(
        "there is a device again",
        lambda _: guest.endpoint(bdf)["device"]["state"] == "alive",
    )
    guest.call("pci.bind", bdf=bdf, name="virtio-pci")
    assert guest.call("disk.sums", bdf=bdf) == written
    guest.call("disk.check", bdf=bdf)
    assert " alive " in inspected(guest, bdf)
    if bdf != OWN:
        assert_maps_agree(guest, bdf)


def assert_maps_agree(rig: DiskRig, bdf: str) -> list[list[Any]]:
    """Compare the device's maps with its domain, address by address; return them."""
    device, domain, endpoint = rig.maps(bdf)
    ranges = domain["ranges"]  # the lowest ones, by IOVA
    assert len(device) == domain["mappings"] == endpoint["device"]["maps in all"]
    assert [[iova, size, access] for iova, size, _, access in device[: len(ranges)]] == [
        [iova, size, access] for iova, size, _, access in ranges
    ]
    assert endpoint["device"]["maps"] == ranges[: len(endpoint["device"]["maps"])]
    # All of this guest's RAM is one file, in one piece below 4 GiB.
    offsets = [offset for _, _, offset, _ in device[: len(ranges)]]
    assert offsets == [gpa if bdf == SHARED else None for _, _, gpa, _ in ranges]
    return device


def has_guest_memory(pid: int) -> bool:
    """Whether a process has a file of guest memory mapped, or open."""
    process = Path(f"/proc/{pid}")
    names = [process.joinpath("maps").read_text()]
    names += [entry.readlink().name for entry in process.joinpath("fd").iterdir()]
    return any("memfd:" in name for name in names)


def inspected(rig: DiskRig, bdf: str) -> str:
    """Return what ``viommu inspect`` shows of an endpoint: the lines that begin with it."""
    command = [sys.executable, "-m", "viommu.cli.main", "inspect", str(rig.server.directory)]
    environment = {**os.environ, "COLUMNS": "250"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return "\n".join(line for line in shown.stdout.splitlines() if line.strip().startswith(bdf))
