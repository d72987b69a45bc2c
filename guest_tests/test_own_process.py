"""Endpoints in processes of their own, which may end, or have to.

That they are as good as in the server's process is in test_processes.py.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from guest_tests.rig import DISK, EDU, MODES, OTHER_EDU, Rig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

OWN_DISK = "blk,path={},process=own".format
LIMIT = 1.0  # seconds that a process may hold what was unmapped
HOLD_MS = 5000  # for so long it would
CLOCKS_AGREE = 0.9


def pid(rig: Rig, bdf: str) -> int:
    """The process of an endpoint."""
    found = rig.endpoint(bdf)["process"]["pid"]
    assert isinstance(found, int)
    return found


def is_alive(rig: Rig, bdf: str) -> bool:
    return bool(rig.endpoint(bdf)["device"]["state"] == "alive")


@pytest.fixture
def rig(lab: Lab, some_kernel: Kernel, tmp_path: Path) -> Iterator[Rig]:
    """A guest of the test's own; all endpoints but one have processes of their own."""
    edu = f"edu,process=own,hold-limit={LIMIT}"
    with Rig(lab, some_kernel, MODES["lazy"], tmp_path, disk=OWN_DISK, edu=edu) as rig:
        yield rig


def test_one_that_does_not_let_go_is_killed(rig: Rig) -> None:
    rig.call("disk.make", bdf=DISK, megabytes=48)
    before = pid(rig, EDU)
    seconds = rig.call("dma.unmap_of_the_dead", bdf=EDU, milliseconds=HOLD_MS)

    assert LIMIT * CLOCKS_AGREE < seconds < HOLD_MS / 1000 * CLOCKS_AGREE
    assert rig.endpoint(EDU)["process"]["ended"] == "killed by SIGKILL"
    assert f"process {before} has not let go of 1 exports" in rig.server.log()
    rig.call("dma.both_ways", bdf=OTHER_EDU)
    assert rig.call("disk.sums", bdf=DISK) == {}

    # Who gave the function up, in the guest, has reset it, which starts another process.
    rig.wait_until("there is a device again", lambda _: is_alive(rig, EDU))
    rig.call("dma.both_ways", bdf=EDU)
    assert pid(rig, EDU) != before


def test_the_server_ends_its_processes(rig: Rig) -> None:
    assert pid(rig, EDU) != pid(rig, DISK)
    processes = [os.pidfd_open(pid(rig, bdf)) for bdf in (EDU, DISK)]
    rig.vm.power_off()

    assert rig.server.stop() == 0
    assert rig.server.log() == ""
    for pidfd in processes:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, 0)
        os.close(pidfd)
