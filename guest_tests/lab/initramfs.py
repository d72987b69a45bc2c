"""The guest's whole user space in one cpio archive, cached by its contents.

Busybox for the first process, Python with just the modules that the guest programs import,
e2fsprogs, the kernel's drivers, and the programs themselves.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.lab import cpio
from guest_tests.lab.bundles import bundle_key
from guest_tests.lab.cache import cache_directory, content_key, locked, staged
from guest_tests.lab.modules import load_order
from guest_tests.lab.userland import LIBRARIES

if TYPE_CHECKING:
    from guest_tests.lab.kernels import Kernel
    from guest_tests.lab.userland import Userland

__all__ = ["DRIVERS", "build"]

DRIVERS = ("virtio_iommu", "virtio_blk", "vfio_pci", "vfio_iommu_type1")

_BINARIES = ("usr/bin/python3.13", "usr/sbin/mke2fs", "usr/sbin/e2fsck")
_FILES = (*_BINARIES, "usr/bin/busybox", "etc/mke2fs.conf")
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": LIBRARIES}
_MOUNT_POINTS = ("mnt", "proc", "sys", "tmp")
_PACKAGE = "guest_tests/guest"
_SOURCES = Path(__file__).parents[2]
_CLOSURE = Path(__file__).with_name("pyclosure.py")
_RECIPE = (Path(__file__), _CLOSURE, Path(cpio.__file__))


def build(kernel: Kernel, userland: Userland) -> Path:
    """Return the archive for ``kernel``; built when the cache has none of the same content."""
    programs = [_SOURCES / _PACKAGE / "init", *sorted((_SOURCES / _PACKAGE).glob("*.py"))]
    texts = {str(path): path.read_text() for path in (*_RECIPE, *programs)}
    key = content_key(bundle_key(userland.tree), kernel.key, list(texts.values()))
    home = cache_directory() / "initramfs"
    target = home / key
    with locked(home):
        if not target.exists():
            with staged(target) as stage:
                tree = stage / "tree"
                tree.mkdir()
                _fill(tree, kernel, userland, programs)
                (stage / "initramfs.cpio").write_bytes(cpio.archive(tree))
                shutil.rmtree(tree)
    return target / "initramfs.cpio"


def _fill(tree: Path, kernel: Kernel, userland: Userland, programs: list[Path]) -> None:
    for name in (*_MOUNT_POINTS, *_LINKS.values(), "usr/lib/modules"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name, destination in _LINKS.items():
        (tree / name).symlink_to(destination)
    for number, module in enumerate(load_order(kernel.modules, DRIVERS) if kernel.modules else ()):
        (tree / f"usr/lib/modules/{number:02}-{module.name}.ko").write_bytes(module.data)
    shutil.copy(_SOURCES / _PACKAGE / "init", tree / "init")
    (tree / "init").chmod(0o755)
    for program in programs:
        target = tree / program.relative_to(_SOURCES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(program, target)
    shutil.copyfile(_SOURCES / "guest_tests/__init__.py", tree / "guest_tests/__init__.py")
    objects = _python_modules(tree, userland, [p.stem for p in programs if p.suffix == ".py"])
    for name in (*_FILES, *objects, *userland.libraries([*_BINARIES, *objects])):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(userland.tree / name, target)


def _python_modules(tree: Path, userland: Userland, names: list[str]) -> list[str]:
    """Put the bytecode of ``names`` and all they import into ``tree``; return shared objects."""
    package = _PACKAGE.replace("/", ".")
    modules = [f"{package}.{name}" for name in names if name != "__init__"]
    listing = userland.run("usr/bin/python3.13", str(_CLOSURE), str(tree), str(tree), *modules)
    return [str(Path(line).relative_to(userland.tree)) for line in listing.splitlines()]
