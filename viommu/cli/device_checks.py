"""Which of this host's devices can be endpoints, and what the others lack; nothing is changed.

Each backend gets one answer of its own: it needs a driver, a device file for
itself and one for each device or group.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.cli.check import Check, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["examine_devices"]

_ROOT: Final = Path("/")
_VFIO: Final = "vfio-pci"
# Drivers of bridges, and one that keeps a device idle, do no DMA into a group.
_HARMLESS: Final = frozenset({_VFIO, "pci-stub", "pcieport"})
_GIVE: Final = (
    "give vfio-pci one: echo vfio-pci > /sys/bus/pci/devices/ADDRESS/driver_override, unbind it "
    "from its driver, and echo ADDRESS > /sys/bus/pci/drivers_probe"
)
_SHOWN: Final = 8


class _Device(NamedTuple):
    """A PCI function that vfio-pci has."""

    address: str
    group: int | None
    file: Path | None  # of the device itself
    strangers: tuple[str, ...]  # of its group, which the host's own drivers have


def examine_devices(root: Path = _ROOT) -> list[Check]:
    """Answer every question about real devices; ``root`` is another file system, for tests."""
    devices = _devices(root)
    return [
        _iommu(root),
        _driver(root, "vfio_pci", root / "sys/bus/pci/drivers/vfio-pci"),
        _driver(root, "vfio_iommu_type1", root / "sys/module/vfio_iommu_type1"),
        _driver(root, "iommufd", root / "sys/class/misc/iommu"),
        _backend(
            "backend type1",
            root / "dev/vfio/vfio",
            devices,
            lambda device: _why_not_type1(root, device),
            "modprobe vfio_iommu_type1",
        ),
        _backend(
            "backend iommufd",
            root / "dev/iommu",
            devices,
            _why_not_iommufd,
            "modprobe iommufd, on a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
        ),
    ]


def _iommu(root: Path) -> Check:
    groups = root / "sys/kernel/iommu_groups"
    count = len(list(groups.iterdir())) if groups.is_dir() else 0
    if count:
        return Check("IOMMU", Outcome.OK, f"{count} groups of devices")
    return Check(
        "IOMMU",
        Outcome.ABSENT,
        "no device is behind one, so none can be an endpoint",
        "switch it on in the firmware, and boot with intel_iommu=on",
    )


def _driver(root: Path, name: str, sign: Path) -> Check:
    """A driver is there (``sign`` or its directory shows it), can be loaded, or can't."""
    label = f"driver {name}"
    listings = root / "lib/modules" / platform.release()
    present = sign.exists() or (root / "sys/module" / name).exists()
    if present or _lists(listings / "modules.builtin", name):
        return Check(label, Outcome.OK, "loaded")
    if _lists(listings / "modules.dep", name):
        return Check(label, Outcome.ABSENT, "not loaded", f"modprobe {name}")
    found = "not loaded, no such module installed"
    return Check(label, Outcome.ABSENT, found, "use a kernel that comes with it")


def _lists(listing: Path, module: str) -> bool:
    """Return whether a file of depmod's names ``module``; dash and underscore are the same."""
    names = (f"/{spelling}.ko" for spelling in (module, module.replace("_", "-")))
    try:
        text = listing.read_text(errors="replace")
    except OSError:  # containers have no modules directory
        return False
    return any(name in text for name in names)


def _devices(root: Path) -> list[_Device]:
    """Return every device that vfio-pci has."""
    found = []
    # Beside the devices there are the files of the driver itself.
    for link in sorted((root / f"sys/bus/pci/drivers/{_VFIO}").glob("*:*:*.*")):
        group = _name_of_link(link / "iommu_group")
        members = root / f"sys/kernel/iommu_groups/{group}/devices"
        strangers = [
            f"{member.name} ({driver})"
            for member in (sorted(members.iterdir()) if group and members.is_dir() else ())
            if (driver := _name_of_link(member / "driver")) and driver not in _HARMLESS
        ]
        # The entry is on every kernel; a number, and so a file, only with VFIO_DEVICE_CDEV.
        entry = next((link / "vfio-dev").glob("vfio*/dev"), None)
        file = entry and root / "dev/vfio/devices" / entry.parent.name
        found.append(_Device(link.name, int(group) if group else None, file, tuple(strangers)))
    return found


def _name_of_link(link: Path) -> str | None:
    try:
        return link.readlink().name
    except OSError:
        return None


def _backend(
    label: str,
    file: Path,
    devices: list[_Device],
    why_not: Callable[[_Device], str | None],
    remedy: str,
) -> Check:
    """Say which devices a backend can have, or why it can have none."""
    if not file.exists():
        return Check(label, Outcome.ABSENT, f"{file} is not there", remedy)
    if not _is_ours(file):
        return Check(label, Outcome.ABSENT, f"{file} is not for user {os.geteuid()}", _own(file))
    if not devices:
        return Check(label, Outcome.ABSENT, f"{_VFIO} has no device", _GIVE)
    reasons = {device.address: why_not(device) for device in devices}
    usable = [address for address, reason in reasons.items() if reason is None]
    if usable:
        more = f" and {len(usable) - _SHOWN} more" if len(usable) > _SHOWN else ""
        return Check(label, Outcome.OK, f"can have {', '.join(usable[:_SHOWN])}{more}")
    address, reason = next(iter(reasons.items()))
    return Check(
        label, Outcome.ABSENT, f"can't have {address}: {reason}", "free it, or give it to this user"
    )


def _why_not_type1(root: Path, device: _Device) -> str | None:
    if device.group is None:
        return "it is behind no IOMMU"
    if device.strangers:
        return f"its group is shared with {', '.join(device.strangers)}"
    file = root / f"dev/vfio/{device.group}"
    return None if _is_ours(file) else f"{file} is not for user {os.geteuid()}"


def _why_not_iommufd(device: _Device) -> str | None:
    if device.file is None:
        return "it has no file in /dev/vfio/devices"
    if device.strangers:
        return f"its group is shared with {', '.join(device.strangers)}"
    return None if _is_ours(device.file) else f"{device.file} is not for user {os.geteuid()}"


def _is_ours(file: Path) -> bool:
    return os.access(file, os.R_OK | os.W_OK)


def _own(file: Path) -> str:
    return f"give this user read and write access to {file}"
