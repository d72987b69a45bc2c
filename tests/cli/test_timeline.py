from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from viommu.cli.timeline import Actor, ClaimError, Mark, Timeline

GUEST = Actor("guest", "cyan")
WORDS = "what happened is explained in more words than fit into one line of a terminal " * 2


class Clock:
    """Each look at it is half a second later."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


class Screen:
    """A timeline on a terminal of ``width`` columns, and what is on it."""

    def __init__(self, width: int = 80, encoding: str = "utf-8", **options: bool) -> None:
        self.raw = io.BytesIO()
        file = io.TextIOWrapper(self.raw, encoding=encoding, write_through=True)
        self.console = Console(file=file, width=width, highlight=False, **options)  # type: ignore[arg-type]  # bools only
        self.timeline = Timeline(self.console, Clock())

    @property
    def lines(self) -> list[str]:
        return self.raw.getvalue().decode().splitlines()


def test_a_step_is_a_line_with_time_actor_what_and_result() -> None:
    screen = Screen(width=100)
    with screen.timeline.step(GUEST, "ATTACH 00:06.0") as step:
        step.done("OK")

    (line,) = screen.lines
    assert line.split() == ["500.0", "ms", "guest", "ATTACH", "00:06.0", "✔", "OK"]


def test_the_result_goes_below_where_there_is_less_room() -> None:
    screen = Screen(width=80)
    with screen.timeline.step(GUEST, "ATTACH 00:06.0") as step:
        step.done("OK")

    first, second = screen.lines
    assert first.split() == ["500.0", "ms", "guest", "ATTACH", "00:06.0"]
    assert second.index("✔ OK") == first.index("ATTACH")


def test_a_step_that_raises_is_shown_as_failed() -> None:
    screen = Screen()
    with pytest.raises(ZeroDivisionError), screen.timeline.step(GUEST, "divide"):
        raise ZeroDivisionError("0")

    assert "✘ ZeroDivisionError: 0" in screen.lines[1]


def test_chapters_are_numbered_and_explained() -> None:
    screen = Screen(width=40)
    screen.timeline.chapter("First", WORDS)
    screen.timeline.chapter("Second", "")

    assert screen.lines[1].startswith("── 1. First ──")
    assert len(screen.lines[1]) == 40
    assert any(line.startswith("── 2. Second ─") for line in screen.lines)
    assert " ".join(" ".join(screen.lines[2:7]).split()) in " ".join(WORDS.split())


@pytest.mark.parametrize("width", [40, 80, 95, 96, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_is_wider_than_the_terminal_or_lost(width: int, encoding: str) -> None:
    screen = Screen(width, encoding)
    timeline = screen.timeline
    timeline.chapter("Title", WORDS)
    for mark in Mark:
        timeline.row(1.0, GUEST, WORDS, WORDS, mark)

    assert all(cell_len(line) <= min(width, 120) for line in screen.lines)
    words = " ".join(screen.lines).split()
    assert words.count("terminal") == 2 * (1 + 2 * len(Mark))


@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "…"), ("ascii", "x")])
def test_lines_are_cut_at_the_edge(encoding: str, end: str) -> None:
    screen = Screen(20, encoding)
    screen.timeline.picture("Title", [Text("x" * 30), Text("y")])

    assert screen.lines == ["", "  Title", "  " + "x" * 17 + end, "  y"]


def test_a_step_keeps_its_distance_from_a_picture() -> None:
    screen = Screen()
    screen.timeline.picture("Title", [Text("picture")])
    screen.timeline.row(0.0, GUEST, "a", "b")
    screen.timeline.row(0.0, GUEST, "c", "d")

    assert [not line.strip() for line in screen.lines] == [True, False, False, True] + [False] * 4


def test_color_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    colored = Screen(force_terminal=True)
    colored.timeline.row(0.0, GUEST, "a", "b")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Screen(force_terminal=True)
    plain.timeline.row(0.0, GUEST, "a", "b")

    assert "\x1b[36mguest" in colored.lines[0]
    assert "36m" not in plain.lines[0]


def test_claims_are_counted_and_a_false_one_raises() -> None:
    timeline = Screen().timeline
    timeline.claim(True, "fine")

    with pytest.raises(ClaimError, match="the sky is green"):
        timeline.claim(False, "the sky is green")

    assert timeline.claims == 1
