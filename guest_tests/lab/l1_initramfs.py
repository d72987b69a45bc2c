"""What an L1 machine starts from: a shell and modules, until it has the host's root file system."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.lab import cpio
from guest_tests.lab.bundles import bundle_key
from guest_tests.lab.cache import cache_directory, content_key, locked, staged
from guest_tests.lab.modules import load_order

if TYPE_CHECKING:
    from guest_tests.lab.kernels import Kernel
    from guest_tests.lab.userland import Userland

__all__ = ["build_l1"]

_MODULES = ("9p", "9pnet_virtio", "overlay", "vfio_pci", "vfio_iommu_type1")
_INIT = Path(__file__).parents[1] / "l1/init"
_RECIPE = (Path(__file__), Path(cpio.__file__), _INIT)
_MOUNT_POINTS = ("dev", "host", "layer", "root")


def build_l1(kernel: Kernel, userland: Userland) -> Path:
    """Return the archive for ``kernel``; built when the cache has none of the same content."""
    texts = [path.read_text() for path in _RECIPE]
    key = content_key(bundle_key(userland.tree), kernel.key, texts)
    home = cache_directory() / "initramfs"
    target = home / key
    with locked(home):
        if not target.exists():
            with staged(target) as stage:
                tree = stage / "tree"
                _fill(tree, kernel, userland)
                (stage / "initramfs.cpio").write_bytes(cpio.archive(tree))
                shutil.rmtree(tree)
    return target / "initramfs.cpio"


def _fill(tree: Path, kernel: Kernel, userland: Userland) -> None:
    for name in ("bin", "modules", *_MOUNT_POINTS):
        (tree / name).mkdir(parents=True)
    shutil.copy(userland.tree / "usr/bin/busybox", tree / "bin/busybox")
    shutil.copy(_INIT, tree / "init")
    (tree / "init").chmod(0o755)
    modules = load_order(kernel.modules, _MODULES) if kernel.modules else ()
    for number, module in enumerate(modules):
        (tree / f"modules/{number:02}-{module.name}.ko").write_bytes(module.data)
