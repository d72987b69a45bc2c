"""Results that come later."""

from __future__ import annotations

import pytest

from viommu.deferred import Deferred, all_done
from viommu.errors import UsageError


def test_a_value_reaches_those_who_wait_and_those_who_come_late() -> None:
    deferred: Deferred[int] = Deferred()
    seen: list[int] = []
    deferred.then(lambda done: seen.append(done.result()))
    assert seen == []
    deferred.resolve(7)
    deferred.then(lambda done: seen.append(done.result() + 1))
    assert seen == [7, 8]


def test_none_is_a_value() -> None:
    deferred: Deferred[None] = Deferred()
    deferred.resolve(None)
    assert deferred.done
    deferred.result()  # and does not raise


def test_an_error_is_raised_from_the_result() -> None:
    deferred: Deferred[int] = Deferred()
    error = UsageError("refused")
    seen: list[bool] = []
    deferred.then(lambda done: seen.append(done.done))
    deferred.refuse(error)
    assert seen == [True]
    with pytest.raises(UsageError, match="refused"):
        deferred.result()


def test_there_is_no_result_before_it_is_given() -> None:
    deferred: Deferred[int] = Deferred()
    with pytest.raises(UsageError, match="no result yet"):
        deferred.result()


def test_there_is_only_one_result() -> None:
    deferred: Deferred[int] = Deferred()
    deferred.resolve(1)
    with pytest.raises(UsageError, match="already"):
        deferred.resolve(2)
    with pytest.raises(UsageError, match="already"):
        deferred.refuse(UsageError("too late"))
    assert deferred.result() == 1


def test_several_are_done_when_each_is() -> None:
    first, second, third = Deferred[int](), Deferred[int](), Deferred[int]()
    second.resolve(2)
    seen: list[bool] = []
    all_done([first, second, third]).then(lambda together: seen.append(together.done))
    third.refuse(UsageError("refused"))
    assert seen == []
    first.resolve(1)
    assert seen == [True]


def test_none_at_all_are_done() -> None:
    assert all_done([]).done
