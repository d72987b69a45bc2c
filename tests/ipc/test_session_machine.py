"""Server and client together, over a real socket, are a mapper like any other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hypothesis import settings
from hypothesis.stateful import invariant

from viommu.basic import BasicMemoryMapper
from viommu.ipc.client import ExportClient
from viommu.ipc.server import ExportServer
from viommu.memory import GuestMemory
from viommu.testing.mapper_machine import MapperMachine
from viommu.testing.serving import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.errors import Access
    from viommu.events import Event
    from viommu.mapper import (
        AddMapResult,
        MappingInfo,
        MemoryMapper,
        MemRegion,
        RemoveMapResult,
    )

T = TypeVar("T")


class RemoteExports:
    """A mapper whose domain is in the server's thread, and whose client is here."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="viommu-")
        path = Path(self.directory.name, "s")
        self.thread = LoopThread()
        self.thread.__enter__()
        self.mapper = BasicMemoryMapper()
        self.server = self.thread.call(
            lambda: ExportServer(
                self.thread.loop, "test", self.mapper, GuestMemory(), print, path=path
            )
        )
        self.client = ExportClient(path)

    def settle(self) -> None:
        """Wait until the server has handled what was sent, and seen what that caused."""
        self.client.refresh_memory()
        for _ in range(2):
            self.thread.call(lambda: None)

    def call(self, function: Callable[[], T]) -> T:
        result = self.thread.call(function)
        self.settle()
        return result

    def close(self) -> None:
        self.client.close()
        self.thread.call(self.server.close)
        self.thread.__exit__()
        self.directory.cleanup()

    # the domain's half

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        return self.call(lambda: self.mapper.add_map(mapping))

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        return self.call(lambda: self.mapper.remove_map(iova_start, size))

    def reset_domain(self) -> Event | None:
        return self.call(self.mapper.reset_domain)

    def get_mask(self) -> int:
        return self.mapper.get_mask()

    def supports_detach(self) -> bool:
        return True

    def id(self) -> int:
        return self.mapper.id()

    def join(self, other: MemoryMapper) -> bool:
        return self.mapper.join(other)

    def vfio_dma_map(self, iova: int, hva: int, size: int, prot: Access) -> AddMapResult:
        return self.mapper.vfio_dma_map(iova, hva, size, prot)

    # the client's half

    def start_export_session(self) -> Event:
        return self.client.start_export_session()

    def export(self, iova: int, size: int) -> list[MemRegion]:
        return self.client.export(iova, size)

    def release(self, iova: int, size: int) -> None:
        self.client.release(iova, size)
        self.settle()


class RemoteMachine(MapperMachine):
    def make_mapper(self) -> MemoryMapper:
        self.remote = RemoteExports()
        return self.remote

    def teardown(self) -> None:
        super().teardown()
        self.remote.close()

    @invariant()
    def both_sides_count_the_same(self) -> None:
        assert self.remote.client.held == self.model.held.total()
        described = self.remote.thread.call(self.remote.server.describe)["client"]
        assert isinstance(described, dict)
        assert described["exports"] == self.model.held.total()
        self.remote.mapper._check()


RemoteMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestRemoteMachine = RemoteMachine.TestCase
