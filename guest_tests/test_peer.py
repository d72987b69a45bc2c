"""A control: the guest programs judge QEMU's own virtio-iommu, disk and edu as they do ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_tests.lab.initramfs import build
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.rig import DISK, EDU, OTHER_EDU, endpoint_id

if TYPE_CHECKING:
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab


def test_the_guest_programs_accept_qemus_own_devices(
    lab: Lab, kernel: Kernel, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    with disk.open("r+b") as image:
        image.truncate(64 << 20)
    arguments = ["-machine", "q35", "-m", "512M", "-device", "virtio-iommu-pci,addr=5"]
    for address in ("6", "8"):
        arguments += ["-device", f"edu,addr={address},dma_mask=0xffffffffffffffff"]
    arguments += ["-drive", f"if=none,id=disk,format=raw,file={disk}"]
    arguments += [
        "-device",
        "virtio-blk-pci,drive=disk,addr=7,iommu_platform=on,disable-legacy=on",
    ]
    boot = Image(kernel, build(kernel, lab.userland))
    with VirtualMachine(lab.qemu, boot, arguments, tmp_path) as machine:
        machine.wait_for_boot()
        machine.call("disk.make", bdf=DISK, megabytes=48)
        written = machine.call("disk.fill", bdf=DISK, files={"a": 4 << 20})
        machine.call("disk.write_raw", bdf=DISK, offset=50 << 20, count=1 << 20)
        machine.call("disk.rebind", bdf=DISK)
        machine.call("dma.take", bdf=DISK)
        machine.call("dma.give_back")
        machine.call("pci.bind", bdf=DISK, name="virtio-pci")
        assert machine.call("disk.sums", bdf=DISK) == written
        machine.call("dma.both_ways", bdf=EDU)
        outcomes = machine.call("dma.strays", bdf=EDU)
        outcomes += machine.call("dma.one_domain", first=EDU, second=OTHER_EDU)
        outcomes.append(machine.call("dma.successive_domains", bdf=EDU))
    for outcome in outcomes:
        bdf = outcome.get("bdf", EDU)
        assert f"fault from EP {endpoint_id(bdf)} at {outcome['iova']:#x} [" in outcome["log"]
