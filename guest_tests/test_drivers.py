"""Drivers that come and go: an endpoint leaves its domain and comes back to one that works."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest_tests.rig import DISK

if TYPE_CHECKING:
    from guest_tests.rig import Rig


@pytest.fixture
def written(guest: Rig) -> dict[str, str]:
    """Files on the disk: their sums by name."""
    guest.call("disk.make", bdf=DISK, megabytes=16)
    files: dict[str, str] = guest.call("disk.fill", bdf=DISK, files={"a": 100_000, "b": 1 << 20})
    return files


def test_the_disk_survives_its_drivers(guest: Rig, written: dict[str, str]) -> None:
    guest.call("disk.rebind", bdf=DISK)

    assert guest.call("disk.sums", bdf=DISK) == written


def test_the_disk_goes_to_user_space_and_comes_back(guest: Rig, written: dict[str, str]) -> None:
    kernel_domain = guest.endpoint(DISK)["domain"]
    guest.call("dma.take", bdf=DISK)
    user_domain = guest.endpoint(DISK)["domain"]
    ranges = {d["id"]: d["ranges"] for d in guest.server.snapshot()["domains"]}
    guest.call("dma.give_back")
    guest.call("pci.bind", bdf=DISK, name="virtio-pci")

    assert user_domain not in (None, kernel_domain)
    assert [size for _, size, _, _ in ranges[user_domain]] == [4096]
    assert guest.endpoint(DISK)["domain"] == kernel_domain
    assert guest.call("disk.sums", bdf=DISK) == written
