"""Build kernels from Debian's sources, with just what the guest tests need.

Debian's own Linux 6.1 lacks the virtio-iommu driver, its 7.2 lacks iommufd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from guest_tests.lab import bundles
from guest_tests.lab.cache import cache_directory, content_key, locked, staged
from guest_tests.lab.errors import LabError
from guest_tests.lab.kernels import Kernel
from guest_tests.lab.leash import leashed
from guest_tests.lab.manifest import SOURCE_6_1, SOURCE_7_2

if TYPE_CHECKING:
    from guest_tests.lab.manifest import Bundle

__all__ = ["BUILT_KERNEL", "L1_KERNEL", "RECIPES", "Recipe", "build_kernel"]

BUILT_KERNEL = "6.1"
L1_KERNEL = "7.2-l1"


class Recipe(NamedTuple):
    """A kernel to build: ``fragment`` is what it is configured with on top of tinyconfig."""

    name: str
    source: Bundle
    fragment: Path


_HERE = Path(__file__).parent
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(BUILT_KERNEL, SOURCE_6_1, _HERE / "fragment-6.1.config"),
        Recipe(L1_KERNEL, SOURCE_7_2, _HERE / "fragment-l1.config"),
    )
}

_IMAGE = "arch/x86/boot/bzImage"
_RELEASE = "include/config/kernel.release"
_SECONDS = 3600
# A program or header that the build needs, and the Debian package that has it.
_TOOLS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc"}
_HEADERS = {"libelf.h": "libelf-dev", "openssl/ssl.h": "libssl-dev"}


def build_kernel(name: str = BUILT_KERNEL) -> Kernel:
    """Return the kernel ``name`` of ``RECIPES``, built when the cache has none of this content.

    It takes some minutes and about 2 GB in the cache's file system while it runs.

    Raises:
        LabError: A tool is missing, or the build failed.
    """
    recipe = RECIPES[name]
    source = bundles.fetch([recipe.source])[recipe.source.name]
    key = content_key(bundles.packages_key(source), recipe.fragment.read_text())
    home = cache_directory() / "kernels"
    target = home / key
    if not target.exists():  # else no need to wait for one that is being built
        with locked(home):
            if not target.exists():
                _require_tools(recipe)
                with staged(target) as stage:
                    _build(recipe, next(source.glob("usr/src/*.tar.xz")), stage)
    release = (target / "release").read_text().strip()
    return Kernel(name, release, target / "bzImage", None, key)


def _require_tools(recipe: Recipe) -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if "gcc" not in missing:
        missing += [package for header, package in _HEADERS.items() if not _compiles(header)]
    if missing:
        raise LabError(
            f"building Linux {recipe.name} needs what is missing here: "
            f"install it with apt-get install {' '.join(missing)}"
        )


def _compiles(header: str) -> bool:
    program = f"#include <{header}>\n"
    command = ["gcc", "-fsyntax-only", "-x", "c", "-"]
    return (
        subprocess.run(command, input=program.encode(), capture_output=True, check=False).returncode
        == 0
    )


def _build(recipe: Recipe, source: Path, stage: Path) -> None:
    fragment = recipe.fragment.read_text()
    tree = stage / "tree"
    tree.mkdir()
    log = stage / "build.log"
    _run(["tar", "-xf", str(source), "--strip-components=1"], tree, log)
    _run(["make", "tinyconfig"], tree, log)
    with (tree / ".config").open("a") as configuration:
        configuration.write(fragment)  # the last word on an option counts
    _run(["make", "olddefconfig"], tree, log)
    _check_options(recipe, (tree / ".config").read_text().splitlines())
    _run(["make", f"-j{os.cpu_count()}", "bzImage"], tree, log)
    shutil.copyfile(tree / _IMAGE, stage / "bzImage")
    shutil.copyfile(tree / _RELEASE, stage / "release")
    shutil.copyfile(tree / ".config", stage / "config")
    shutil.rmtree(tree)


def _check_options(recipe: Recipe, configuration: list[str]) -> None:
    fragment = recipe.fragment.read_text().splitlines()
    wanted = (line for line in fragment if line.startswith("CONFIG_"))
    dropped = set(wanted) - set(configuration)
    if dropped:
        raise LabError(f"Linux {recipe.name} does not take {', '.join(sorted(dropped))}")


def _run(command: list[str], tree: Path, log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(
            leashed(command),
            cwd=tree,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=_SECONDS,
            check=False,
        )
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise LabError(f"{' '.join(command)} ended with {done.returncode}:\n{end}")
