"""The console that tables and pictures are printed on."""

from __future__ import annotations

import os
from typing import Final

from rich.console import Console

__all__ = ["make_console"]

_PLAIN_WIDTH: Final = 100


def make_console() -> Console:
    """Return a console for stdout: colored on a terminal unless ``NO_COLOR`` is set.

    Where stdout is no terminal, lines have up to 100 columns, or ``COLUMNS``.
    """
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console
