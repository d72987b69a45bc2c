"""PCI functions and their IOMMU groups, as the guest's kernel shows them.

A function is named as on the host's command line, ``00:06.0``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "bind",
    "driver",
    "group",
    "group_members",
    "group_type",
    "reserved_regions",
    "reset",
    "unbind",
]

_DEVICES = Path("/sys/bus/pci/devices")


def path(bdf: str) -> Path:
    """Return the directory of the function in sysfs."""
    return _DEVICES / f"0000:{bdf}"


def driver(bdf: str) -> str | None:
    """Return the name of the driver that has the function, or nothing."""
    link = path(bdf) / "driver"
    return link.readlink().name if link.exists() else None


def unbind(bdf: str) -> None:
    """Take the function from its driver, if it has one."""
    if driver(bdf) is not None:
        (path(bdf) / "driver/unbind").write_text(f"0000:{bdf}")


def bind(bdf: str, name: str) -> None:
    """Give the function to the driver ``name``, whichever has it now.

    Raises:
        OSError: The driver doesn't take it.
    """
    if driver(bdf) == name:
        return
    unbind(bdf)
    override = path(bdf) / "driver_override"
    override.write_text(f"{name}\n")
    try:
        Path(f"/sys/bus/pci/drivers/{name}/bind").write_text(f"0000:{bdf}")
    finally:
        override.write_text("\n")


def reset(bdf: str) -> None:
    """Reset the function."""
    (path(bdf) / "reset").write_text("1\n")


def group(bdf: str) -> int:
    """Return the number of the function's IOMMU group."""
    return int((path(bdf) / "iommu_group").readlink().name)


def group_type(bdf: str) -> str:
    """Return the kind of the group's default domain: ``DMA``, ``DMA-FQ``, ``identity``."""
    return (path(bdf) / "iommu_group/type").read_text().strip()


def group_members(bdf: str) -> list[str]:
    """Return the functions in the function's IOMMU group, itself included."""
    members = (path(bdf) / "iommu_group/devices").iterdir()
    return sorted(member.name.removeprefix("0000:") for member in members)


def reserved_regions(bdf: str) -> list[tuple[int, int, str]]:
    """Return what the group can't map: first and last address, and the kind."""
    lines = (path(bdf) / "iommu_group/reserved_regions").read_text().splitlines()
    fields = (line.split() for line in lines)
    return [(int(start, 16), int(end, 16), kind) for start, end, kind in fields]
