from __future__ import annotations

import errno
import logging

import pytest

from tests.memory.recording import pages
from viommu.errors import BackendError, PeerError
from viommu.memory.incident import Incident, IncidentKind, IncompleteError, log_incident


def incident(error: Exception, target: str | None = "type1", times: int = 1) -> Incident:
    return Incident(IncidentKind.NOT_UNMAPPED, "ram", pages(1), target, error, times)


def test_an_incident_says_what_where_who_and_why() -> None:
    error = BackendError(errno.EBUSY, "UNMAP_DMA")
    assert str(incident(error)) == (
        "[0x1000, 0x2000) of 'ram' (type1): not unmapped: UNMAP_DMA: Device or resource busy"
    )
    assert str(incident(error, None)).startswith("[0x1000, 0x2000) of 'ram': not unmapped")


@pytest.mark.parametrize(
    ("errors", "number"),
    [
        ([ValueError("a bug"), BackendError(errno.EBUSY, "busy")], errno.EBUSY),
        ([PeerError(errno.EINVAL, "short file")], errno.EIO),
    ],
)
def test_what_is_incomplete_carries_the_hosts_errno(errors: list[Exception], number: int) -> None:
    incidents = [incident(error) for error in errors]
    error = IncompleteError(incidents)
    assert error.errno == number
    assert error.incidents == incidents
    assert all(str(each) in str(error) for each in incidents)


def test_the_log_is_told_less_and_less_often(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "viommu"):
        for times in range(1, 20):
            log_incident(incident(ValueError(f"time {times}"), times=times))
    assert [record.message.rpartition(" ")[2] for record in caplog.records] == [
        "1", "2", "4", "8", "16",
    ]  # fmt: skip
