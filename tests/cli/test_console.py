from __future__ import annotations

from typing import TYPE_CHECKING

from viommu.cli.console import make_console

if TYPE_CHECKING:
    import pytest


def test_width_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 100

    monkeypatch.setenv("COLUMNS", "77")
    assert make_console().width == 77


def test_a_terminal_has_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")

    console = make_console()

    assert console.is_terminal
    assert console.width != 100
