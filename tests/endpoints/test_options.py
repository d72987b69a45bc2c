"""The options that kinds of endpoints have in common."""

from __future__ import annotations

from typing import Any

import pytest

from viommu.endpoints.options import HOLD_OPTIONS, PROCESS_OPTIONS, Running
from viommu.errors import UsageError
from viommu.ipc.hold import HoldPolicy, Measure

OPTIONS = {**PROCESS_OPTIONS, **HOLD_OPTIONS}


def read(**values: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return {name: OPTIONS[name].parse(value) for name, value in named.items()}


@pytest.mark.parametrize(
    ("options", "own", "limit", "measure"),
    [
        ({}, False, 8.0, Measure.WAIT),
        ({"hold_limit": "20", "hold_policy": "kill"}, False, 20.0, Measure.KILL),
        ({"process": "own"}, True, 8.0, Measure.KILL),
        ({"process": "own", "hold_limit": "0.5"}, True, 0.5, Measure.KILL),
        ({"hold_policy": "wait", "process": "own"}, True, 8.0, Measure.WAIT),
    ],
)
def test_where_an_endpoint_runs(
    options: dict[str, str], own: bool, limit: float, measure: Measure
) -> None:
    assert Running.read(read(**options)) == Running(own, HoldPolicy(limit, measure))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("process", "other", "expected own"),
        ("hold_limit", "0", "expected seconds, more than 0 and up to 3600"),
        ("hold_limit", "-1", "expected seconds"),
        ("hold_limit", "nan", "expected seconds"),
        ("hold_limit", "1e9", "expected seconds"),
        ("hold_limit", "soon", "expected seconds"),
        ("hold_policy", "ask", "expected wait or kill"),
    ],
)
def test_mistakes_are_explained(name: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(**{name: value})


def test_every_option_has_help() -> None:
    assert all(option.help for option in OPTIONS.values())
