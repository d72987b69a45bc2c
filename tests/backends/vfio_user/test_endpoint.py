"""A device of another process behind the IOMMU, driven by guest drivers, in both memory modes."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.backends.vfio_user.chain import DEVICE, DOMAIN, IOVA, OTHER, Chain, make_chain
from viommu.endpoints.edu_registers import Result
from viommu.errors import Access, UsageError
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.spec.virtio_blk import RequestType
from viommu.spec.virtio_blk import Status as BlkStatus
from viommu.spec.virtio_iommu import FaultReason, Status
from viommu.testing.blk_driver import BlkDriver
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE
from viommu.testing.iommu_driver import MappedDma

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODES = ("shared", "message")


@pytest.fixture(params=MODES)
def chain(request: pytest.FixtureRequest) -> Iterator[Chain]:
    with make_chain(memory=request.param) as chain:
        yield chain


def disk_of(chain: Chain) -> BlkDriver:
    return BlkDriver(chain.connect(DEVICE), MappedDma(chain.iommu, DOMAIN, IOVA))


def test_a_disk_of_another_process(chain: Chain) -> None:
    chain.attach()
    content = chain.image.read_bytes()
    with disk_of(chain) as disk:
        assert disk.get_id() == "disk.img"
        assert disk.read(8, 64) == content[8 * 512 : 72 * 512]
        data = os.urandom(64 << 10)
        disk.write(1000, data)
        disk.flush()
    assert chain.image.read_bytes()[1000 * 512 : 1000 * 512 + len(data)] == data
    assert chain.iommu.faults() == []


def test_the_device_has_the_maps_of_its_domain_and_no_others(chain: Chain) -> None:
    chain.attach()
    for number in range(4):
        chain.map(IOVA + 2 * number * PAGE, chain.page())
    assert chain.iommu.unmap(DOMAIN, IOVA + 2 * PAGE, PAGE) == Status.OK

    told = [(iova, size) for iova, size, _ in chain.downstream.maps()]

    assert told == [(iova, size) for iova, size, _ in chain.ranges()]
    assert len(told) == 3
    state = chain.state()["device"]
    assert [(iova, size) for iova, size, *_ in state["maps"]] == told
    assert state["maps in all"] == 3
    assert chain.iommu.detach(DOMAIN, DEVICE.number) == Status.OK
    assert chain.downstream.maps() == []


def test_what_is_chosen_is_said(chain: Chain) -> None:
    state = chain.state()

    assert state["device"]["socket"] == str(chain.downstream.path)
    assert state["device"]["process"] == os.getpid()
    assert state["device"]["state"] == "alive"
    assert state["device"]["memory"] in state["backend"]
    assert state["backend"].startswith("a vfio-user device, ")
    assert state["counters"]["deaths"] == 0


def test_only_messages_are_translated_here() -> None:
    with make_chain(memory="message", kind="edu") as chain:
        chain.attach()
        edu = EduDriver(chain.connect(DEVICE))
        page = chain.page(b"secret")
        chain.map(IOVA, page, access=Access.READ)
        assert edu.read_memory(IOVA, 6) == Result.OK
        assert edu.write_memory(IOVA, 6) == Result.TRANSLATION_FAULT
        assert edu.read_memory(page, 6) == Result.TRANSLATION_FAULT
        assert chain.state()["device"]["memory"] == "message"
        edu.close()


def wait_until(chain: Chain, state: str) -> None:
    """Wait until the device is ``state``, as it will be in a moment."""
    deadline = time.monotonic() + 20
    while chain.state()["device"]["state"] != state:
        assert time.monotonic() < deadline, chain.state()


def test_a_disk_that_dies_fails_its_requests_and_holds_nothing_up(chain: Chain) -> None:
    chain.attach()
    chain.attach(OTHER)
    other = EduDriver(chain.connect(OTHER))
    page = chain.page(b"still here")
    chain.map(IOVA + (1 << 30), page)
    disk = disk_of(chain)
    assert disk.capacity == 2048
    assert len(disk.read(0, 8)) == 4096

    chain.downstream.kill()
    wait_until(chain, "dead")

    assert disk.request(RequestType.FLUSH) == BlkStatus.IOERR
    assert disk.request(RequestType.IN, 0, writable=[(IOVA, 512)]) == BlkStatus.IOERR
    assert disk.virtio.status & 64
    assert disk.capacity == 2048
    assert chain.iommu.unmap(DOMAIN, IOVA + (1 << 30), PAGE) == Status.OK
    assert other.read_memory(IOVA + (1 << 30), 10) == Result.TRANSLATION_FAULT
    chain.map(IOVA + (1 << 30), page)
    assert other.read_memory(IOVA + (1 << 30), 10) == Result.OK
    state = chain.state()
    assert state["device"]["dead"]["why"]
    assert state["counters"]["deaths"] == 1
    disk.close()
    other.close()


def test_a_disk_that_starts_again_is_taken_after_a_reset(chain: Chain) -> None:
    chain.attach()
    disk = disk_of(chain)
    kept = chain.page()
    chain.map(IOVA + (1 << 30), kept)
    chain.downstream.kill()
    wait_until(chain, "dead")
    chain.downstream.start()

    disk.virtio.reset()
    wait_until(chain, "alive")
    again = BlkDriver(disk.virtio.client, disk.dma)

    assert again.read(0, 8) == chain.image.read_bytes()[:4096]
    assert (IOVA + (1 << 30), PAGE) in [entry[:2] for entry in chain.downstream.maps()]
    again.close()


def test_the_next_vmm_gets_a_device_that_was_reset(chain: Chain) -> None:
    chain.attach()
    disk = disk_of(chain)
    disk.virtio.client.close()

    client = chain.connect(DEVICE)
    assert client.region_read(7, 4, 2) == b"\0\0"
    client.close()


@pytest.mark.parametrize("mode", MODES)
def test_nobody_there_is_a_mistake_of_the_user(tmp_path: Path, mode: str) -> None:
    options = MachineOptions(
        tmp_path, OTHER, [(DEVICE, f"vfio-user,socket={tmp_path}/none,memory={mode}")]
    )
    with (
        contextlib.closing(Loop()) as loop,
        pytest.raises(UsageError, match=r"can't connect to .*/none"),
    ):
        Machine(loop, options)


def test_faults_of_messages_are_reported() -> None:
    with make_chain(memory="message", kind="blk") as chain:
        chain.attach()
        disk = disk_of(chain)
        secret = chain.page(b"secret")
        # The device knows what it may reach, so only one that doesn't care gets here.
        (endpoint,) = (e for bdf, e in chain.machine._endpoints.items() if bdf == DEVICE)
        dma = endpoint._dma  # type: ignore[attr-defined]
        with pytest.raises(Exception, match="faulted"):
            chain.server.call(lambda: dma.read(secret, 6))
        report = chain.iommu.next_fault()
        assert (report.reason, report.endpoint, report.address) == (
            FaultReason.MAPPING,
            DEVICE.number,
            secret,
        )
        disk.close()
