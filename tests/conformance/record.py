"""What the tests saw, row by row, and the fixture through which they say it."""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conformance.rows import ROWS, Kind
from viommu.spec.virtio_iommu import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conformance.rig import Reply

__all__ = ["Clause", "Outcome", "Record", "row_of_test", "row_tests"]

_TEST = re.compile(r"\btest_([A-Z]{2}\d+(?:_prime)?)_\w+")
_DEFINITION = re.compile(r"^def (test_\w+)\(", re.MULTILINE)
_ROW_OF_SLUG = {row.slug: row for row in ROWS.values()}


class Outcome(enum.Enum):
    """What a test saw a clause do."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    OBSERVED = "observed"


class Record:
    """The outcomes seen for each row during one run, and by which tests."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[str, set[Outcome]] = defaultdict(set)
        self.tests: defaultdict[str, set[str]] = defaultdict(set)

    def note(self, row_id: str, test: str, outcome: Outcome) -> None:
        """Remember that ``test`` saw ``outcome`` for the row; KeyError for an unknown row."""
        self.outcomes[ROWS[row_id].id].add(outcome)
        self.tests[row_id].add(test)

    def missing(self, row_id: str) -> set[Outcome]:
        """Return what must still be seen before the row counts as tested."""
        seen = self.outcomes[row_id]
        match ROWS[row_id].kind:
            case Kind.CHECK:
                return {Outcome.ACCEPTED, Outcome.REJECTED} - seen
            case Kind.STATEMENT:
                return set() if seen else {Outcome.OBSERVED}


class Clause:
    """One row, as the test that is named after it sees it."""

    def __init__(self, record: Record, row_id: str, test: str) -> None:
        self._record = record
        self._row_id = row_id
        self._test = test

    def accepts(self, reply: Reply) -> None:
        """Assert that a request succeeded, and note it."""
        assert reply.status == Status.OK
        self.accepted()

    def rejects(self, reply: Reply, *statuses: Status) -> None:
        """Assert that a request was refused with one of ``statuses``, and note it.

        With none given: that it was given back untouched.
        """
        assert reply.status in (statuses or (None,))
        self.rejected()

    def accepted(self) -> None:
        """Note that the clause let something pass."""
        self._record.note(self._row_id, self._test, Outcome.ACCEPTED)

    def rejected(self) -> None:
        """Note that the clause stopped something."""
        self._record.note(self._row_id, self._test, Outcome.REJECTED)

    def observed(self) -> None:
        """Note that a statement was seen to hold."""
        self._record.note(self._row_id, self._test, Outcome.OBSERVED)


def row_of_test(name: str) -> str | None:
    """Return the id of the row that a test's name begins with, None when it has none.

    Raises:
        KeyError: The name looks like a row's, and there is no such row.
    """
    found = _TEST.match(name)
    return None if found is None else _ROW_OF_SLUG[found[1]].id


def row_tests() -> Mapping[str, set[str]]:
    """Return the names of all tests that carry a row's name, by row id, read from the files."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for match in _DEFINITION.finditer(path.read_text(encoding="utf-8")):
            row_id = row_of_test(match[1])
            if row_id is not None:
                found[row_id].add(match[1])
    return found
