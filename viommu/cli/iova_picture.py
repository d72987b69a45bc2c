"""A picture of one IOVA space for the terminal: what is mapped, exported, reserved, and faulted."""

from __future__ import annotations

import enum
import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["FaultMark", "Piece", "PieceKind", "Segment", "about", "draw", "segments"]


class PieceKind(enum.IntEnum):
    """What an address can be; where pieces overlap, the higher one shows."""

    FREE = 0
    RESERVED = 1
    MAPPED = 2
    EXPORTED = 3


class Piece(NamedTuple):
    """``[start, end)`` and what there is to say about it."""

    start: int
    end: int
    kind: PieceKind
    note: str


class FaultMark(NamedTuple):
    """A blocked access at ``address``."""

    address: int
    note: str


class Segment(NamedTuple):
    """One box of the picture; the boxes cover the whole space, in order."""

    start: int
    end: int
    kind: PieceKind
    note: str
    faults: tuple[FaultMark, ...]


class _Look(NamedTuple):
    fill: str
    ascii_fill: str
    style: str


_LOOKS: Final = {
    PieceKind.FREE: _Look(" ", " ", "dim"),
    PieceKind.RESERVED: _Look("▚", "x", "yellow"),
    PieceKind.MAPPED: _Look("█", "#", "green"),
    PieceKind.EXPORTED: _Look("▒", "%", "magenta"),
}
_BORDERS: Final = ("┌─┐", "├─┤", "└─┘")
_WALL: Final = "│"
_WIDTH: Final = 12


def about(size: int) -> str:
    """Write a size for the eye: ``4 KiB``, ``3.9 GiB``."""
    number, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    digits = f"{number:.1f}".removesuffix(".0")
    return f"{digits} {unit}"


def segments(pieces: Sequence[Piece], faults: Sequence[FaultMark], end: int) -> Iterator[Segment]:
    """Yield the boxes that cover ``[0, end)``; what lies beyond ``end`` is left out.

    Cost: pieces times boundaries, meant for the few dozen that fit on a screen.
    """
    bounds = {0, end}
    for piece in pieces:
        bounds |= {piece.start, piece.end}
    edges = sorted(bound for bound in bounds if bound <= end)
    for low, high in itertools.pairwise(edges):
        over = [piece for piece in pieces if piece.start <= low and high <= piece.end]
        top = max(over, key=lambda piece: piece.kind, default=None)
        inside = sorted(fault for fault in faults if low <= fault.address < high)
        if top is None:
            kind, note = PieceKind.FREE, f"not mapped, {about(high - low)}"
        elif top.start == low:
            kind, note = top.kind, top.note
        else:
            kind, note = top.kind, "(the rest of it)"
        yield Segment(low, high, kind, note, tuple(inside))


def draw(boxes: Sequence[Segment], *, ascii_only: bool = False) -> Iterator[Text]:
    """Yield the lines of the picture, lowest address on top.

    Each box stands between its first address and the first one behind it.
    """
    top, between, bottom = ("+-+", "+-+", "+-+") if ascii_only else _BORDERS
    wall = "|" if ascii_only else _WALL
    digits = max((len(f"{box.end:x}") for box in boxes), default=1)
    margin = " " * (digits + 4)
    for index, box in enumerate(boxes):
        yield _edge(box.start, digits, between if index else top)
        look = _LOOKS[box.kind]
        fill = (look.ascii_fill if ascii_only else look.fill) * _WIDTH
        for fault in box.faults:
            yield Text.assemble(
                margin, wall, (fill, look.style), wall, " ",
                (f"{'!' if ascii_only else '✘'} {fault.address:#x} {fault.note}", "bold red"),
            )  # fmt: skip
        yield Text.assemble(margin, wall, (fill, look.style), wall, " ", (box.note, look.style))
    if boxes:
        yield _edge(boxes[-1].end, digits, bottom)


def _edge(address: int, digits: int, border: str) -> Text:
    return Text(f" {address:#0{digits + 2}x} {border[0]}{border[1] * _WIDTH}{border[2]}")
