"""Hosts as they come, in a directory: with and without an IOMMU, VFIO, iommufd, devices."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import pytest

from viommu.cli.check import Check, Outcome
from viommu.cli.device_checks import examine_devices

if TYPE_CHECKING:
    from pathlib import Path

ONE, TWO = "0000:03:00.0", "0000:04:00.0"


class Host:
    """A file system; everything that it is given is there from then on."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str, text: str = "") -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def device(
        self, address: str, group: int | None, *, driver: str | None = "vfio-pci", cdev: str = ""
    ) -> None:
        device = self.root / "sys/devices" / address
        device.mkdir(parents=True)
        if driver:
            bound = self.root / "sys/bus/pci/drivers" / driver
            bound.mkdir(parents=True, exist_ok=True)
            (bound / address).symlink_to(device)
            (device / "driver").symlink_to(bound)
        if group is not None:
            members = self.root / f"sys/kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(device)
            (device / "iommu_group").symlink_to(members.parent)
            self.file(f"dev/vfio/{group}")
        (device / "vfio-dev/vfio9").mkdir(parents=True)
        if cdev:
            self.file(f"sys/devices/{address}/vfio-dev/{cdev}/dev", "511:0")
            self.file(f"dev/vfio/devices/{cdev}")

    def check(self, name: str) -> Check:
        return next(check for check in examine_devices(self.root) if check.name == name)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def full(host: Host) -> Host:
    """A host that has everything, and two devices."""
    host.file("dev/vfio/vfio")
    host.file("dev/iommu")
    host.device(ONE, 2, cdev="vfio0")
    host.device(TWO, 3, cdev="vfio1")
    return host


def test_a_host_that_has_nothing(host: Host) -> None:
    checks = examine_devices(host.root)

    assert {check.outcome for check in checks} == {Outcome.ABSENT}
    assert all(check.remedy for check in checks)
    assert "dev/iommu is not there" in host.check("backend iommufd").found


def test_a_host_that_has_everything(full: Host) -> None:
    assert full.check("IOMMU").found == "2 groups of devices"
    for backend in ("type1", "iommufd"):
        check = full.check(f"backend {backend}")
        assert (check.outcome, check.found) == (Outcome.OK, f"can have {ONE}, {TWO}")


def test_a_host_without_a_device_for_us_says_how_to_give_one(host: Host) -> None:
    host.file("dev/vfio/vfio")
    host.file("sys/bus/pci/drivers/vfio-pci/bind")

    check = host.check("backend type1")

    assert (check.outcome, check.found) == (Outcome.ABSENT, "vfio-pci has no device")
    assert "driver_override" in check.remedy


def test_a_kernel_without_device_files_has_type1_only(host: Host) -> None:
    host.file("dev/vfio/vfio")
    host.file("dev/iommu")
    host.device(ONE, 2)

    assert host.check("backend type1").outcome is Outcome.OK
    found = host.check("backend iommufd").found
    assert found == f"can't have {ONE}: it has no file in /dev/vfio/devices"


@pytest.mark.parametrize(
    ("driver", "viable"), [("e1000e", False), ("pcieport", True), ("pci-stub", True), (None, True)]
)
def test_a_group_that_the_host_uses_too_is_no_use(
    host: Host, driver: str | None, viable: bool
) -> None:
    for file in ("dev/vfio/vfio", "dev/iommu"):
        host.file(file)
    host.device(ONE, 2, cdev="vfio0")
    host.device(TWO, 2, driver=driver)

    for backend in ("type1", "iommufd"):
        check = host.check(f"backend {backend}")
        assert (check.outcome is Outcome.OK) is viable
        if not viable:
            assert f"can't have {ONE}: its group is shared with {TWO} (e1000e)" in check.found


def test_a_device_without_a_group_is_no_use(host: Host) -> None:
    host.file("dev/vfio/vfio")
    host.device(ONE, None)

    assert "it is behind no IOMMU" in host.check("backend type1").found


@pytest.mark.parametrize(
    ("backend", "denied", "found"),
    [
        ("type1", "dev/vfio/vfio", "dev/vfio/vfio is not for user"),
        ("iommufd", "dev/iommu", "dev/iommu is not for user"),
        ("type1", "dev/vfio/2", "dev/vfio/2 is not for user"),
        ("iommufd", "dev/vfio/devices/vfio0", "dev/vfio/devices/vfio0 is not for user"),
    ],
)
def test_files_that_are_not_ours(
    host: Host, backend: str, denied: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("dev/vfio/vfio", "dev/iommu"):
        host.file(file)
    host.device(ONE, 2, cdev="vfio0")
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith(denied))

    check = host.check(f"backend {backend}")

    assert check.outcome is Outcome.ABSENT
    assert found in check.found


def test_one_device_that_can_be_had_is_enough(full: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("vfio/2"))

    assert full.check("backend type1").found == f"can have {TWO}"


def test_many_devices_are_counted(full: Host) -> None:
    for number in range(10):
        full.device(f"0000:10:{number:02x}.0", 10 + number)

    assert full.check("backend type1").found.endswith("0000:10:05.0 and 4 more")


@pytest.mark.parametrize(
    ("path", "outcome", "remedy"),
    [
        ("sys/module/vfio_pci/parameters", Outcome.OK, ""),
        ("sys/bus/pci/drivers/vfio-pci/bind", Outcome.OK, ""),
        (f"lib/modules/{platform.release()}/modules.builtin", Outcome.OK, ""),
        (f"lib/modules/{platform.release()}/modules.dep", Outcome.ABSENT, "modprobe vfio_pci"),
        (
            f"lib/modules/{platform.release()}/modules.other",
            Outcome.ABSENT,
            "use a kernel that comes with it",
        ),
    ],
)
def test_drivers(host: Host, path: str, outcome: Outcome, remedy: str) -> None:
    host.file(path, "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n")

    check = host.check("driver vfio_pci")

    assert (check.outcome, check.remedy) == (outcome, remedy)
