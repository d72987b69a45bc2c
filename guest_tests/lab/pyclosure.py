"""Find and compile what Python modules need; runs on the guest's Python, not on the host's.

Usage: ``python3.13 pyclosure.py SOURCES OUTPUT MODULE...``: import each ``MODULE`` from
``SOURCES`` and write the bytecode of everything that was loaded below ``OUTPUT``, at the paths
where the guest will look, so that a guest under emulation compiles nothing. Standard library
modules come without their source; shared objects are listed on standard output.
"""

from __future__ import annotations

import importlib
import importlib.util
import os.path
import py_compile
import sys
import sysconfig

__all__ = ["main"]

_ALWAYS = ("os", "encodings.ascii", "encodings.latin_1", "traceback", "linecache", "tokenize")


def main() -> None:
    """Do it, with the arguments of the command line."""
    sources, output, *names = sys.argv[1:]
    before = {"py_compile", "sysconfig", __name__} & set(sys.modules)
    standard = sysconfig.get_path("stdlib")
    sys.path.insert(0, sources)
    for name in (*_ALWAYS, *names):
        importlib.import_module(name)
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name in before:
            continue
        if not file.endswith(".py"):
            print(file)
        elif file.startswith(standard):
            _compile(file, output, "usr/lib/python3.13/" + os.path.relpath(file, standard), "c")
        elif file.startswith(sources):
            _compile(file, output, os.path.relpath(file, sources), "")


def _compile(source: str, output: str, place: str, suffix: str) -> None:
    """Compile ``source``, which in the guest is at ``place``; no suffix: beside its source."""
    bytecode = place + suffix if suffix else importlib.util.cache_from_source(place)
    py_compile.compile(
        source,
        f"{output}/{bytecode}",
        dfile="/" + place,
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


if __name__ == "__main__":
    main()
