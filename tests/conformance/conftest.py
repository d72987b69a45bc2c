"""The fixtures of the suite, and the order in which the record is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.record import Clause, Record, row_of_test, row_tests
from tests.conformance.rig import Rig
from viommu.device import IommuConfig

if TYPE_CHECKING:
    from collections.abc import Callable

RECORD = pytest.StashKey[Record]()
JUDGES_THE_RECORD = "judges_the_record"

# Two endpoints like the demonstration's, 00:06.0 and 00:07.0.
A, B = 0x30, 0x38


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = Record()
    config.addinivalue_line(
        "markers", f"{JUDGES_THE_RECORD}: needs every test of the conformance suite to have run"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests that judge the record last, and not at all when some rows won't run."""
    judges = [item for item in items if item.get_closest_marker(JUDGES_THE_RECORD)]
    items[:] = [item for item in items if item not in judges]
    running = {getattr(item, "originalname", item.name) for item in items}
    if set().union(*row_tests().values()) <= running:
        items.extend(judges)
    elif judges:
        config.hook.pytest_deselected(items=judges)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """What this run has seen so far."""
    return request.config.stash[RECORD]


@pytest.fixture
def clause(request: pytest.FixtureRequest, record: Record) -> Clause:
    """The row that the test is named after."""
    name = request.node.originalname
    row_id = row_of_test(name)
    assert row_id is not None, f"{name} is not named after a row"
    return Clause(record, row_id, name)


@pytest.fixture
def make_rig() -> Callable[..., Rig]:
    """Build a device with a configuration of its own."""

    def make(**config: object) -> Rig:
        return Rig(IommuConfig(**config))  # type: ignore[arg-type]  # a test passes what fits

    return make


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """Return a device with the default configuration and endpoints A and B, unattached."""
    rig = make_rig()
    rig.add(A)
    rig.add(B)
    return rig
