"""How long a guest waits for a MAP and an UNMAP: viommu beside QEMU's own virtio-iommu.

``python -m guest_tests.speed`` boots one after the other, in turns, and prints both with
their ratio. A time alone means nothing on a shared machine, and under emulation most of
it is the guest's own.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.lab.bundles import fetch
from guest_tests.lab.initramfs import build
from guest_tests.lab.kernels import debian_kernel
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.manifest import GUEST
from guest_tests.lab.qemu import choose_qemu
from guest_tests.lab.server import ViommuServer
from guest_tests.lab.userland import Userland

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TURNS = 3
ROUNDS, PAIRS = 5, 400
EDU = "00:06.0"
KERNEL = "6.12"
QEMU_OWN = (
    *("-machine", "q35", "-m", "512M"),
    *("-device", "virtio-iommu-pci,addr=05.0", "-device", "edu,addr=06.0"),
)


@contextlib.contextmanager
def ours(directory: Path) -> Iterator[Sequence[str]]:
    """Serve, and give QEMU's arguments."""
    with ViommuServer(directory / "serve", "00:05.0", {EDU: "edu"}) as server:
        yield server.qemu_arguments()


@contextlib.contextmanager
def theirs(_directory: Path) -> Iterator[Sequence[str]]:
    """Give the arguments for the device in QEMU's own process."""
    yield QEMU_OWN


def main() -> int:
    """Measure and print."""
    qemu = choose_qemu()
    kernel = debian_kernel(KERNEL)
    image = Image(kernel, build(kernel, Userland(fetch([GUEST])[GUEST.name])))
    times: dict[str, list[float]] = {"viommu": [], "QEMU's own": []}
    for _ in range(TURNS):
        for name, peer in zip(times, (ours, theirs), strict=True):
            with tempfile.TemporaryDirectory() as scratch:
                directory = Path(scratch)
                with (
                    peer(directory) as arguments,
                    VirtualMachine(qemu, image, arguments, directory, smp=2) as vm,
                ):
                    vm.wait_for_boot()
                    times[name] += vm.call(
                        "speed.map_and_unmap", bdf=EDU, rounds=ROUNDS, pairs=PAIRS
                    )
    print(
        f"one page, MAP and UNMAP, seen by a driver in the guest's user space;\n"
        f"Linux {kernel.release}, QEMU {'.'.join(map(str, qemu.version))} (TCG), "
        f"Python {platform.python_version()}, {TURNS * ROUNDS} rounds of {PAIRS} in turns"
    )
    for name, rounds in times.items():
        print(
            f"  {name:12} {min(rounds) * 1e6:7.1f} us at best, "
            f"{statistics.median(rounds) * 1e6:7.1f} us median"
        )
    best = [min(rounds) for rounds in times.values()]
    print(f"  ratio of the best: {best[0] / best[1]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
