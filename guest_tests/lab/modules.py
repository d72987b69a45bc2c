"""Kernel modules: which ones a driver needs, in which order.

Debian makes ``modules.dep`` on the installed system, so it isn't in the package: the
dependencies are read from the modules themselves.
"""

from __future__ import annotations

import lzma
import re
from typing import TYPE_CHECKING, NamedTuple

from guest_tests.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Module", "load_order"]

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class Module(NamedTuple):
    """A kernel module, uncompressed."""

    name: str
    data: bytes


def load_order(directory: Path, wanted: Iterable[str]) -> list[Module]:
    """Return ``wanted`` and all they depend on; each comes after what it needs.

    ``directory`` is ``/lib/modules/RELEASE`` of the kernel. What is built in is left out.

    Raises:
        LabError: The kernel has no such module.
    """
    files = {_name(path.name): path for path in directory.glob("kernel/**/*.ko*")}
    built_in = {_name(line) for line in (directory / "modules.builtin").read_text().split()}
    order: dict[str, Module] = {}

    def visit(name: str) -> None:
        if name in order or name in built_in:
            return
        if name not in files:
            raise LabError(f"kernel {directory.name} has no module {name}")
        data = _uncompressed(files[name])
        found = _DEPENDS.search(data)
        for dependency in found[1].decode().split(",") if found and found[1] else ():
            visit(_canonical(dependency))
        order[name] = Module(name, data)

    for name in wanted:
        visit(_canonical(name))
    return list(order.values())


def _uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise LabError(f"kernel module {path.name}: compression {path.suffix} is not supported")
    return data


def _name(file: str) -> str:
    return _canonical(file.rsplit("/", 1)[-1].split(".ko", 1)[0])


def _canonical(name: str) -> str:
    return name.replace("-", "_")
