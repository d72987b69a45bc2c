"""A device is taken out of the machine while memory is mapped for it."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

import pytest

from guest_tests.guest import pci
from guest_tests.l1.bench import Bench
from guest_tests.l1.layout import PLUGGED_EDU, PLUGGED_EDU_ARGUMENTS
from guest_tests.l1.monitor import Monitor
from guest_tests.l1.pages import PAGE
from viommu.errors import Access
from viommu.mapper import AddMapResult, MappingInfo
from viommu.spec import vfio

if TYPE_CHECKING:
    from collections.abc import Iterator

RAM = 0x100000000
IOVA = 0x40000000
# The kernel waits five seconds, in case the button was pressed by mistake.
WAIT_SECONDS = 30.0


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    """QEMU; the device is plugged again at the end."""
    with Monitor() as monitor:
        yield monitor
        wait_until(there=False)
        monitor.execute("device_add", **PLUGGED_EDU_ARGUMENTS)
        wait_until(there=True)


def wait_until(*, there: bool) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while pci.path(PLUGGED_EDU).exists() is not there:
        assert time.monotonic() < deadline, f"{PLUGGED_EDU} is {'not ' if there else ''}there"
        time.sleep(0.05)


def test_a_request_to_let_go_is_honoured(backend: str, monitor: Monitor) -> None:
    request = os.eventfd(0)
    with Bench(backend) as bench:
        ram = bench.add_ram(RAM, PAGE)
        mapper = bench.mapper(PLUGGED_EDU)
        edu = bench.edu(PLUGGED_EDU)
        assert mapper.add_map(MappingInfo(IOVA, RAM, PAGE, Access.READ | Access.WRITE)) is (
            AddMapResult.OK
        )
        bench.devices[PLUGGED_EDU].set_irqs(
            vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER,
            vfio.PCI_REQ_IRQ_INDEX,
            0,
            1,
            [request],
        )

        monitor.execute("device_del", id=PLUGGED_EDU_ARGUMENTS["id"])
        assert select.select([request], [], [], WAIT_SECONDS)[0], "nobody asked to let go"

        # Until we do, all is as before.
        ram.bytes[:4] = b"last"
        edu.read(IOVA, 4)
        edu.write(IOVA + 64, 4)
        assert ram.bytes[64:68] == b"last"
        assert pci.path(PLUGGED_EDU).exists()
    os.close(request)

    monitor.wait_for("DEVICE_DELETED", device=PLUGGED_EDU_ARGUMENTS["id"])
