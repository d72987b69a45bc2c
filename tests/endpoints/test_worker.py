"""What runs in the process of an endpoint, here in a thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import PAGE, Rig
from viommu.endpoints import worker
from viommu.endpoints.edu_registers import BUFFER_START, Register
from viommu.endpoints.worker_process import WorkerOrder
from viommu.ipc.peer import PeerProcess
from viommu.loop import Loop
from viommu.spec import pci, vfio
from viommu.testing.serving import LoopThread
from viommu.vfio_user import LoopClient, requests, wait

if TYPE_CHECKING:
    from collections.abc import Iterator


class Bench:
    """A server of exports in a thread, the worker in another, and its device's client here."""

    def __init__(self, description: str) -> None:
        self.rig = Rig()
        self.thread = LoopThread(self.rig.loop)
        self.thread.__enter__()
        ours, exports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.thread.call(lambda: self.rig.server.admit(ours, PeerProcess(0, 0, -1)))
        sock, device = socket.socketpair()
        self.status: list[int] = []
        self.worker = threading.Thread(
            target=lambda: self.status.append(worker.work("00:06.0", description, device, exports))
        )
        self.worker.start()
        self.loop = Loop()
        self.client = LoopClient(self.loop, sock, timeout=30)

    def end(self) -> int:
        self.worker.join()
        return self.status[0]

    def close(self) -> None:
        self.client.close()
        self.thread.call(self.rig.server.close)
        self.worker.join()
        self.loop.close()
        self.thread.__exit__()
        self.rig.__exit__()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench("edu")
    yield bench
    bench.close()


def test_it_serves_the_endpoint_whose_dma_is_exports(bench: Bench) -> None:
    info = wait(bench.loop, bench.client.submit(requests.device_info()), 30)
    assert info.num_regions == vfio.PCI_NUM_REGIONS
    command = (pci.COMMAND_MEMORY | pci.COMMAND_MASTER).to_bytes(2, "little")
    config = vfio.PCI_CONFIG_REGION_INDEX
    bench.thread.call(lambda: bench.rig.memory.write(0x4000, b"exported"))
    for request in (
        requests.region_write(config, pci.COMMAND, command),
        requests.region_write(0, Register.DMA_SOURCE, (0x10000).to_bytes(8, "little")),
        requests.region_write(0, Register.DMA_DESTINATION, BUFFER_START.to_bytes(8, "little")),
        requests.region_write(0, Register.DMA_COUNT, PAGE.to_bytes(8, "little")),
        requests.region_write(0, Register.HOLD, (5000).to_bytes(8, "little")),
        requests.region_write(0, Register.DMA_COMMAND, (1).to_bytes(8, "little")),
    ):
        wait(bench.loop, bench.client.submit(request), 30)

    assert bench.thread.call(lambda: bench.rig.mapper.exports.total) == 1
    bench.client.close()
    assert bench.end() == 0
    assert bench.thread.call(lambda: bench.rig.mapper.exports.total) == 0


def test_it_ends_with_its_server(bench: Bench) -> None:
    wait(bench.loop, bench.client.negotiated, 30)
    bench.thread.call(bench.rig.server.close)

    assert bench.end() == 0


def test_it_learns_that_memory_has_gone(bench: Bench) -> None:
    """What a VMM takes back must not stay in use here."""
    wait(bench.loop, bench.client.negotiated, 30)
    bench.thread.call(bench.rig.memory.unmap_all)
    bench.client.close()

    assert bench.end() == 0


def test_an_endpoint_that_can_not_be_made_says_why() -> None:
    bench = Bench("blk,path=/nonexistent/disk")
    assert bench.end() == 1
    bench.thread.call(lambda: None)
    assert bench.thread.call(lambda: bench.rig.server.farewell) == (
        "/nonexistent/disk: can't open the disk: No such file or directory"
    )
    bench.close()


def test_without_a_server_there_is_nothing_to_do() -> None:
    ours, exports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device, other = socket.socketpair()
    ours.close()

    assert worker.work("00:06.0", "edu", device, exports) == 1
    other.close()


def test_it_does_not_begin_when_its_server_has_ended() -> None:
    order = WorkerOrder("00:06.0", "edu", 0, 0, os.getpid() + 1, 30)
    command = [sys.executable, "-m", "viommu.endpoints.worker", *order.arguments()]

    assert subprocess.run(command, check=False).returncode == 1
