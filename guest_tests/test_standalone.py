"""Stand-alone devices: QEMU uses them directly, and no IOMMU is anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from guest_tests.lab.initramfs import build
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.server import ViommuDevice
from guest_tests.rig import DISK, EDU
from viommu.vmm import Bdf, device_argument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

DISK_SIZE = 64 << 20
FILES = {"empty": 0, "odd": 1_234_567, "large": 8 << 20}
NOTICED_SECONDS = 60.0
SHARED = [
    *("-object", "memory-backend-memfd,id=mem,size=512M,share=on"),
    *("-machine", "memory-backend=mem"),
]
PRIVATE = [
    *("-object", "memory-backend-memfd,id=mem,size=512M,share=off"),
    *("-machine", "memory-backend=mem"),
]


class Setup(NamedTuple):
    """Two devices, each in a process of its own, and what boots on them."""

    lab: Lab
    kernel: Kernel
    directory: Path
    image: Path
    devices: dict[str, ViommuDevice]

    def boot(self, memory: list[str]) -> VirtualMachine:
        """Start QEMU with both devices."""
        arguments = ["-machine", "q35", "-m", "512M", *memory]
        for address, device in self.devices.items():
            bdf = Bdf.parse(address)
            where = {"bus": "pcie.0", "addr": f"{bdf.device:x}.{bdf.function:x}"}
            arguments += ["-device", device_argument(device.socket, where)]
        image = Image(self.kernel, build(self.kernel, self.lab.userland))
        return VirtualMachine(self.lab.qemu, image, arguments, self.directory)


@pytest.fixture(scope="module")
def setup(
    lab: Lab, some_kernel: Kernel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("alone")
    image = directory / "disk.img"
    with image.open("wb") as disk:
        disk.truncate(DISK_SIZE)
    descriptions = {DISK: f"blk,path={image}", EDU: "edu"}
    with contextlib.ExitStack() as stack:
        devices = {
            bdf: stack.enter_context(ViommuDevice(description, directory / f"{bdf}.sock"))
            for bdf, description in descriptions.items()
        }
        yield Setup(lab, some_kernel, directory, image, devices)


def test_a_guest_uses_a_disk_and_an_edu_without_an_iommu(setup: Setup) -> None:
    with setup.boot(SHARED) as machine:
        machine.wait_for_boot()
        machine.call("disk.make", bdf=DISK, megabytes=48)
        written = machine.call("disk.fill", bdf=DISK, files=FILES)
        machine.call("disk.rebind", bdf=DISK)
        assert machine.call("disk.sums", bdf=DISK) == written
        machine.call("disk.check", bdf=DISK)
        raw = machine.call("disk.write_raw", bdf=DISK, offset=50 << 20, count=(4 << 20) + 4096)

        machine.call("physical.both_ways", bdf=EDU)
        assert machine.call("physical.strays", bdf=EDU) == [
            "translation fault",
            "translation fault",
            "translation fault",
            "ok",
        ]

    setup.lab.userland.run("usr/sbin/e2fsck", "-f", "-n", str(setup.image))
    with setup.image.open("rb") as image:
        image.seek(50 << 20)
        assert hashlib.sha256(image.read((4 << 20) + 4096)).hexdigest() == raw
    assert all(device.alive() for device in setup.devices.values())
    assert "write at IOVA 0x10000000000 faulted" in setup.devices[EDU].log()


def test_the_next_guest_finds_what_the_first_one_wrote(setup: Setup) -> None:
    with setup.boot(SHARED) as machine:
        machine.wait_for_boot()
        machine.call("disk.make", bdf=DISK, megabytes=16)
        written = machine.call("disk.fill", bdf=DISK, files=FILES)
        machine.kill()  # in the middle of everything
    with setup.boot(SHARED) as machine:
        machine.wait_for_boot()
        assert machine.call("disk.sums", bdf=DISK) == written
        machine.call("physical.both_ways", bdf=EDU)


@pytest.mark.parametrize("memory", [[], PRIVATE], ids=["without a file", "a private copy"])
def test_memory_that_is_not_shared_is_refused(setup: Setup, memory: list[str]) -> None:
    device = setup.devices[DISK]
    before = device.log().count("share=on")
    machine = setup.boot(memory)
    try:
        deadline = time.monotonic() + NOTICED_SECONDS
        while device.log().count("share=on") == before:
            assert time.monotonic() < deadline, f"not refused: {device.log()!r}"
            time.sleep(0.1)
    finally:
        machine.kill()
    assert device.alive()
