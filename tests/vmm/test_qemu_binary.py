"""Programs that answer as a QEMU would, or would not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from viommu.vmm.qemu_binary import Qemu, UnsuitableQemuError, find_qemu, probe_qemu

if TYPE_CHECKING:
    from pathlib import Path

ANSWER = """#!/bin/sh
case "$1" in
--version) echo 'QEMU emulator version {version} (Debian 1:{version}+ds-1)' ;;
-device) test "$2" = "{device},help" && echo "$2 options:" | sed s/,help// ;;
esac
exit 0
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def qemu(directory: Path, version: str = "11.1.3", device: str = "vfio-user-pci") -> Path:
    return program(directory / "qemu-system-x86_64", ANSWER.format(version=version, device=device))


def test_the_explicit_one_wins_then_the_environment_then_path(tmp_path: Path) -> None:
    explicit, environment, on_path = (tmp_path / name for name in ("a", "b", "c"))
    for directory in (explicit, environment, on_path):
        directory.mkdir()
        qemu(directory)
    name = "qemu-system-x86_64"
    environ = {"PATH": str(on_path), "VIOMMU_QEMU": str(environment / name)}

    assert find_qemu(str(explicit / name), environ) == explicit / name
    assert find_qemu(None, environ) == environment / name
    assert find_qemu(None, {"PATH": str(on_path)}) == on_path / name


@pytest.mark.parametrize(
    ("explicit", "environ", "message"),
    [
        (None, {}, "no qemu-system-x86_64 on PATH: install"),
        ("/no/such", {}, "--qemu names '/no/such'"),
        (None, {"VIOMMU_QEMU": "/no/such"}, "VIOMMU_QEMU names '/no/such'"),
    ],
)
def test_there_is_none(
    explicit: str | None, environ: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsuitableQemuError, match=message):
        find_qemu(explicit, environ | {"PATH": str(tmp_path)})


def test_it_is_asked_for_version_and_device(tmp_path: Path) -> None:
    found = probe_qemu(qemu(tmp_path))

    assert found == Qemu(tmp_path / "qemu-system-x86_64", (11, 1, 3), vfio_user=True)
    assert found.version_text == "11.1.3"
    found.require()


@pytest.mark.parametrize(
    ("version", "device", "message"),
    [
        ("10.1.0", "vfio-user-pci", "is QEMU 10.1.0 and 10.1.1 or newer is needed"),
        ("7.2.19", "edu", "is QEMU 7.2.19 and"),
        ("11.0.0", "edu", "has no vfio-user-pci device"),
    ],
)
def test_what_it_cannot_do(version: str, device: str, message: str, tmp_path: Path) -> None:
    found = probe_qemu(qemu(tmp_path, version, device))

    with pytest.raises(UnsuitableQemuError, match=message):
        found.require()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\necho hello\n", "does not answer like QEMU .exit code 0, 'hello'"),
        ("#!/bin/sh\necho oh no >&2; exit 1\n", "exit code 1, 'oh no'"),
        ("#!/no/such/interpreter\n", "can't be asked for its version"),
    ],
)
def test_it_is_no_qemu(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsuitableQemuError, match=message):
        probe_qemu(program(tmp_path / "q", text))
