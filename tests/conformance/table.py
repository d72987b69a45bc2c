"""Writes docs/conformance.md from what a run of this suite saw.

``python -m tests.conformance.table`` runs the suite and writes the file; a test
fails when the committed one differs from what the run would write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conformance.conftest import JUDGES_THE_RECORD, RECORD
from tests.conformance.peers import PEERS
from tests.conformance.record import Outcome, Record
from tests.conformance.rows import ROWS, Kind

__all__ = ["PATH", "main", "render"]

PATH = Path(__file__).parents[2] / "docs" / "conformance.md"

_INTRODUCTION = """\
# Conformance

<!-- Written by `python -m tests.conformance.table` from a run of tests/conformance. -->

What virtio 1.2 says about a virtio-iommu device (section 5.13), statement by
statement, what this device does, and what its tests saw. The statements are
given in our own words; the standard is the authority.

A **check** can accept and reject: in one and the same run its tests must see
both, or the suite fails. A **statement** cannot be broken by a driver: its tests
must see it hold. Each row has tests named after it (`test_AT1_…` for AT1).
Requests are sent by one function, which asserts after each the used length, the
padding of the status, the device's invariants, and, when the request was not
successful, that nothing has changed.
"""

_PEERS = """\
## Other implementations

Read in their sources, not run: QEMU 9.2 development (2024-11), crosvm f1e797a
(2026-08-21) and Cloud Hypervisor ae44c29 (2026-08-22). "yes" means that the
row's statement is followed; other versions may differ.
"""


def render(record: Record) -> str:
    """Return the page for what ``record`` saw."""
    checks = sum(row.kind is Kind.CHECK for row in ROWS.values())
    tests = sum(len(names) for names in record.tests.values())
    lines = [
        _INTRODUCTION,
        f"{len(ROWS)} rows, {checks} of them checks; {tests} tests.",
        "",
        "| row | section | the device | here | kind | seen | tests |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        seen = record.outcomes[row.id]
        if row.kind is Kind.STATEMENT and seen:
            seen = {Outcome.OBSERVED}
        outcomes = ", ".join(outcome.value for outcome in Outcome if outcome in seen) or "nothing"
        count = len(record.tests[row.id])
        lines.append(
            f"| {row.id} | {row.section} | {row.clause} | {row.expected} | {row.kind.value} "
            f"| {outcomes} | {count} |"
        )
    lines += [
        "",
        _PEERS,
        "| row | QEMU | crosvm | Cloud Hypervisor |",
        "|---|---|---|---|",
    ]
    for row_id, peers in PEERS.items():
        lines.append(f"| {row_id} | {peers.qemu} | {peers.crosvm} | {peers.cloud_hypervisor} |")
    return "\n".join(lines) + "\n"


class _Writer:
    """A pytest plugin that writes the page when the session was a success."""

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK:
            PATH.write_text(render(session.config.stash[RECORD]), encoding="utf-8")


def main() -> int:
    """Run the suite and write the page; return pytest's exit status."""
    suite = str(Path(__file__).parent)
    return pytest.main([suite, "-q", "-m", f"not {JUDGES_THE_RECORD}"], plugins=[_Writer()])


if __name__ == "__main__":
    sys.exit(main())
