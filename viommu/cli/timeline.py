"""A timeline for the terminal: who did what when, and what came of it, in chapters."""

from __future__ import annotations

import contextlib
import enum
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

__all__ = ["Actor", "ClaimError", "Mark", "Step", "Timeline"]

_NARROW: Final = 72  # columns; below, what and result go below each other
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

    ``clock`` returns seconds; ``claims`` counts what was verified.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.claims = 0
        self._console = console
        self._clock = clock
        self._start = clock()
        self._chapters = 0
        self._ascii = console.options.ascii_only

    @property
    def width(self) -> int:
        """The columns that lines fill at most."""
        return min(self._console.width, _WIDEST)

    def now(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._start

    def chapter(self, title: str, text: str) -> None:
        """Start a chapter with a paragraph that says what to look for."""
        self._chapters += 1
        dash = "-" if self._ascii else "─"
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
        sign, plain, style = mark.value
        when = Text(f"{at * 1e3:.1f} ms", style="dim")
        who = Text(actor.name, style=actor.style)
        outcome = Text(f"{plain if self._ascii else sign} {result}", style=style)
        if self.width < _NARROW:
            self._console.print(Text.assemble(" " * _INDENT, when, "  ", who))
            for text in (Text(what), outcome):
                self._console.print(
                    Padding(text, (0, 0, 0, 2 * _INDENT), expand=False), width=self.width
                )
            return
        left = self.width - _INDENT - _TIME - _WHO - 6
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=_TIME, justify="right")
        grid.add_column(width=_WHO)
        grid.add_column(width=left * 11 // 20)
        grid.add_column(width=left - left * 11 // 20)
        grid.add_row(when, who, Text(what), outcome)
        self._console.print(Padding(grid, (0, 0, 0, _INDENT), expand=False), width=self.width)

    def lines(self, title: str, lines: Iterator[Text]) -> None:
        """Print a picture below a title; a line too long for the terminal is cut."""
        self._console.print()
        self._console.print(Padding(Text(title, style="bold"), (0, 0, 0, _INDENT), expand=False))
        for line in lines:
            self._console.print(
                Padding(line, (0, 0, 0, _INDENT), expand=False),
                no_wrap=True,
                overflow="ellipsis",
                crop=True,
            )

    def claim(self, holds: bool, text: str) -> None:  # noqa: FBT001  # reads as a sentence
        """Count a verified claim.

        Raises:
            ClaimError: It does not hold.
        """
        if not holds:
            raise ClaimError(text)
        self.claims += 1
