"""Drivers side by side, and drivers that come and go: what they had works when they are back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest_tests.rig import DISK, EDU

if TYPE_CHECKING:
    from guest_tests.rig import Rig


@pytest.fixture
def written(guest: Rig) -> dict[str, str]:
    """Files on the disk: their sums by name."""
    guest.call("disk.make", bdf=DISK, megabytes=16)
    files: dict[str, str] = guest.call("disk.fill", bdf=DISK, files={"a": 100_000, "b": 1 << 20})
    return files


def test_two_devices_work_at_the_same_time(guest: Rig, written: dict[str, str]) -> None:
    files = {f"beside{number}": 2 << 20 for number in range(3)}

    assert guest.call("dma.beside_disk", bdf=EDU, disk_bdf=DISK, files=files) > 0
    assert set(guest.call("disk.sums", bdf=DISK)) == {*written, *files}


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
