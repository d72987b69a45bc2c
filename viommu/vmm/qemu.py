"""The QEMU arguments that connect a virtual machine to a running server.

Source: QEMU 11.1 ``-device vfio-user-pci,help``, ``-help`` (``-acpitable``,
``-object memory-backend-memfd``); ``qapi/acpi.json`` (a list of files is split at colons).
"""

from __future__ import annotations

import json
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from viommu.vmm.bdf import Bdf

__all__ = [
    "MEMORY_REMEDY",
    "check_directory",
    "device_argument",
    "door_name",
    "format_size",
    "qemu_arguments",
    "socket_name",
]

MEMORY_REMEDY: Final = (
    "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem -m SIZE"
)
"""What to add to a QEMU command line so that guest memory can be shared with us."""

_SUN_PATH_MAX: Final = 107  # sizeof(sockaddr_un.sun_path) less the NUL, unix(7)
_LONGEST_NAME: Final = "00:00.0.export.sock"
_MEBIBYTE: Final = 1 << 20
_UNITS: Final = ((1 << 40, "T"), (1 << 30, "G"), (_MEBIBYTE, "M"), (1 << 10, "K"))


def socket_name(bdf: Bdf) -> str:
    """Return the file name of the socket of the function at ``bdf``: ``00:05.0.sock``."""
    return f"{bdf}.sock"


def door_name(bdf: Bdf) -> str:
    """Return the file name of the export socket of an endpoint: ``00:09.0.export.sock``."""
    return f"{bdf}.export.sock"


def format_size(size: int) -> str:
    """Write a number of bytes as QEMU reads it back exactly: ``512M``, ``1536M``, ``4097``."""
    for unit, suffix in _UNITS:
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)


def check_directory(directory: Path) -> None:
    """Check that QEMU and the kernel can be given the files of ``directory`` (absolute).

    Raises:
        UsageError: A socket path in it would be too long, or it has a character
            that QEMU's ``-acpitable`` or a file of one argument a line can't carry.
    """
    text = os.fspath(directory)
    if ":" in text:
        raise UsageError(
            f"directory {text!r}: QEMU's -acpitable splits file names at ':', "
            "choose one without a colon"
        )
    if not text.isprintable():
        raise UsageError(
            f"directory {text!r}: the name is not printable text, which qemu.args can't carry; "
            "choose another"
        )
    length = len(os.fsencode(directory / _LONGEST_NAME))
    if length > _SUN_PATH_MAX:
        raise UsageError(
            f"directory {text!r}: socket paths in it would have {length} bytes and "
            f"Linux allows {_SUN_PATH_MAX}; choose a shorter one, such as below /run or /tmp"
        )


def qemu_arguments(
    sockets: Mapping[Bdf, Path], viot: Path, memory: int | None, *, blocked_at_boot: bool = False
) -> list[str]:
    """Return the arguments (argv elements) for a q35 machine with these functions.

    Args:
        sockets: The absolute socket path of each function, the IOMMU's included.
        viot: The absolute path of the table of :func:`~viommu.vmm.viot.build_viot`.
        memory: Bytes of guest memory, a multiple of 1 MiB, shared with us as a
            memfd. ``None`` leaves memory to the caller, who must share it.
        blocked_at_boot: Endpoints reach nothing before a driver attaches them.
            SeaBIOS must then leave disks alone that it isn't told to boot from: it
            would wait for ever for the first read.

    Raises:
        UsageError: The size of the memory is nothing that a machine can have.
    """
    machine = "q35"
    arguments = []
    if memory is not None:
        if memory <= 0 or memory % _MEBIBYTE:
            raise UsageError(f"guest memory of {memory} bytes: give a multiple of 1M, as 512M")
        size = format_size(memory)
        machine += ",memory-backend=mem"
        arguments = ["-m", size, "-object", f"memory-backend-memfd,id=mem,size={size},share=on"]
    arguments = ["-machine", machine, *arguments]
    if blocked_at_boot:
        arguments += ["-boot", "strict=on"]
    # QEMU's option parser ends a value at a comma; a doubled one stands for itself.
    arguments += ["-acpitable", "file=" + os.fspath(viot).replace(",", ",,")]
    crowded = {bdf.device for bdf in sockets if bdf.function}
    for bdf, path in sorted(sockets.items()):
        where: dict[str, object] = {
            "id": f"viommu-{bdf.bus:02x}-{bdf.device:02x}-{bdf.function:x}",
            "bus": "pcie.0",
            "addr": f"{bdf.device:x}.{bdf.function:x}",
        }
        if bdf.device in crowded:
            where["multifunction"] = True
        arguments += ["-device", device_argument(path, where)]
    return arguments


def device_argument(path: Path, where: Mapping[str, object] = MappingProxyType({})) -> str:
    """Return what follows ``-device`` for the device at the socket ``path`` (absolute).

    ``where`` are more properties: the ``bus`` that it is on, its ``addr``, its ``id``.
    """
    socket = {"type": "unix", "path": os.fspath(path)}
    # No blanks: the line survives a shell that splits words.
    return json.dumps({"driver": "vfio-user-pci", **where, "socket": socket}, separators=(",", ":"))
