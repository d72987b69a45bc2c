"""Endpoints in processes of their own: as good as in the server's, and they may die.

That a disk is as good wherever it is, is tested in test_processes.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from guest_tests.rig import DISK, EDU, MODES, OTHER_EDU, Rig
from guest_tests.test_dma import (  # noqa: F401 - tests that run here too, with this guest
    FINISH,
    test_an_endpoint_moves_to_another_domain,
    test_an_unmap_ends_a_transfer_that_lets_go,
    test_memory_is_copied_through_the_device,
    test_strays_are_blocked_and_reported,
    test_two_endpoints_share_one_domain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

FILES = {"a": 1, "b/c": 3 << 20}
RAW_OFFSET = 50 << 20
BUSY = 20  # requests to the IOMMU, by which the disk writes
OWN_DISK = "blk,path={},process=own".format
HOLD_MS = 3000
AT_ONCE = 1.0  # seconds, on a machine that may be busy; far less than the hold time
LIMIT = 1.0  # seconds that a process may hold what was unmapped


def pid(rig: Rig, bdf: str) -> int:
    """The process of an endpoint."""
    found = rig.endpoint(bdf)["process"]["pid"]
    assert isinstance(found, int)
    return found


def is_alive(rig: Rig, bdf: str) -> bool:
    return bool(rig.endpoint(bdf)["device"]["state"] == "alive")


@pytest.fixture(scope="module", params=["lazy", "strict"])
def guest(
    request: pytest.FixtureRequest,
    lab: Lab,
    kernel: Kernel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    """A booted guest in each mode; all endpoints but one have processes of their own."""
    directory = tmp_path_factory.mktemp(f"{kernel.name}-{request.param}-own")
    edu = "edu,process=own"
    with Rig(lab, kernel, MODES[request.param], directory, disk=OWN_DISK, edu=edu) as rig:
        assert pid(rig, EDU) != pid(rig, DISK)
        yield rig


@pytest.fixture
def rig(lab: Lab, some_kernel: Kernel, tmp_path: Path) -> Iterator[Rig]:
    """A guest of the test's own, with files on its disk."""
    edu = f"edu,process=own,hold-limit={LIMIT}"
    with Rig(lab, some_kernel, MODES["lazy"], tmp_path, disk=OWN_DISK, edu=edu) as rig:
        rig.call("disk.make", bdf=DISK, megabytes=48)
        yield rig


def test_an_unmap_waits_for_its_client_and_nobody_else_does(guest: Rig) -> None:
    guest.vm.start("dma.unmap_held", bdf=EDU, milliseconds=HOLD_MS, policy=FINISH)
    snapshot = guest.wait_until("it is parked", lambda snapshot: snapshot["iommu"]["waiting"])
    looks = []
    while snapshot["iommu"]["waiting"]:
        began = time.monotonic()
        snapshot = guest.server.snapshot()
        looks.append(time.monotonic() - began)
    outcome = guest.vm.finish()

    times = outcome["times"]
    assert (times["released"] - times["exported"]) // 1_000_000 in range(HOLD_MS, HOLD_MS + 1000)
    assert outcome["seconds"] < HOLD_MS / 1000 + AT_ONCE
    assert (outcome["result"], outcome["arrived"]) == ("ok", True)
    assert max(looks) < AT_ONCE
    assert len(looks) > 10


def test_one_that_does_not_let_go_is_killed(rig: Rig) -> None:
    before = pid(rig, EDU)
    seconds = rig.call("dma.unmap_of_the_dead", bdf=EDU, milliseconds=5000)

    assert LIMIT * 0.9 < seconds < LIMIT + AT_ONCE
    assert rig.endpoint(EDU)["process"]["ended"] == "killed by SIGKILL"
    assert f"process {before} has not let go of 1 exports" in rig.server.log()
    rig.call("dma.both_ways", bdf=OTHER_EDU)
    assert rig.call("disk.sums", bdf=DISK) == {}

    # Who gave the function up, in the guest, has reset it, which starts another process.
    rig.wait_until("there is a device again", lambda _: is_alive(rig, EDU))
    rig.call("dma.both_ways", bdf=EDU)
    assert pid(rig, EDU) != before


def test_a_disk_whose_process_is_killed_while_it_writes(rig: Rig) -> None:
    written = rig.call("disk.fill", bdf=DISK, files=FILES)
    quiet = rig.server.snapshot()["iommu"]["counters"]["requests"]
    rig.vm.start("disk.write_until_error", bdf=DISK, offset=RAW_OFFSET)
    rig.wait_until(
        "the disk is busy",
        lambda snapshot: snapshot["iommu"]["counters"]["requests"] > quiet + BUSY,
    )
    os.kill(pid(rig, DISK), signal.SIGKILL)

    assert rig.vm.finish() == errno.EIO
    assert rig.endpoint(DISK)["exports"]["client"] is None
    rig.call("dma.both_ways", bdf=EDU)
    rig.call("dma.both_ways", bdf=OTHER_EDU)
    rig.call("pci.unbind", bdf=DISK)
    rig.wait_until("there is a device again", lambda _: is_alive(rig, DISK))
    rig.call("pci.bind", bdf=DISK, name="virtio-pci")
    assert rig.call("disk.sums", bdf=DISK) == written
    rig.call("disk.check", bdf=DISK)
    assert rig.endpoint(DISK)["process"]["starts"] == 2


def test_the_server_ends_its_processes(rig: Rig) -> None:
    processes = [os.pidfd_open(pid(rig, bdf)) for bdf in (EDU, DISK)]
    rig.vm.power_off()

    assert rig.server.stop() == 0
    assert rig.server.log() == ""
    for pidfd in processes:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, 0)
        os.close(pidfd)
