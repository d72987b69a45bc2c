"""The base of every wire structure, typed so that a misspelt field is an error for mypy.

A plain ``ctypes.Structure`` gives every attribute the type ``Any``. Structures
here derive from :class:`Struct`, an ordinary class to a type checker, and
annotate their fields under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

__all__ = ["Struct", "Union", "sizeof"]

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, ClassVar, Self

    from _typeshed import ReadableBuffer, WriteableBuffer

    class Struct:
        """A little-endian structure with natural layout."""

        _fields_: ClassVar[Sequence[tuple[str, Any]]]
        _anonymous_: ClassVar[Sequence[str]]

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        @classmethod
        def from_buffer(cls, source: WriteableBuffer, offset: int = ...) -> Self:
            """Return a structure that shares ``source``."""

        @classmethod
        def from_buffer_copy(cls, source: ReadableBuffer, offset: int = ...) -> Self:
            """Return a structure holding a copy of the bytes at ``offset``."""

        def __bytes__(self) -> bytes: ...

    Union = Struct

    def sizeof(kind: type[Struct] | Struct) -> int:
        """Return the size of a structure in bytes."""
else:
    Struct = ctypes.LittleEndianStructure
    Union = ctypes.LittleEndianUnion
    sizeof = ctypes.sizeof
