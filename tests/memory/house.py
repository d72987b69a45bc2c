"""A region manager with a file of numbered pages and recording targets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tests.memory.recording import PAGE, Call, RecordingTarget, pages
from viommu.memory.backing import FileBacking
from viommu.memory.dma_target import DmaNeeds, MemoryKind
from viommu.memory.regions import RegionManager

if TYPE_CHECKING:
    from viommu.memory.dma_target import DmaRegistration
    from viommu.memory.incident import Incident, IncidentKind
    from viommu.memory.region import Region

RESERVED = 64


class House:
    """A manager, a file of numbered pages, and what was reported and called."""

    def __init__(self, fd: int) -> None:
        for page in range(16):
            os.pwrite(fd, bytes([page + 1]), page * PAGE)
        self.fd = fd
        self.incidents: list[Incident] = []
        self.calls: list[Call] = []
        self.targets: list[RecordingTarget] = []
        self.registrations: list[DmaRegistration] = []
        self.manager = RegionManager(reservation=RESERVED * PAGE, report=self.incidents.append)
        self.file = FileBacking(fd)

    def target(self, name: str = "target", needs: DmaNeeds = DmaNeeds.NONE) -> RecordingTarget:
        """Make a target and register it."""
        target = RecordingTarget(name, needs, self.calls)
        self.targets.append(target)
        self.registrations.append(self.manager.register(target, name, needs))
        return target

    def region(
        self,
        name: str,
        first: int,
        count: int,
        *filled: tuple[int, int],
        kind: MemoryKind = MemoryKind.RAM,
        priority: int | None = None,
        enable: bool = True,
    ) -> Region:
        """Add a region whose pages ``filled`` (first, count) are the same pages of the file."""
        region = self.manager.add_region(name, pages(first, count), kind, priority=priority)
        for start, size in filled:
            self.fill(region, start, size)
        if enable:
            self.manager.enable(region)
        return region

    def fill(self, region: Region, start: int, size: int = 1, *, writable: bool = True) -> None:
        self.manager.add_mapping(
            region, pages(start, size), self.file.retain(), start * PAGE, writable=writable
        )

    def take_calls(self) -> list[tuple[str, int, int]]:
        taken = [(c.what + ("" if c.ok else "!"), c.first, c.end) for c in self.calls]
        self.calls.clear()
        return taken

    def take_incidents(self) -> list[tuple[IncidentKind, str, str | None]]:
        taken = [(i.kind, i.region, i.target) for i in self.incidents]
        self.incidents.clear()
        return taken

    def close(self) -> None:
        """Heal every target, take all away and look whether anything is left."""
        self.manager._check()
        for target in self.targets:
            target.reject.clear()
            target.refuse.clear()
        self.manager.retry()
        for registration in self.registrations:
            registration.release()
        for region in self.manager.regions():
            self.manager.remove_region(region)
        self.manager._check()
        for target in self.targets:
            assert target.entries == {}
            assert target.violations == []
        assert self.file.uses == 1, "a use of the file was not given back"
        assert self.manager.snapshot()["addresses"] is None
        self.file.close()
