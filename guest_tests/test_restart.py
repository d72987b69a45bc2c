"""Guests and VMMs that start again on the same server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest_tests.rig import DISK, EDU, MODES, Rig

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

FILES = {"a": 1, "b/c": 3 << 20}
HOLD_MS = 3000  # longer than it takes to notice and to kill
BUSY_REQUESTS = 200
# From a QEMU that has just connected to a guest that looks at its disk.
KILLED_AFTER_REQUESTS = (0, 1, 5)


@pytest.fixture
def rig(lab: Lab, kernel: Kernel, tmp_path: Path) -> Iterator[Rig]:
    """A guest of the test's own, with files on its disk."""
    with Rig(lab, kernel, MODES["lazy"], tmp_path, reboots=True) as rig:
        rig.call("disk.make", bdf=DISK, megabytes=48)
        yield rig


def kill(rig: Rig) -> None:
    """Kill QEMU, and wait until the server has seen all its connections end."""
    rig.vm.kill()
    rig.wait_until(
        "every client is gone",
        lambda snapshot: (
            not any(
                function["connected"] for function in (snapshot["iommu"], *snapshot["endpoints"])
            )
        ),
    )


def assert_no_more_descriptors(rig: Rig, before: Counter[str]) -> None:
    """Check that the server keeps nothing of clients that are gone.

    An endpoint's open export session has an eventfd, which the next client takes over.
    """
    now = rig.server.descriptors()
    assert now.pop("anon_inode:[eventfd]", 0) <= len(rig.server.snapshot()["endpoints"])
    before.pop("anon_inode:[eventfd]", None)
    assert now == before


def test_a_guest_reboots(rig: Rig) -> None:
    written = rig.call("disk.fill", bdf=DISK, files=FILES)
    rig.call("dma.both_ways", bdf=EDU)
    before = rig.server.snapshot()["pid"]
    rig.vm.start("system.reboot")
    rig.vm.wait_for_boot()

    assert rig.call("disk.sums", bdf=DISK) == written
    rig.call("disk.check", bdf=DISK)
    rig.call("dma.both_ways", bdf=EDU)
    assert len(rig.call("dma.strays", bdf=EDU)) == 5
    assert rig.server.snapshot()["pid"] == before


def test_the_server_ends_cleanly_after_its_guest(rig: Rig) -> None:
    rig.call("disk.fill", bdf=DISK, files=FILES)
    rig.call("dma.both_ways", bdf=EDU)
    rig.vm.power_off()

    assert rig.vm.process.returncode == 0
    assert rig.vm.output() == ""
    assert rig.server.stop() == 0
    assert rig.server.log() == ""
    assert not list(rig.server.directory.glob("*")), "it left files behind"


def test_qemu_is_killed_and_another_comes(rig: Rig) -> None:
    written = rig.call("disk.fill", bdf=DISK, files=FILES)
    quiet = rig.server.snapshot()["iommu"]["counters"]["requests"]
    rig.vm.start("disk.fill_for_ever", bdf=DISK)
    rig.wait_until(
        "the disk is busy",
        lambda snapshot: snapshot["iommu"]["counters"]["requests"] > quiet + BUSY_REQUESTS,
    )
    kill(rig)
    before = rig.server.descriptors()

    rig.boot()
    found = rig.call("disk.sums", bdf=DISK)  # mounting replays the journal

    assert {name: digest for name, digest in found.items() if name in written} == written
    rig.call("disk.check", bdf=DISK)
    rig.call("dma.both_ways", bdf=EDU)
    kill(rig)
    assert_no_more_descriptors(rig, before)


def test_qemu_is_killed_early_and_late(rig: Rig) -> None:
    kill(rig)
    before = rig.server.descriptors()
    for requests in KILLED_AFTER_REQUESTS:
        enough = rig.server.snapshot()["iommu"]["counters"]["requests"] + requests
        rig.start()
        rig.wait_until("it connects", lambda snapshot: snapshot["iommu"]["connected"])
        while rig.server.snapshot()["iommu"]["counters"]["requests"] < enough:
            assert rig.vm.process.poll() is None, rig.vm.console()
        kill(rig)
    assert_no_more_descriptors(rig, before)

    rig.boot()
    rig.call("disk.check", bdf=DISK)


def test_qemu_is_killed_while_an_unmap_waits(rig: Rig) -> None:
    rig.vm.start("dma.unmap_held", bdf=EDU, milliseconds=HOLD_MS, policy=0)
    rig.wait_until("the unmap is parked", lambda snapshot: snapshot["iommu"]["waiting"])
    kill(rig)
    rig.wait_until("nothing waits", lambda snapshot: not snapshot["iommu"]["waiting"])

    rig.boot()
    rig.call("dma.both_ways", bdf=EDU)
    assert len(rig.call("dma.strays", bdf=EDU)) == 5
