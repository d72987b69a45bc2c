from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.rig import MEMORY_KINDS, PAGE, Rig, make_rig
from viommu.endpoints.blk import BlkDevice
from viommu.errors import UsageError
from viommu.pci.function import ResetKind
from viommu.spec.virtio_blk import HEADER, SEGMENT, Config, Feature, RequestType, Status
from viommu.testing.ring import DriverQueue, RingLayout
from viommu.virtio.ring import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUEUE_SIZE = 64
DISK_SIZE = 64 << 10
IOVA = 0x10_0000_0000  # of GPA 0
HEADER_AT = 16 * PAGE
STATUS_AT = 20 * PAGE
DATA_AT = 24 * PAGE


class Transport:
    """What the device tells its driver."""

    def __init__(self) -> None:
        self.active = True
        self.interrupts = 0
        self.broken: list[str] = []

    def interrupt(self, queue: int) -> None:
        self.interrupts += 1

    def config_changed(self) -> None:
        raise AssertionError

    def needs_reset(self, reason: str) -> None:
        self.broken.append(reason)
        self.active = False

    def reset_done(self) -> None:
        raise AssertionError


@pytest.fixture(params=MEMORY_KINDS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with make_rig(request.param) as rig:
        rig.map(IOVA, 0, 32 * PAGE)
        yield rig


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture
def make(rig: Rig, image: Path) -> Iterator[Callable[..., BlkDevice]]:
    made: list[BlkDevice] = []

    def make_one(**options: object) -> BlkDevice:
        device = BlkDevice(image, rig.dma, rig.loop, **options)  # type: ignore[arg-type]
        made.append(device)
        return device

    yield make_one
    for device in made:
        device.reset(ResetKind.DRIVER)
        device.close()


class Driver:
    """A driver whose rings and buffers are at IOVA + GPA."""

    def __init__(self, rig: Rig, device: BlkDevice, features: int | None = None) -> None:
        self.rig = rig
        self.device = device
        self.transport = Transport()
        layout = RingLayout.at(0, QUEUE_SIZE)
        self.ring = DriverQueue(rig.memory, QUEUE_SIZE, layout)
        queue = SplitQueue(
            rig.dma,
            0,
            QUEUE_SIZE,
            IOVA + layout.desc,
            IOVA + layout.avail,
            IOVA + layout.used,
            event_idx=False,
            indirect=False,
        )
        device.start(self.transport, device.features if features is None else features, [queue])

    def add(self, kind: int, sector: int = 0, *, slot: int = 0, room: int = 0, out: int = 0) -> int:
        self.rig.memory.write(HEADER_AT + 16 * slot, HEADER.pack(kind, sector))
        self.rig.memory.write(STATUS_AT + slot, b"\xee")
        readable = [(IOVA + HEADER_AT + 16 * slot, 16)]
        writable = [(IOVA + STATUS_AT + slot, 1)]
        if out:
            readable.append((IOVA + DATA_AT, out))
        if room:
            writable.insert(0, (IOVA + DATA_AT, room))
        return self.ring.add(readable, writable)

    def kick(self) -> None:
        self.ring.publish()
        self.device.notify(0)

    def status(self, slot: int = 0) -> int:
        return self.rig.memory.read(STATUS_AT + slot, 1)[0]

    def run(self, kind: int, sector: int = 0, *, room: int = 0, out: int = 0) -> tuple[int, int]:
        self.add(kind, sector, room=room, out=out)
        self.kick()
        (used,) = self.ring.collect()
        return self.status(), used.length


def config(device: BlkDevice) -> Config:
    return Config.from_buffer_copy(device.read_config(0, device.config_size).ljust(72, b"\0"))


def test_configuration_describes_the_disk(make: Callable[..., BlkDevice]) -> None:
    device = make()
    shown = config(device)
    assert shown.capacity == DISK_SIZE // 512
    assert (shown.blk_size, shown.num_queues) == (512, 1)
    assert shown.seg_max + 2 <= device.queue_sizes[0]
    assert shown.write_zeroes_may_unmap == 1
    assert device.behind_iommu
    device.write_config(0, b"\xff" * 8)
    assert config(device).capacity == DISK_SIZE // 512
    assert device.read_config(0, 8) == (DISK_SIZE // 512).to_bytes(8, "little")


def test_features(make: Callable[..., BlkDevice]) -> None:
    features = make().features
    assert features >> Feature.FLUSH & 1
    assert features >> Feature.DISCARD & 1
    assert not features >> Feature.RO & 1


def test_a_read_only_disk_says_so(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    device = make(read_only=True)
    assert device.features >> Feature.RO & 1
    assert not device.features >> Feature.DISCARD & 1
    assert not device.features >> Feature.WRITE_ZEROES & 1
    driver = Driver(rig, device)
    assert driver.run(RequestType.OUT, out=512) == (Status.IOERR, 1)


@pytest.mark.parametrize(
    ("serial", "expected"), [(None, b"disk.img"), ("s-1", b"s-1"), ("x" * 20, b"x" * 20)]
)
def test_serial(
    rig: Rig, make: Callable[..., BlkDevice], serial: str | None, expected: bytes
) -> None:
    driver = Driver(rig, make(serial=serial))
    assert driver.run(RequestType.GET_ID, room=20) == (Status.OK, 21)
    assert rig.memory.read(DATA_AT, 20) == expected.ljust(20, b"\0")


@pytest.mark.parametrize("serial", ["x" * 21, "über", "a\nb"])
def test_a_bad_serial_is_refused(make: Callable[..., BlkDevice], serial: str) -> None:
    with pytest.raises(UsageError, match="printable ASCII"):
        make(serial=serial)
    make()  # and the image was not left locked


def test_requests_are_served_in_order_and_interrupt_once(
    rig: Rig, image: Path, make: Callable[..., BlkDevice]
) -> None:
    driver = Driver(rig, make())
    rig.memory.write(DATA_AT, b"new" * 512)
    heads = [driver.add(RequestType.OUT, 3, slot=0, out=512), driver.add(RequestType.FLUSH, slot=1)]
    driver.kick()
    assert [used.head for used in driver.ring.collect()] == heads
    assert [driver.status(0), driver.status(1)] == [Status.OK, Status.OK]
    assert driver.transport.interrupts == 1
    assert image.read_bytes()[1536:2048] == (b"new" * 512)[:512]


def test_a_long_queue_takes_several_turns(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    driver = Driver(rig, make())
    for slot in range(20):
        driver.add(RequestType.IN, slot, slot=slot, room=512)
    driver.kick()
    first = len(driver.ring.collect())
    assert 0 < first < 20
    driver.kick()  # does not jump the queue
    assert not driver.ring.collect()
    rig.loop.turn(0)
    assert first + len(driver.ring.collect()) == 20


def test_a_reset_stops_a_long_queue(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    device = make()
    driver = Driver(rig, device)
    for slot in range(20):
        driver.add(RequestType.FLUSH, slot=slot)
    driver.kick()
    first = len(driver.ring.collect())
    assert device.reset(ResetKind.DRIVER)
    assert rig.exports == 0
    rig.loop.turn(0)
    assert not driver.ring.collect()
    assert first < 20


def test_only_negotiated_requests_are_supported(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    device = make()
    driver = Driver(rig, device, features=0)
    rig.memory.write(DATA_AT, SEGMENT.pack(0, 1, 0))
    assert driver.run(RequestType.WRITE_ZEROES, out=16) == (Status.UNSUPP, 1)
    driver = Driver(rig, device)
    assert driver.run(RequestType.DISCARD, out=16) == (Status.OK, 1)
    assert driver.run(RequestType.WRITE_ZEROES, out=16) == (Status.OK, 1)


def test_a_queue_that_was_not_enabled_is_no_queue(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    device = make()
    device.start(Transport(), device.features, [None])
    device.notify(0)


@pytest.mark.parametrize("rig", ["shared"], indirect=True)
def test_idle_rings_let_go_when_they_are_unmapped(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    driver = Driver(rig, make())
    driver.run(RequestType.FLUSH)
    assert rig.exports > 0
    resolution = rig.unmap(IOVA, 32 * PAGE)
    assert resolution is not None
    rig.loop.turn(0)
    assert resolution.is_set()
    assert rig.exports == 0

    driver.add(RequestType.FLUSH)
    driver.kick()
    assert len(driver.transport.broken) == 1
    assert [fault.iova for fault in rig.faults] == [IOVA]


@pytest.mark.parametrize("rig", ["by message"], indirect=True)
def test_rings_without_views_hold_nothing(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    driver = Driver(rig, make())
    driver.run(RequestType.FLUSH)
    assert rig.unmap(IOVA, 32 * PAGE) is None
    driver.add(RequestType.FLUSH)
    driver.kick()
    assert len(driver.transport.broken) == 1


@pytest.mark.parametrize("rig", ["by message"], indirect=True)
def test_messages_come_in_the_order_that_the_driver_relies_on(
    rig: Rig, make: Callable[..., BlkDevice], image: Path
) -> None:
    """The data, then the status, then the used element, and last the index that shows it."""
    driver = Driver(rig, make())
    driver.add(RequestType.IN, room=512)
    driver.kick()
    layout = RingLayout.at(0, QUEUE_SIZE)
    results = [gpa for gpa in rig.port.written if gpa != layout.used]  # its flags
    assert results == [DATA_AT, STATUS_AT, layout.used + 4, layout.used + 8, layout.used + 2]
    assert rig.memory.read(DATA_AT, 512) == image.read_bytes()[:512]


@pytest.mark.parametrize("rig", ["by message"], indirect=True)
@pytest.mark.parametrize("where", ["avail", "used", "desc"])
def test_a_ring_that_the_vmm_refuses_breaks_the_device(
    rig: Rig, make: Callable[..., BlkDevice], where: str
) -> None:
    driver = Driver(rig, make())
    driver.run(RequestType.FLUSH)
    start = getattr(RingLayout.at(0, QUEUE_SIZE), where)
    rig.port.refused = range(start, start + 8)
    driver.add(RequestType.FLUSH)
    driver.kick()
    assert len(driver.transport.broken) == 1
    assert "the VMM refuses" in driver.transport.broken[0]


def test_rings_that_moved_meanwhile_are_found_again(
    rig: Rig, make: Callable[..., BlkDevice]
) -> None:
    driver = Driver(rig, make())
    driver.run(RequestType.FLUSH)
    rig.unmap(IOVA, 32 * PAGE)
    rig.map(IOVA, 0, 32 * PAGE)
    assert driver.run(RequestType.FLUSH) == (Status.OK, 1)
    assert not driver.transport.broken


def test_bus_mastering_gates_the_port(rig: Rig, make: Callable[..., BlkDevice]) -> None:
    device = make()
    device.on_bus_master(enabled=False)
    assert not rig.dma.enabled
    device.on_bus_master(enabled=True)
    assert rig.dma.enabled
