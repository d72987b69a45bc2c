from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, cast

import pytest

from tests.backends.passthrough.fake_device import BAR0, BAR2, FakeVfioDevice
from viommu.errors import BackendError
from viommu_backends.bar_file import BarFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu_backends.vfio_device import VfioDevice


@pytest.fixture
def device() -> Iterator[FakeVfioDevice]:
    device = FakeVfioDevice()
    device.write(7, 4, b"\2\0")
    yield device
    device.close()


def test_it_is_the_device_s_own_file(device: FakeVfioDevice) -> None:
    with BarFile(cast("VfioDevice", device)) as file:
        assert os.fstat(file.fileno()).st_ino == os.fstat(device.fd).st_ino
        assert file.writable


@pytest.mark.parametrize(("offset", "size"), [(0, BAR0), (BAR0, BAR2), (BAR0 + 0x1000, 0x1000)])
def test_what_lies_in_one_bar_can_be_a_dma_buf(
    device: FakeVfioDevice, offset: int, size: int
) -> None:
    with BarFile(cast("VfioDevice", device)) as file:
        os.close(file.dma_buf(offset, size))


@pytest.mark.parametrize(("offset", "size"), [(BAR0 - 0x1000, 0x2000), (1 << 40, 0x1000)])
def test_what_does_not_can_not(device: FakeVfioDevice, offset: int, size: int) -> None:
    with BarFile(cast("VfioDevice", device)) as file:
        with pytest.raises(BackendError, match="no BAR at") as caught:
            file.dma_buf(offset, size)
        assert caught.value.errno == errno.EINVAL
