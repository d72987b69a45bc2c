"""Each question with the answer yes, and with the answer no."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import platform
import resource
import sys
import tempfile
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from viommu.cli import host_checks
from viommu.cli.host_checks import Outcome, examine_host

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.cli.host_checks import Check

NAMES = [
    "python",
    "kernel",
    "package click",
    "package linuxfd",
    "package rich",
    "package sortedcontainers",
    "memfd",
    "eventfd",
    "unix sockets",
    "open files",
    "qemu",
    "/dev/kvm",
    "IOMMU",
    "driver vfio_pci",
    "driver vfio_iommu_type1",
    "driver iommufd",
    "backend type1",
    "backend iommufd",
    "locked memory",
]


def check(name: str, qemu: str | None = "/no/such") -> Check:
    return next(check for check in examine_host(qemu) if check.name == name)


def test_every_question_is_answered_and_what_is_wrong_has_a_remedy() -> None:
    checks = examine_host("/no/such")

    assert [check.name for check in checks] == NAMES
    assert all((check.outcome is Outcome.OK) == (not check.remedy) for check in checks)


def test_what_runs_the_tests_is_there() -> None:
    outcomes = {check.name: check.outcome for check in examine_host("/no/such")}

    assert {outcomes[name] for name in NAMES[:9]} == {Outcome.OK}


def refuse(number: int) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))

    assert check("python").remedy == "install Python 3.11 or newer"


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    system = SimpleNamespace(system="Plan9", release="4", machine="mips")
    monkeypatch.setattr(platform, "uname", lambda: system)

    assert (host_checks._linux().outcome, host_checks._linux().found) == (
        Outcome.MISSING,
        "Plan9 4, mips",
    )


@pytest.mark.parametrize("name", ["linuxfd", "rich"])
def test_a_package_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package == name:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)

    found = check(f"package {name}")
    assert (found.outcome, found.found) == (Outcome.MISSING, "not installed")
    assert ("C compiler" in found.remedy) == (name == "linuxfd")


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "linuxfd", None)

    assert "does not load" in check("package linuxfd").found


@pytest.mark.parametrize(
    ("name", "where", "function"),
    [
        ("memfd", os, "memfd_create"),
        ("memfd", fcntl, "fcntl"),
        ("eventfd", os, "eventfd"),
        ("unix sockets", tempfile, "TemporaryDirectory"),
    ],
)
def test_what_the_kernel_refuses(
    name: str, where: object, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, function, refuse(errno.EPERM))

    found = check(name)
    assert found.outcome is Outcome.MISSING
    assert "Operation not permitted" in found.found


@pytest.mark.parametrize(
    ("name", "limit", "value", "outcome"),
    [
        ("open files", resource.RLIMIT_NOFILE, 64, Outcome.MISSING),
        ("open files", resource.RLIMIT_NOFILE, 1024, Outcome.OK),
        ("locked memory", resource.RLIMIT_MEMLOCK, 8 << 20, Outcome.ABSENT),
        ("locked memory", resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY, Outcome.OK),
    ],
)
def test_limits(
    name: str, limit: int, value: int, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (value, value) if which == limit else real(which)
    )

    assert check(name).outcome is outcome


def fake_qemu(path: Path, version: str) -> str:
    path.write_text(
        f"#!/bin/sh\necho QEMU emulator version {version}; echo vfio-user-pci options:\n"
    )
    path.chmod(0o755)
    return str(path)


def test_qemu(tmp_path: Path) -> None:
    found = check("qemu", fake_qemu(tmp_path / "q", "11.1.3"))
    assert (found.outcome, found.found) == (
        Outcome.OK,
        f"11.1.3 with vfio-user-pci, {tmp_path}/q",
    )

    found = check("qemu", fake_qemu(tmp_path / "q", "7.2.0"))
    assert found.outcome is Outcome.MISSING
    assert found.remedy.startswith("install it")

    assert check("qemu", "/no/such").remedy == "correct the path"


@pytest.mark.parametrize(
    ("there", "ours", "outcome", "found"),
    [
        (True, True, Outcome.OK, "there; "),
        (True, False, Outcome.ABSENT, "not for user"),
        (False, False, Outcome.ABSENT, "not there; "),
    ],
)
def test_kvm(
    there: bool, ours: bool, outcome: Outcome, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _: there)
    monkeypatch.setattr(os, "access", lambda *_: ours)

    kvm = host_checks._kvm()

    assert (kvm.name, kvm.outcome) == ("/dev/kvm", outcome)
    assert found in kvm.found
    assert bool(kvm.remedy) is not (outcome is Outcome.OK)
