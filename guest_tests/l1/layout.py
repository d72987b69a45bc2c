"""The devices of the machine, and where they are: what the lab builds and the tests expect.

Source: QEMU's docs/specs/edu.rst, ivshmem-spec.rst and iommu-testdev.rst.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "APERTURE_BITS",
    "EDU",
    "GROUPED_EDU",
    "MACHINES",
    "MONITOR",
    "MSI_WINDOW",
    "NVME",
    "NVME_CONTENTS",
    "NVME_IMAGE_VARIABLE",
    "NVME_SIZE",
    "OTHER_EDU",
    "OTHER_GROUPED_EDU",
    "PLUGGED_EDU",
    "PLUGGED_EDU_ARGUMENTS",
    "SHARED_MEMORY",
    "SHARED_MEMORY_SIZE",
    "TEST_DEVICE",
    "Machine",
]


class Machine(NamedTuple):
    """A machine by its kernel, and what that can do.

    ``backends`` are ours that it can run. It has to be ``built`` or comes from Debian. ``mock``:
    iommufd's own mock of an IOMMU. ``bridges``: devices below a bridge to conventional PCI, which
    speaks for them, can change domains. (Linux 6.12 makes VT-d forget what it knew of the device
    and not of the bridge, so that they stay in the first domain that they did DMA in.)
    ``write_only``: what is mapped for writing can't be read. (Linux 6.12 sets a bit in every entry
    of VT-d that says "present" in one format of page tables and "readable" in the other one.)
    """

    backends: tuple[str, ...]
    built: bool = False
    mock: bool = False
    bridges: bool = False
    write_only: bool = False


MACHINES = {
    "6.12-l1": Machine(backends=("type1",)),
    "7.2-l1": Machine(
        backends=("type1", "iommufd"), built=True, mock=True, bridges=True, write_only=True
    ),
}

APERTURE_BITS = 39  # of the emulated IOMMU's I/O virtual addresses
MSI_WINDOW = (0xFEE00000, 0xFEF00000)  # where interrupts are written; never translated

EDU, OTHER_EDU = "00:03.0", "00:04.0"  # a DMA engine each, alone in its group
SHARED_MEMORY = "00:05.0"  # ivshmem: BAR 2 is memory
SHARED_MEMORY_SIZE = 4 << 20
TEST_DEVICE = "00:06.0"  # iommu-testdev: writes a word, and says whether it faulted
NVME = "00:07.0"  # can be reset, has MSI-X
NVME_SIZE = 16 << 20
NVME_CONTENTS = b"".join(b"%016x" % number for number in range(1 << 16))  # and then zeros
NVME_IMAGE_VARIABLE = "L1_NVME_IMAGE"  # of the environment: the file, outside, that it is
GROUPED_EDU, OTHER_GROUPED_EDU = "02:01.0", "02:02.0"  # below one conventional bridge
PLUGGED_EDU = "03:00.0"  # can be unplugged
PLUGGED_EDU_ARGUMENTS = {
    "driver": "edu",
    "id": "plugged",
    "bus": "hot",
    "dma_mask": (1 << 64) - 1,
}
MONITOR = "00:0a.0"  # a serial port to the QEMU that runs the machine
