from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.cli.lanes import Lane, lanes

EDU = Lane("edu", "magenta", 10.0, 10.4, "holds the page")
GUEST = Lane("guest", "cyan", 10.1, 10.4, "waits")
DISK = Lane("disk", "blue", 10.1, 10.2, "reads")


def drawn(*items: Lane, width: int = 50, ascii_only: bool = False) -> list[str]:
    return [line.plain for line in lanes(items, width, ascii_only=ascii_only)]


def test_bars_begin_and_end_at_their_place() -> None:
    assert drawn(EDU, GUEST, DISK) == [
        " edu   ████████████████████████████ holds the page",
        " guest        █████████████████████ waits",
        " disk         ███████               reads",
        "       ────────────────────────────",
        "       0                     400 ms",
    ]


def test_ascii() -> None:
    assert all(line.isascii() for line in drawn(EDU, GUEST, DISK, ascii_only=True))


def test_an_instant_has_one_column() -> None:
    lines = drawn(EDU, Lane("edu", "", 10.4, 10.4, "x"))

    assert lines[1].count("█") == 1


def test_nothing_took_any_time() -> None:
    assert len(drawn(Lane("a", "", 1.0, 1.0, "x"))) == 3


@pytest.mark.parametrize("items", [(), (EDU,)])
def test_no_room_or_nothing_to_show(items: tuple[Lane, ...]) -> None:
    assert drawn(*items, width=30) == []


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 10)).map(
            lambda t: Lane("name", "", min(t), max(t), "a note")
        ),
        min_size=1,
    ),
    st.integers(0, 120),
)
def test_never_too_wide(items: list[Lane], width: int) -> None:
    assert all(len(line) <= width for line in drawn(*items, width=width))
