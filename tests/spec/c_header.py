"""Ask a C compiler what kernel headers say, so that spec/ can be held against them.

The headers are the host's, or, where a function is given one, those in ``directory``
and the host's for what isn't there.

Every function answers ``None`` on a host without a compiler, or whose header is
missing or too old: the table of offsets in each test still holds there.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["c_constants", "c_layout"]

# Added to each value, so that none is zero and becomes a directive other than .quad.
_BIAS = 0x5A << 48


def c_layout(
    header: str, ctype: str, fields: list[str], directory: Path | None = None
) -> dict[str, tuple[int, int]] | None:
    """Return offset and size of each field of ``ctype`` in bytes.

    ``header`` is what follows ``#include``, without brackets; ``ctype`` is e.g.
    ``struct vring_desc``; a field may be a path (``head.type``).
    The size of the whole is ``c_constants(header, ["sizeof(struct vring_desc)"])``.

    Raises:
        AssertionError: The header knows the type but not one of the fields.
    """
    if _evaluate(header, (f"sizeof({ctype})",), directory) is None:
        return None
    wanted: list[str] = []
    for field in fields:
        wanted += [f"offsetof({ctype}, {field})", f"sizeof((({ctype} *)0)->{field})"]
    values = _evaluate(header, tuple(wanted), directory)
    assert values is not None, f"<{header}> does not know all of {fields} in {ctype}"
    return dict(zip(fields, zip(values[::2], values[1::2], strict=True), strict=True))


def c_constants(
    header: str, names: list[str], directory: Path | None = None
) -> dict[str, int] | None:
    """Return the values of integer constant expressions: macros, enumerators, sizes.

    Raises:
        AssertionError: The header exists but does not know one of the names.
    """
    if _evaluate(header, ("1",), directory) is None:
        return None
    values = _evaluate(header, tuple(names), directory)
    assert values is not None, f"<{header}> does not know all of {names}"
    return dict(zip(names, values, strict=True))


@functools.cache
def _evaluate(
    header: str, expressions: tuple[str, ...], directory: Path | None
) -> tuple[int, ...] | None:
    """Return integer constant expressions; ``None`` when they do not compile.

    Nothing is linked or run: the values are read from the assembly of an array.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    values = ", ".join(f"(long long)({e}) + {_BIAS}LL" for e in expressions)
    source = f"#include <stddef.h>\n#include <{header}>\nlong long values[] = {{ {values} }};\n"
    include = [] if directory is None else [f"-I{directory}"]
    done = subprocess.run(
        [compiler, *include, "-x", "c", "-S", "-O0", "-o", "-", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode != 0:
        return None
    words = re.findall(r"^\s*\.(?:quad|xword|8byte)\s+(\d+)", done.stdout, re.MULTILINE)
    assert len(words) == len(expressions), f"{compiler}: {len(expressions)} values, got {words}"
    return tuple(int(word) - _BIAS for word in words)
