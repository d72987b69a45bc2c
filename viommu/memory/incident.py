"""What goes wrong without stopping a change of guest memory, and how it is told."""

from __future__ import annotations

import enum
import errno
import logging
from typing import TYPE_CHECKING, NamedTuple

from viommu.errors import BackendError

if TYPE_CHECKING:
    from viommu.memory.dma_target import AddressRange

__all__ = ["Incident", "IncidentKind", "IncompleteError", "log_incident"]

_log = logging.getLogger(__name__)


class IncidentKind(enum.Enum):
    """What went wrong without stopping the operation."""

    NO_ADDRESS = "no host virtual address for device memory"
    NOT_MAPPED = "device memory not mapped"
    NOT_UNMAPPED = "not unmapped"
    NOT_VACATED = "host virtual address not given back"
    NOT_ACTIVE = "region can't be active"


class Incident(NamedTuple):
    """A failure that was tolerated, or that could not be helped.

    ``target`` is ``None`` when it is no target's failure. ``times`` counts such
    failures of that target, or of all where there is none, this one included.
    """

    kind: IncidentKind
    region: str
    where: AddressRange
    target: str | None
    error: Exception
    times: int

    def __str__(self) -> str:
        target = "" if self.target is None else f" ({self.target})"
        return f"{self.where} of {self.region!r}{target}: {self.kind.value}: {self.error}"


class IncompleteError(BackendError):
    """Memory was taken away, but not without leaving something behind.

    The operation was carried out as far as it goes; ``incidents`` says what it
    left. :meth:`~viommu.memory.regions.RegionManager.retry` tries that again.
    """

    def __init__(self, incidents: list[Incident]) -> None:
        errors = [i.error for i in incidents if isinstance(i.error, BackendError)]
        super().__init__(
            errors[0].errno if errors else errno.EIO, "; ".join(str(i) for i in incidents)
        )
        self.incidents = incidents


def log_incident(incident: Incident) -> None:
    """Warn of an incident, the more rarely the more often it happens."""
    # A guest may cause the same one as often as it likes: 1st, 2nd, 4th, 8th ...
    if not incident.times & (incident.times - 1):
        _log.warning("%s", incident)
