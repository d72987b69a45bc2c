"""Every row has a test named after it, and every check was seen to accept and to reject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.peers import PEERS
from tests.conformance.record import Clause, Outcome, Record, row_of_test, row_tests
from tests.conformance.rig import Reply
from tests.conformance.rows import ROWS
from tests.conformance.table import PATH, render

if TYPE_CHECKING:
    from collections.abc import Iterable


@pytest.mark.parametrize("row_id", ROWS)
def test_a_row_has_a_test_named_after_it(row_id: str) -> None:
    assert row_tests()[row_id]


def test_every_row_knows_its_peers_in_the_same_order() -> None:
    assert list(PEERS) == list(ROWS)


@pytest.mark.parametrize(
    ("name", "row_id"),
    [
        ("test_AT6_an_endpoint_moves", "AT6"),
        ("test_AT6_prime_attaching_again", "AT6'"),
        ("test_a_row_has_a_test", None),
    ],
)
def test_the_name_of_a_test_gives_its_row(name: str, row_id: str | None) -> None:
    assert row_of_test(name) == row_id


def test_a_name_like_a_row_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError):
        row_of_test("test_ZZ1_nothing")


@pytest.mark.parametrize(
    ("row_id", "seen", "missing"),
    [
        ("AT1", [], {Outcome.ACCEPTED, Outcome.REJECTED}),
        ("AT1", [Outcome.ACCEPTED], {Outcome.REJECTED}),
        ("AT1", [Outcome.REJECTED, Outcome.OBSERVED], {Outcome.ACCEPTED}),
        ("AT1", [Outcome.REJECTED, Outcome.ACCEPTED], set()),
        ("FB1", [], {Outcome.OBSERVED}),
        ("FB1", [Outcome.OBSERVED], set()),
    ],
)
def test_a_check_must_be_seen_both_ways(
    row_id: str, seen: Iterable[Outcome], missing: set[Outcome]
) -> None:
    record = Record()
    for outcome in seen:
        record.note(row_id, "a test", outcome)
    assert record.missing(row_id) == missing


def test_a_clause_notes_nothing_when_its_assertion_fails() -> None:
    record = Record()
    clause = Clause(record, "AT1", "a test")
    with pytest.raises(AssertionError):
        clause.accepts(Reply(b"\4\0\0\0", 4))
    assert record.missing("AT1") == {Outcome.ACCEPTED, Outcome.REJECTED}


# From here on: what this run saw. The plugin in conftest.py runs these last, and
# leaves them out when the run does not contain every test of a row.


@pytest.mark.judges_the_record
@pytest.mark.parametrize("row_id", ROWS)
def test_the_row_was_seen_as_its_kind_asks(record: Record, row_id: str) -> None:
    assert record.missing(row_id) == set(), f"{row_id} is a {ROWS[row_id].kind.value}"


@pytest.mark.judges_the_record
def test_every_test_of_a_row_said_what_it_saw(record: Record) -> None:
    assert {row_id: record.tests[row_id] for row_id in ROWS} == dict(row_tests())


@pytest.mark.judges_the_record
def test_the_committed_table_is_up_to_date(record: Record) -> None:
    assert PATH.read_text(encoding="utf-8") == render(record), (
        "run: python -m tests.conformance.table"
    )
