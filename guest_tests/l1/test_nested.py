"""A guest inside this machine has one of its disks: Linux, QEMU, viommu, VFIO, an IOMMU."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.function import host_device
from guest_tests.l1.layout import NVME, NVME_CONTENTS, NVME_IMAGE_VARIABLE, NVME_SIZE
from guest_tests.lab import cpio
from guest_tests.lab.bundles import fetch
from guest_tests.lab.kbuild import L1_KERNEL, build_kernel
from guest_tests.lab.leash import leashed
from guest_tests.lab.manifest import GUEST
from guest_tests.lab.server import ViommuServer
from viommu.vmm.qemu_binary import find_qemu

if TYPE_CHECKING:
    from collections.abc import Callable

GUEST_SECONDS = 600.0  # emulated by what is itself emulated: one minute, where nothing else runs
# It may take that, and some more to start and to end. Its kernel is this machine's own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.iommufd,
    pytest.mark.seconds(GUEST_SECONDS + 120),
]

IOMMU, DISK = "00:05.0", "00:06.0"
PIECE = 256 << 10
INIT = Path(__file__).with_name("nested-init")
# Without the terminals of old there are hundreds of devices less to make.
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check "
    f"pty.legacy_count=0 piece={PIECE}"
)


def initramfs(directory: Path) -> Path:
    """Return an archive with a shell and what it is to do."""
    tree = directory / "tree"
    for name in ("bin", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    shutil.copy(fetch([GUEST])[GUEST.name] / "usr/bin/busybox", tree / "bin/busybox")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    archive = directory / "initramfs.cpio"
    archive.write_bytes(cpio.archive(tree))
    return archive


def live(command: list[str], server: ViommuServer, console: Path) -> str:
    """Run a guest until it switches off, and return what it said."""
    deadline = time.monotonic() + GUEST_SECONDS
    with console.open("wb") as output:
        qemu = subprocess.Popen(
            leashed(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        while qemu.poll() is None:
            assert server.alive(), "viommu has ended"
            assert time.monotonic() < deadline, f"the guest is up after {GUEST_SECONDS:g} s"
            time.sleep(0.1)
    finally:
        qemu.kill()
        qemu.wait()
        said = console.read_text(errors="replace")
        print(f"--- guest ---\n{said}\n--- viommu serve ---\n{server.log()}")
    assert qemu.returncode == 0
    return said


def read_outside(start: int, size: int) -> bytes:
    """Return what the file has, outside this machine, that is the disk."""
    image = os.open(os.environ[NVME_IMAGE_VARIABLE], os.O_RDONLY)
    try:
        os.posix_fadvise(image, 0, 0, os.POSIX_FADV_DONTNEED)  # what was read through 9p before
        return os.pread(image, size, start)
    finally:
        os.close(image)


def test_a_guest_in_the_guest_uses_a_disk_of_the_host(
    backend: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    host_device(NVME)
    endpoints = {DISK: f"vfio,host=0000:{NVME},backend={backend}"}
    with ViommuServer(tmp_path / "serve", IOMMU, endpoints, memory="256M") as server:
        command = [
            *(str(find_qemu()), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "tcg,thread=single", "-cpu", "max,la57=off", "-no-reboot"),
            *("-kernel", str(build_kernel(L1_KERNEL).image)),
            *("-initrd", str(initramfs(tmp_path)), "-append", COMMAND_LINE),
            *("-serial", "stdio", *server.qemu_arguments()),
        ]
        said = live(command, server, tmp_path / "console.log")
        counters = server.snapshot()["iommu"]["counters"]

    found = dict(re.findall(r"found: (.*): (\S+)", said))
    seconds = float(found.pop("seconds"))
    written = hashlib.sha256(read_outside(PIECE, PIECE)).hexdigest()
    assert found.pop("domain") in {"DMA", "DMA-FQ"}  # translated, and not identity
    assert found == {
        "IOMMU": "virtio_iommu",
        "sectors": str(NVME_SIZE // 512),
        "first": hashlib.sha256(NVME_CONTENTS[:PIECE]).hexdigest(),
        "written": written,
        "second": written,
    }
    assert read_outside(0, PIECE) == NVME_CONTENTS[:PIECE]
    assert counters["requests"] > 0
    assert counters["refused"] == counters["mappings"] == 0  # the driver took back what it mapped
    record_property("time", f"{time.monotonic() - began:.0f} s, {seconds:.0f} s of them in Linux")
