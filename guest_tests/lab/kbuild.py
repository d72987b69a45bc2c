"""Build Debian's Linux 6.1, whose own package lacks the virtio-iommu driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from guest_tests.lab import bundles
from guest_tests.lab.cache import cache_directory, content_key, locked, staged
from guest_tests.lab.errors import LabError
from guest_tests.lab.kernels import Kernel
from guest_tests.lab.manifest import SOURCE_6_1

__all__ = ["BUILT_KERNEL", "build_kernel"]

BUILT_KERNEL = "6.1"

_FRAGMENT = Path(__file__).with_name("fragment-6.1.config")
_IMAGE = "arch/x86/boot/bzImage"
_RELEASE = "include/config/kernel.release"
_SECONDS = 3600
# A program or header that the build needs, and the Debian package that has it.
_TOOLS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc"}
_HEADERS = {"libelf.h": "libelf-dev", "openssl/ssl.h": "libssl-dev"}


def build_kernel() -> Kernel:
    """Return the kernel, built when the cache has none of this source and configuration.

    It takes some minutes and about 2 GB in the cache's file system while it runs.

    Raises:
        LabError: A tool is missing, or the build failed.
    """
    source = bundles.fetch([SOURCE_6_1])[SOURCE_6_1.name]
    key = content_key(bundles.bundle_key(source), _FRAGMENT.read_text())
    home = cache_directory() / "kernels"
    home.mkdir(exist_ok=True)
    target = home / key
    with locked(home, "build"):
        if not target.exists():
            _require_tools()
            with staged(target) as stage:
                _build(next(source.glob("usr/src/*.tar.xz")), stage)
    release = (target / "release").read_text().strip()
    return Kernel(BUILT_KERNEL, release, target / "bzImage", None, key)


def _require_tools() -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if "gcc" not in missing:
        missing += [package for header, package in _HEADERS.items() if not _compiles(header)]
    if missing:
        raise LabError(
            f"building Linux {BUILT_KERNEL} needs what is missing here: "
            f"install it with apt-get install {' '.join(missing)}"
        )


def _compiles(header: str) -> bool:
    program = f"#include <{header}>\n"
    command = ["gcc", "-fsyntax-only", "-x", "c", "-"]
    return (
        subprocess.run(command, input=program.encode(), capture_output=True, check=False).returncode
        == 0
    )


def _build(source: Path, stage: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".kbuild.", dir=stage.parent) as scratch:
        tree = Path(scratch)
        log = stage / "build.log"
        _run(["tar", "-xf", str(source), "--strip-components=1"], tree, log)
        _run(["make", "tinyconfig"], tree, log)
        with (tree / ".config").open("a") as configuration:
            configuration.write(_FRAGMENT.read_text())  # the last word on an option counts
        _run(["make", "olddefconfig"], tree, log)
        _check_options((tree / ".config").read_text().splitlines())
        _run(["make", f"-j{os.cpu_count()}", "bzImage"], tree, log)
        shutil.copyfile(tree / _IMAGE, stage / "bzImage")
        shutil.copyfile(tree / _RELEASE, stage / "release")
        shutil.copyfile(tree / ".config", stage / "config")


def _check_options(configuration: list[str]) -> None:
    wanted = (line for line in _FRAGMENT.read_text().splitlines() if line.startswith("CONFIG_"))
    dropped = set(wanted) - set(configuration)
    if dropped:
        raise LabError(f"Linux {BUILT_KERNEL} does not take {', '.join(sorted(dropped))}")


def _run(command: list[str], tree: Path, log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(
            command,
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
