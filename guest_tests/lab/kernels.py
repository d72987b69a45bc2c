"""Kernels that the lab can boot: Debian's own, or one built here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from guest_tests.lab import bundles
from guest_tests.lab.errors import LabError
from guest_tests.lab.manifest import KERNEL_L1, KERNELS

if TYPE_CHECKING:
    from pathlib import Path

    from guest_tests.lab.manifest import Bundle

__all__ = ["Kernel", "debian_kernel", "debian_l1_kernel"]


class Kernel(NamedTuple):
    """A kernel image and its modules (``None``: all that is needed is built in).

    ``release`` is its version as ``uname -r`` says it, ``key`` names its exact contents.
    """

    name: str
    release: str
    image: Path
    modules: Path | None
    key: str

    def release_at_least(self, major: int, minor: int) -> bool:
        """Whether it is of that series or a newer one."""
        found = re.match(r"(\d+)\.(\d+)", self.release)
        return found is not None and (int(found[1]), int(found[2])) >= (major, minor)


def debian_kernel(name: str) -> Kernel:
    """Return Debian's kernel ``name`` (a key of ``KERNELS``), fetched when the cache lacks it."""
    if name not in KERNELS:
        raise LabError(f"there is no kernel {name}: choose one of {', '.join(KERNELS)}")
    return _unpacked(name, KERNELS[name])


def debian_l1_kernel() -> Kernel:
    """Return Debian's kernel for a machine that is a host itself: it has 9p, and VFIO."""
    return _unpacked("6.12-l1", KERNEL_L1)


def _unpacked(name: str, bundle: Bundle) -> Kernel:
    tree = bundles.fetch([bundle])[bundle.name]
    modules = next(tree.glob("usr/lib/modules/*"))
    images = [*tree.glob("boot/vmlinuz-*"), modules / "vmlinuz"]
    return Kernel(name, modules.name, images[0], modules, bundles.bundle_key(tree))
