from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.endpoints.remote.scripted import Shape
from viommu.endpoints.remote.access import read_region, write_region
from viommu.errors import PeerError
from viommu.spec.vfio_user import Command
from viommu.vfio_user.protocol import Capabilities

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.endpoints.remote.conftest import Rig
    from viommu.vfio_user import LoopClient


def small(make: Callable[..., Rig], limit: int = 16) -> tuple[Rig, LoopClient]:
    shape = Shape()
    shape.capabilities = Capabilities(8, max_data_xfer_size=limit)
    rig = make(shape).start()
    client = rig.function.client
    assert client is not None
    rig.stage.device.log.clear()
    return rig, client


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (16, [16]), (17, [16, 1]), (40, [16, 16, 8])]
)
def test_as_many_messages_as_it_takes(
    make: Callable[..., Rig], count: int, sizes: list[int]
) -> None:
    rig, client = small(make)
    data = bytes(range(1, count + 1))

    write_region(client, 2, 0x100, data)
    answer = read_region(client, 2, 0x100, count)
    rig.turn()

    assert answer.result() == data
    assert [len(entry[3]) for entry in rig.stage.device.log if entry[0] == "write"] == sizes
    assert [entry[3] for entry in rig.stage.device.log if entry[0] == "read"] == sizes


def test_one_refusal_refuses_the_whole(make: Callable[..., Rig]) -> None:
    rig, client = small(make)
    rig.stage.device.refuse = {Command.REGION_READ: errno.EIO, Command.REGION_WRITE: errno.EPERM}

    read, write = read_region(client, 0, 0, 20), write_region(client, 0, 0, bytes(20))
    rig.turn()

    for answer, number in ((read, errno.EIO), (write, errno.EPERM)):
        with pytest.raises(PeerError) as caught:
            answer.result()
        assert caught.value.errno == number


def test_what_would_need_too_many_messages_is_not_begun(make: Callable[..., Rig]) -> None:
    rig, client = small(make, 1)

    read, write = read_region(client, 2, 0, 4097), write_region(client, 2, 0, bytes(4097))

    for answer in (read, write):
        with pytest.raises(PeerError) as caught:
            answer.result()
        assert caught.value.errno == errno.E2BIG
    assert client.outstanding == 0
    read_region(client, 2, 0, 4096)
    assert client.outstanding == 4096
    client.close()
    rig.turn()
