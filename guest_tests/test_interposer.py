"""A disk that another process serves, and that is dead for longer than the driver takes to notice.

That it is as good as one of viommu's own, and what else may happen, is in test_processes.py.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from guest_tests.lab.errors import GuestCallError
from guest_tests.lab.server import ViommuDevice
from guest_tests.rig import DISK, EDU, MODES, Rig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

FILES = {"a": 1, "b/c": 3 << 20}
RAW_OFFSET = 50 << 20
BUSY = 20  # megabytes written, more or less, by their unmaps


class Served:
    """A disk in a process of its own, to be used with ``memory`` shared or by messages.

    A ``plain`` one does not know that there is an IOMMU.
    """

    def __init__(self, directory: Path, memory: str, *, plain: bool = False) -> None:
        self.memory = memory
        self.kind = "guest_tests.plain_disk:KIND" if plain else "blk"
        self.socket = directory / "disk.sock"
        self.process: ViommuDevice | None = None
        self._image: Path | None = None

    def endpoint(self, image: Path) -> str:
        """Start it, and return what the server is told."""
        self._image = image
        self.start()
        return f"vfio-user,socket={self.socket},memory={self.memory}"

    def start(self) -> None:
        self.process = ViommuDevice(f"{self.kind},path={self._image}", self.socket)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.stop()


@pytest.fixture(params=["shared", "message"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """The process of the disk, which starts with the guest."""
    memory, _, kind = request.param.partition(" ")
    served = Served(tmp_path, memory, plain=kind == "plain")
    yield served
    if served.process is not None:
        served.process.stop()


@pytest.fixture
def rig(lab: Lab, some_kernel: Kernel, tmp_path: Path, served: Served) -> Iterator[Rig]:
    """A guest of the test's own, with a file system on its disk."""
    with Rig(lab, some_kernel, MODES["lazy"], tmp_path, disk=served.endpoint) as rig:
        rig.call("disk.make", bdf=DISK, megabytes=48)
        yield rig


def device(rig: Rig) -> Any:
    return rig.endpoint(DISK)["device"]


def maps_and_ranges(rig: Rig) -> tuple[Any, Any]:
    """What the device was told of, and what its domain has mapped, at one moment."""
    snapshot = rig.server.snapshot()
    endpoint = next(found for found in snapshot["endpoints"] if found["bdf"] == DISK)
    (domain,) = (found for found in snapshot["domains"] if found["id"] == endpoint["domain"])
    return endpoint["device"]["maps"], domain["ranges"]


@pytest.mark.parametrize("served", ["shared", "message", "shared plain"], indirect=True)
def write_until_it_dies(rig: Rig, served: Served) -> None:
    """Kill the disk while the guest writes, which then sees errors."""
    quiet = rig.server.snapshot()["iommu"]["counters"]["requests"]
    rig.vm.start("disk.write_until_error", bdf=DISK, offset=RAW_OFFSET)
    rig.wait_until(
        "the disk is busy",
        lambda snapshot: snapshot["iommu"]["counters"]["requests"] > quiet + BUSY,
    )
    served.kill()
    assert rig.vm.finish() == errno.EIO
    assert device(rig)["state"] == "dead"


def wait_until_alive(rig: Rig) -> None:
    rig.wait_until("there is a device again", lambda _: device(rig)["state"] == "alive")


@pytest.mark.parametrize("served", ["shared"], indirect=True)
@pytest.mark.parametrize("how", ["by itself", "by a reset"])
def test_a_disk_without_a_driver_is_taken_again(rig: Rig, served: Served, how: str) -> None:
    written = rig.call("disk.fill", bdf=DISK, files=FILES)
    write_until_it_dies(rig, served)
    rig.call("pci.unbind", bdf=DISK)

    served.start()
    if how == "by a reset":
        rig.call("pci.reset", bdf=DISK)
    wait_until_alive(rig)
    rig.call("pci.bind", bdf=DISK, name="virtio-pci")

    assert rig.call("disk.sums", bdf=DISK) == written
    rig.call("disk.check", bdf=DISK)


@pytest.mark.parametrize("served", ["message"], indirect=True)
def test_a_disk_that_is_gone_for_good_does_not_hold_the_guest_up(rig: Rig, served: Served) -> None:
    write_until_it_dies(rig, served)

    rig.call("pci.unbind", bdf=DISK)
    with pytest.raises(GuestCallError):
        rig.call("pci.bind", bdf=DISK, name="virtio-pci")
    rig.call("dma.both_ways", bdf=EDU)

    served.start()
    wait_until_alive(rig)
    rig.call("pci.bind", bdf=DISK, name="virtio-pci")
    rig.call("disk.check", bdf=DISK)
