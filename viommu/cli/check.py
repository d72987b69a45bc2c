"""One answer of ``viommu doctor``."""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = ["Check", "Outcome"]


class Outcome(enum.StrEnum):
    """``missing`` is needed by demo, serve or run; ``absent`` is not."""

    OK = "ok"
    MISSING = "missing"
    ABSENT = "absent"


class Check(NamedTuple):
    """One answer: what was looked for, how it turned out, what was found, and what to do."""

    name: str
    outcome: Outcome
    found: str
    remedy: str = ""
