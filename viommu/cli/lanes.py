"""Who was busy when: one bar an actor, on a common axis of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Lane", "lanes"]

_MARGIN: Final = 1
_ENDS: Final = 12  # columns that the two times below the axis need at least


class Lane(NamedTuple):
    """``name`` was busy from ``start`` to ``end`` (seconds); ``note`` says with what."""

    name: str
    style: str
    start: float
    end: float
    note: str


def lanes(items: Sequence[Lane], width: int, *, ascii_only: bool = False) -> Iterator[Text]:
    """Yield one line a lane and an axis in milliseconds, at most ``width`` columns wide.

    What begins or ends is at its place on the axis to the nearest column; the
    shortest bar has one. Where there is no room for bars nothing is yielded.
    """
    names = max((len(item.name) for item in items), default=0)
    notes = max((len(item.note) for item in items), default=0)
    columns = width - names - notes - 3 * _MARGIN
    if not items or columns < _ENDS:
        return
    start = min(item.start for item in items)
    span = max(item.end for item in items) - start or 1e-9
    bar, axis = ("#", "-") if ascii_only else ("█", "─")
    pad = " " * _MARGIN
    for item in items:
        left = min(round((item.start - start) / span * columns), columns - 1)
        right = max(round((item.end - start) / span * columns), left + 1)
        yield Text.assemble(
            pad,
            (item.name.ljust(names), item.style),
            pad + " " * left,
            (bar * (right - left), item.style),
            " " * (columns - right) + pad,
            item.note,
        )
    yield Text(f"{pad}{' ' * names}{pad}{axis * columns}", style="dim")
    last = f"{span * 1e3:.0f} ms"
    yield Text(f"{pad}{' ' * names}{pad}0{last:>{columns - 1}}", style="dim")
