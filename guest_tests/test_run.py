"""``viommu run``: server and QEMU by one command, which ends when the guest does."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

from guest_tests.lab.channel import Channel
from guest_tests.lab.initramfs import build
from guest_tests.lab.leash import leashed
from guest_tests.lab.machine import BOOT_SECONDS, CALL_SECONDS
from guest_tests.rig import DISK, IOMMU

if TYPE_CHECKING:
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab


def test_it_boots_to_a_mounted_file_system_and_ends_with_the_guest(
    lab: Lab, kernel: Kernel, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    with disk.open("r+b") as image:
        image.truncate(32 << 20)
    socket = tmp_path / "status.sock"
    command = [sys.executable, "-m", "viommu.cli.main", "run", "--qemu", str(lab.qemu.path)]
    command += ["--kernel", str(kernel.image), "--initrd", str(build(kernel, lab.userland))]
    command += ["--iommu", IOMMU, "--endpoint", f"{DISK}=blk,path={disk}", "--append", "panic=-1"]
    command += ["--", "-no-reboot", "-chardev", f"socket,id=status,path={socket}"]
    command += ["-serial", "chardev:status"]
    channel = Channel(socket)
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            leashed(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    channel.watch(process.pid)
    try:
        channel.boot(time.monotonic() + BOOT_SECONDS)
        channel.send("disk.make", {"bdf": DISK, "megabytes": 32})
        channel.result(time.monotonic() + CALL_SECONDS)
        channel.send("disk.fill", {"bdf": DISK, "files": {"file": 1 << 20}})
        assert list(channel.result(time.monotonic() + CALL_SECONDS)) == ["file"]
        channel.send("system.power_off", {})
        status = process.wait(CALL_SECONDS)
    finally:
        process.kill()
        process.wait()
        channel.close()
        said = (tmp_path / "output").read_text(errors="replace")
        print(said)

    assert status == 0, said
    assert "virtio_iommu" in said, "the guest's console isn't on the terminal"
    lab.userland.run("usr/sbin/e2fsck", "-f", "-n", str(disk))
