"""A QEMU whose guest memory can't be shared is refused, and told what to add."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from guest_tests.lab.initramfs import build
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.server import ViommuServer
from guest_tests.rig import EDU, IOMMU

if TYPE_CHECKING:
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

NOTICED_SECONDS = 60.0
MEMORY = {
    "without a file": [],
    "a private copy": [
        *("-object", "memory-backend-memfd,id=mem,size=512M,share=off"),
        *("-machine", "memory-backend=mem"),
    ],
}


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_memory_that_is_not_shared_is_refused_with_the_remedy(
    lab: Lab, some_kernel: Kernel, tmp_path: Path, memory: list[str]
) -> None:
    boot = Image(some_kernel, build(some_kernel, lab.userland))
    with ViommuServer(tmp_path / "serve", IOMMU, {EDU: "edu"}, memory=None) as server:
        arguments = [*server.qemu_arguments(), "-m", "512M", *memory]
        machine = VirtualMachine(lab.qemu, boot, arguments, tmp_path)
        try:
            deadline = time.monotonic() + NOTICED_SECONDS
            while "share=on" not in server.log():
                assert time.monotonic() < deadline, f"not refused: {server.log()!r}"
                time.sleep(0.1)
        finally:
            machine.kill()
        assert "memory-backend-memfd" in server.log()
        assert server.alive()
