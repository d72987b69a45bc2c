"""Machines that are hosts of their own: real VFIO and iommufd, with no such hardware at hand.

QEMU emulates an IOMMU (VT-d) and devices that do DMA behind it; the root file system is this
machine's own, read-only, so that the tests inside run the same code on the same Python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.l1 import layout
from guest_tests.lab.bundles import fetch
from guest_tests.lab.cache import cache_directory
from guest_tests.lab.kbuild import L1_KERNEL, build_kernel
from guest_tests.lab.kernels import Kernel, debian_l1_kernel
from guest_tests.lab.l1_initramfs import build_l1
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.manifest import GUEST
from guest_tests.lab.userland import Userland

if TYPE_CHECKING:
    from viommu.vmm.qemu_binary import Qemu

__all__ = ["boot_l1", "l1_arguments", "l1_kernel"]

_MEMORY = "1G"
_ROOT = Path(__file__).parents[2]
_BRIDGE_PORT = "slow"
_EDU = "edu,dma_mask=0xffffffffffffffff"  # QEMU's default is 28 bits, and clamps in silence


def l1_kernel(name: str) -> Kernel:
    """Return the kernel of the machine ``name``: built here, or Debian's own."""
    return build_kernel(L1_KERNEL) if name == L1_KERNEL else debian_l1_kernel()


def boot_l1(qemu: Qemu, name: str, directory: Path) -> VirtualMachine:
    """Start the machine ``name`` (of ``guest_tests.l1.layout.MACHINES``)."""
    kernel = l1_kernel(name)
    userland = Userland(fetch([GUEST])[GUEST.name])
    disk = directory / "disk.img"
    disk.write_bytes(layout.NVME_CONTENTS.ljust(layout.NVME_SIZE, b"\0"))
    environment = {  # of the first process, and so of the tests
        "l1_root": _ROOT,
        "l1_python": sys.executable,
        "VIOMMU_CACHE": cache_directory().parent,
        "VIOMMU_QEMU": qemu.path.absolute(),
        layout.NVME_IMAGE_VARIABLE: disk,
    }
    settings = " ".join(f'{name}="{value}"' for name, value in environment.items())
    image = Image(kernel, build_l1(kernel, userland), f"intel_iommu=on {settings}")
    arguments = l1_arguments(directory / "monitor.sock", disk)
    return VirtualMachine(qemu, image, arguments, directory)


def l1_arguments(monitor: Path, disk: Path) -> list[str]:
    """Return QEMU's arguments for the machine and its devices.

    A serial port of the machine leads to QEMU's own monitor, through the socket ``monitor``. The
    file ``disk`` is the contents of its NVMe disk.
    """
    arguments = ["-machine", "q35,kernel-irqchip=split", "-m", _MEMORY]
    # The IOMMU comes first: QEMU gives it only to devices that are made after it.
    devices = [f"intel-iommu,intremap=on,aw-bits={layout.APERTURE_BITS}"]
    devices += [_at(layout.EDU, _EDU), _at(layout.OTHER_EDU, _EDU)]
    arguments += ["-object"]
    arguments += [f"memory-backend-memfd,id=shared,size={layout.SHARED_MEMORY_SIZE},share=on"]
    devices += [_at(layout.SHARED_MEMORY, "ivshmem-plain,memdev=shared")]
    devices += [_at(layout.TEST_DEVICE, "iommu-testdev")]
    arguments += ["-blockdev", f"driver=file,node-name=disk,filename={disk}"]
    devices += [_at(layout.NVME, "nvme,drive=disk,serial=l1")]
    # Two functions that the IOMMU can't tell apart, below a bridge to conventional PCI.
    devices += [f"pcie-root-port,id={_BRIDGE_PORT},chassis=1,slot=1,bus=pcie.0,addr=8.0"]
    devices += [f"pcie-pci-bridge,id=bridge,bus={_BRIDGE_PORT}"]
    for bdf in (layout.GROUPED_EDU, layout.OTHER_GROUPED_EDU):
        devices += [_at(bdf, _EDU, "bridge")]
    hot_port = layout.PLUGGED_EDU_ARGUMENTS["bus"]
    devices += [f"pcie-root-port,id={hot_port},chassis=2,slot=2,bus=pcie.0,addr=9.0"]
    devices += [json.dumps(layout.PLUGGED_EDU_ARGUMENTS)]
    arguments += ["-chardev", f"socket,id=monitor,path={monitor},server=on,wait=off"]
    arguments += ["-mon", "chardev=monitor,mode=control"]
    arguments += ["-chardev", f"socket,id=control,path={monitor}"]
    devices += [_at(layout.MONITOR, "pci-serial,chardev=control")]
    arguments += ["-fsdev"]
    arguments += ["local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
    devices += ["virtio-9p-pci,fsdev=root,mount_tag=host,bus=pcie.0,addr=1e.0"]
    for device in devices:
        arguments += ["-device", device]
    return arguments


def _at(bdf: str, device: str, bus: str = "pcie.0") -> str:
    """Return ``device`` at the slot and function of ``bdf``, on ``bus``."""
    slot, function = bdf.rsplit(":", 1)[1].split(".")
    return f"{device},bus={bus},addr={int(slot, 16):x}.{function}"
