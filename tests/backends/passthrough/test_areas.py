from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

import pytest

from tests.backends.passthrough.fake_device import BAR0, BAR2
from viommu.errors import PeerError
from viommu.pci.layout import BarPlace
from viommu_backends.passthrough.areas import BarAreas

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.backends.passthrough.fake_device import FakeVfioDevice
    from viommu_backends.vfio_device import VfioDevice

TABLES = [BarPlace(0, 0x2000, 0x2080), BarPlace(0, 0x3000, 0x3008)]


def offered(device: FakeVfioDevice) -> BarAreas:
    return BarAreas(cast("VfioDevice", device), TABLES)


@pytest.fixture
def areas(device: FakeVfioDevice) -> Iterator[BarAreas]:
    areas = offered(device)
    yield areas
    areas.close()
    assert areas.holders() == {}


def test_what_is_offered_of_each_bar_and_where_it_is_in_the_file(areas: BarAreas) -> None:
    told = {bar: [area[1:] for area in areas.of(bar)] for bar in range(6)}

    assert told == {
        0: [(0, 0x2000, 0), (0x4000, 0x4000, 0x4000)],
        2: [(0, BAR2, BAR0)],
        1: [], 3: [], 4: [], 5: [],
    }  # fmt: skip


def test_pages_that_a_kernel_names_twice_are_refused(device: FakeVfioDevice) -> None:
    twice = ((0, 0x2000), (0x1000, 0x2000))
    device.regions[2] = device.regions[2]._replace(areas=twice)

    with pytest.raises(PeerError, match="are offered") as caught:
        offered(device)
    assert caught.value.errno == errno.EEXIST


def test_a_vmm_has_everything_mapped_while_it_is_there(areas: BarAreas) -> None:
    for _ in range(2):
        areas.connect()
        assert areas.holders() == {"0": ["VMM"], "2": ["VMM"]}
        areas.disconnect()
        assert areas.holders() == {}
    areas.disconnect()


def test_the_dma_of_others_has_what_it_was_given_until_the_last_use(
    areas: BarAreas, device: FakeVfioDevice
) -> None:
    (area,) = areas.of(2)

    first, second = areas.memory(area), areas.memory(area)
    assert first is second
    assert os.fstat(first.fileno()).st_ino == os.fstat(device.fd).st_ino
    assert areas.holders() == {"2": ["DMA"]}
    first.close()
    assert areas.holders() == {"2": ["DMA"]}
    second.close()
    assert areas.holders() == {}
    with areas.memory(area) as third:
        assert third is not first
        assert areas.holders() == {"2": ["DMA"]}


def test_a_file_that_can_not_be_had_is_no_use(areas: BarAreas, device: FakeVfioDevice) -> None:
    fd, device.fd = device.fd, os.open("/", os.O_PATH)

    with pytest.raises(PeerError, match="not open for reading"):
        areas.memory(areas.of(2)[0])

    assert areas.holders() == {}
    os.close(device.fd)
    device.fd = fd


def test_closing_works_whoever_has_what_and_says_so(
    device: FakeVfioDevice, caplog: pytest.LogCaptureFixture
) -> None:
    areas = offered(device)
    (area,) = areas.of(2)
    file = areas.memory(area)
    areas.connect()

    areas.close()
    areas.close()

    said = "0000:04:00.0: in use as long as somebody maps BAR 0 (VMM), BAR 2 (VMM, DMA)"
    assert caplog.messages == [said]
    assert areas.of(0) == areas.of(2) == []
    areas.disconnect()
    assert areas.holders() == {"2": ["DMA"]}
    file.close()
    areas.connect()
    assert areas.holders() == {}
    with pytest.raises(PeerError) as caught:
        areas.memory(area)
    assert caught.value.errno == errno.EBADF


def test_closing_what_nobody_maps_is_silent(
    device: FakeVfioDevice, caplog: pytest.LogCaptureFixture
) -> None:
    areas = offered(device)
    areas.connect()
    areas.disconnect()

    areas.close()

    assert caplog.messages == []
