"""What pytest reports of a test here, wherever it ran."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

__all__ = ["refuse_skip"]


def refuse_skip(report: pytest.TestReport) -> None:
    """On CI, make a skipped test a failed one: what isn't tested there isn't tested at all."""
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI doesn't allow: {report.longrepr}"
