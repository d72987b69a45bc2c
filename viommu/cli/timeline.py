"""A timeline for the terminal: who did what when, and what came of it, in chapters."""

from __future__ import annotations

import contextlib
import enum
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from viommu.cli.lanes import lanes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console, OverflowMethod

    from viommu.cli.lanes import Lane

__all__ = ["Actor", "ClaimError", "Mark", "Step", "Timeline"]

_NARROW: Final = 96  # columns; below, the result goes below what was done
_WIDEST: Final = 120
_INDENT: Final = 2
_TIME: Final = 10
_WHO: Final = 7


class Actor(NamedTuple):
    """Somebody who acts, and the style of the name."""

    name: str
    style: str


class Mark(enum.Enum):
    """How a step turned out: its sign, its sign in ASCII, its style."""

    OK = ("✔", "+", "green")
    BLOCKED = ("⊘", "x", "yellow")
    WAITED = ("⧗", "~", "cyan")
    FAILED = ("✘", "!", "bold red")
    NOTE = ("·", ".", "dim")


class ClaimError(Exception):
    """Something that was claimed did not happen."""


class Step:
    """A step that is under way; say how it turned out before its block ends."""

    def __init__(self) -> None:
        self.result = ""
        self.mark = Mark.OK

    def done(self, result: str, mark: Mark = Mark.OK) -> None:
        """Set what the right column says."""
        self.result = result
        self.mark = mark


class Timeline:
    """Prints steps as they end; times are milliseconds since it was made.

    ``clock`` returns seconds; ``claims`` counts what was verified; ``ascii_only``
    is whether the terminal takes no other characters.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.claims = 0
        self._console = console
        self._clock = clock
        self._start = clock()
        self._chapters = 0
        self._gap = False  # an empty line is due before the next step
        self.ascii_only = console.options.ascii_only
        self._overflow: OverflowMethod = "crop" if self.ascii_only else "ellipsis"

    @property
    def width(self) -> int:
        """The columns that lines fill at most."""
        return min(self._console.width, _WIDEST)

    def now(self) -> float:
        """Return the seconds since the start."""
        return self.at(self._clock())

    def at(self, moment: float) -> float:
        """Return the seconds from the start to ``moment``, a time of the same clock."""
        return moment - self._start

    def chapter(self, title: str, text: str) -> None:
        """Start a chapter with a paragraph that says what to look for."""
        self._chapters += 1
        self._gap = False
        dash = "-" if self.ascii_only else "─"
        head = f"{dash * 2} {self._chapters}. {title} "
        self._console.print()
        self._console.print(Text(head + dash * max(0, self.width - len(head)), style="bold"))
        self._console.print(
            Padding(Text(text, style="dim"), (0, 0, 1, _INDENT), expand=False), width=self.width
        )

    @contextlib.contextmanager
    def step(self, actor: Actor, what: str) -> Iterator[Step]:
        """Time a step and print it when the block ends, well or not."""
        begin = self.now()
        step = Step()
        try:
            yield step
        except BaseException as error:
            step.done(f"{type(error).__name__}: {error}", Mark.FAILED)
            raise
        finally:
            self.row(begin, actor, what, step.result, step.mark)

    def row(self, at: float, actor: Actor, what: str, result: str, mark: Mark = Mark.OK) -> None:
        """Print a step that began ``at`` seconds after the start."""
        if self._gap:
            self._console.print()
            self._gap = False
        sign, plain, style = mark.value
        outcome = Text(f"{plain if self.ascii_only else sign} {result}", style=style)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=_TIME, justify="right")
        grid.add_column(width=_WHO)
        cells = [Text(f"{at * 1e3:.1f} ms", style="dim"), Text(actor.name, style=actor.style)]
        left = self.width - _INDENT - _TIME - _WHO - 3 * 2
        if self.width < _NARROW:
            grid.add_column(width=max(left + 2, 1), overflow="fold")
            grid.add_row(*cells, Group(Text(what), outcome))
        else:
            grid.add_column(width=left // 2, overflow="fold")
            grid.add_column(width=left - left // 2, overflow="fold")
            grid.add_row(*cells, Text(what), outcome)
        self._console.print(Padding(grid, (0, 0, 0, _INDENT), expand=False), width=self.width)

    def picture(self, title: str, lines: Iterable[Text]) -> None:
        """Print a picture below a title; a line too long for the terminal is cut."""
        self._console.print()
        self._console.print(Padding(Text(title, style="bold"), (0, 0, 0, _INDENT), expand=False))
        for line in lines:
            line.truncate(self._console.width - _INDENT, overflow=self._overflow)
            self._console.print(Padding(line, (0, 0, 0, _INDENT), expand=False), no_wrap=True)
        self._gap = True

    def lanes(self, title: str, items: Sequence[Lane]) -> None:
        """Print who was busy when, where there is room for it."""
        lines = list(lanes(items, self.width - _INDENT, ascii_only=self.ascii_only))
        if lines:
            self.picture(title, lines)

    def claim(self, holds: bool, text: str) -> None:  # noqa: FBT001  # reads as a sentence
        """Count a verified claim.

        Raises:
            ClaimError: It does not hold.
        """
        if not holds:
            raise ClaimError(text)
        self.claims += 1
