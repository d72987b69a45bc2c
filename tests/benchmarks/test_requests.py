"""What a MAP and an UNMAP cost, from the bytes alone to a request in a ring.

Runs once as a test; ``make bench`` measures. A number means
something only beside another one of the same run.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest

from viommu.basic import BasicMemoryMapper
from viommu.device import VirtioIommu
from viommu.errors import Access
from viommu.iova import IntervalMap
from viommu.loop import Loop
from viommu.mapper import MappingInfo
from viommu.memory import GuestMemory, MappedFiles
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import RequestType, Status
from viommu.testing.ring import DriverQueue, RingLayout
from viommu.virtio.iommu import VirtioIommuDevice
from viommu.virtio.ring import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

PAGE = 0x1000
LIVE = 4096  # mappings that are there while one comes and one goes
OK = bytes((Status.OK, 0, 0, 0))


def map_request(page: int) -> bytes:
    at = page * PAGE
    return spec.MAP.pack(RequestType.MAP, 1, at, at + PAGE - 1, at & 0xFFFFF000, 3)


def unmap_request(page: int) -> bytes:
    return spec.UNMAP.pack(RequestType.UNMAP, 1, page * PAGE, page * PAGE + PAGE - 1)


def pairs(handle: Callable[[bytes], object]) -> Callable[[], None]:
    """Return something that maps a page and unmaps the oldest one, on and on."""
    for page in range(LIVE):
        handle(map_request(page))
    pages = itertools.count(LIVE)

    def step() -> None:
        page = next(pages)
        handle(map_request(page))
        handle(unmap_request(page - LIVE))

    return step


class Quiet:
    """A transport nobody listens to."""

    active = True

    def interrupt(self, queue: int) -> None:
        del queue

    def config_changed(self) -> None:
        pass

    def needs_reset(self, reason: str) -> None:
        raise AssertionError(reason)

    def reset_done(self) -> None:
        pass


def attached() -> VirtioIommu:
    iommu = VirtioIommu()
    iommu.add_endpoint(8, BasicMemoryMapper())
    assert iommu.handle(spec.ATTACH.pack(RequestType.ATTACH, 1, 8, 0, 0), 4) == OK
    return iommu


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    memory = GuestMemory()
    file = MappedFiles().get(fd, 0, 1 << 20, writable=True)
    memory.map(0, 1 << 20, readable=True, writable=True, file=file)
    os.close(fd)
    yield memory
    memory.close()


def test_interval_map_pair(benchmark: BenchmarkFixture) -> None:
    space = IntervalMap()
    for page in range(LIVE):
        space.add(MappingInfo(page * PAGE, 0, PAGE, Access.READ))
    pages = itertools.count(LIVE)

    def step() -> None:
        page = next(pages)
        space.add(MappingInfo(page * PAGE, 0, PAGE, Access.READ))
        space.remove((page - LIVE) * PAGE, (page - LIVE) * PAGE + PAGE)

    benchmark(step)


def test_handle_pair(benchmark: BenchmarkFixture) -> None:
    iommu = attached()
    benchmark(pairs(lambda request: iommu.handle(request, 4)))
    assert iommu.refused == 0


@pytest.mark.parametrize("batch", [1, 32])
def test_ring_pair(benchmark: BenchmarkFixture, memory: GuestMemory, batch: int) -> None:
    """As Linux sends them: an indirect descriptor a request; the driver's part is included."""
    iommu = attached()
    device = VirtioIommuDevice(iommu, Loop())
    at = RingLayout.at(0, 256)
    driver = DriverQueue(memory, 256, at, event_idx=True)
    queue = SplitQueue(memory, 0, 256, at.desc, at.avail, at.used, event_idx=True, indirect=True)
    device.start(Quiet(), iommu.features, [queue, None])
    slots = itertools.cycle(range(0x10000, 0x10000 + 256 * 128, 128))
    waiting = 0

    def submit(request: bytes) -> None:
        nonlocal waiting
        slot = next(slots)
        memory.write(slot, request)
        driver.add([(slot, len(request))], [(slot + 64, 4)], table=slot + 80)
        waiting += 1
        if waiting >= batch:
            waiting = 0
            driver.publish()
            device.notify(spec.REQUEST_QUEUE)
            assert all(used.length == 4 for used in driver.collect())

    benchmark(pairs(submit))
    assert iommu.refused == 0
