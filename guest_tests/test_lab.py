"""The lab itself: what it promises to tests and to whoever looks for what went wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_tests.lab.bundles import fetch
from guest_tests.lab.cache import locked, staged
from guest_tests.lab.errors import GuestCallError, LostVMError
from guest_tests.lab.initramfs import build
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.manifest import GUEST, KERNELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

L1_TESTS = Path(__file__).with_name("l1") / "test_host_device.py"


@pytest.fixture
def machine(lab: Lab, some_kernel: Kernel, tmp_path: Path) -> Iterator[VirtualMachine]:
    """A guest without any device under test."""
    image = Image(some_kernel, build(some_kernel, lab.userland))
    machine = VirtualMachine(lab.qemu, image, ["-machine", "q35", "-m", "512M"], tmp_path)
    try:
        machine.wait_for_boot()
        yield machine
    finally:
        machine.kill()


def test_a_failing_call_is_told_from_a_lost_machine(machine: VirtualMachine) -> None:
    with pytest.raises(GuestCallError, match=r"No such file or directory: .*00:1e\.0"):
        machine.call("pci.group", bdf="00:1e.0")
    with pytest.raises(GuestCallError, match="doesn't offer"):
        machine.call("pci.path", bdf="00:1e.0")
    assert machine.call("system.kernel_log")

    with pytest.raises(LostVMError, match=r"panic didn't answer(.|\n)*sysrq triggered crash"):
        machine.call("system.panic")
    with pytest.raises(LostVMError, match="could not be called"):
        machine.call("system.kernel_log")


def test_a_machine_that_hangs_is_lost(machine: VirtualMachine) -> None:
    machine.process.send_signal(signal.SIGSTOP)

    with pytest.raises(LostVMError, match="didn't answer within 1 s"):
        machine.call("system.kernel_log", timeout=1)


def test_a_machine_that_does_not_start_is_lost_at_once(
    lab: Lab, some_kernel: Kernel, tmp_path: Path
) -> None:
    image = Image(some_kernel, build(some_kernel, lab.userland))
    machine = VirtualMachine(lab.qemu, image, ["-device", "no-such-thing"], tmp_path)
    try:
        with pytest.raises(LostVMError, match=r"up: QEMU ended with 1: .*no-such-thing.* not a"):
            machine.wait_for_boot()
    finally:
        machine.kill()


def test_a_host_that_does_not_boot_is_tried_once(lab: Lab, tmp_path: Path) -> None:
    tried, qemu = tmp_path / "tried", tmp_path / "qemu"
    qemu.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-kernel*) echo once >> {tried}; set -- -no-such-option ;; esac\n'
        f'exec {lab.qemu.path} "$@"\n'
    )
    qemu.chmod(0o755)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(L1_TESTS)],
        env=os.environ | {"VIOMMU_QEMU": str(qemu)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert tried.read_text() == "once\n"
    failed = re.findall("^FAILED ", done.stdout, re.MULTILINE)
    explained = re.findall(
        "^the guest .* ended with 1: .*-no-such-option", done.stdout, re.MULTILINE
    )
    assert len(explained) == len(failed) > 1


def test_what_a_test_started_dies_with_it() -> None:
    child = "import time; print('up', flush=True); time.sleep(600)"
    parent = (
        "import subprocess, sys, time\n"
        "from guest_tests.lab.leash import leashed\n"
        f"subprocess.Popen(leashed([sys.executable, '-c', {child!r}]))\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        # The pipe ends when the last process that holds it has ended: the child, too.
        assert process.stdout.read() == b""


def test_a_full_cache_needs_no_network(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fetch([GUEST, *KERNELS.values()])
    monkeypatch.setenv("PATH", "/nonexistent")  # no apt-get, so nothing can be fetched

    assert fetch([GUEST, *KERNELS.values()]) == before


def test_a_step_that_fails_changes_nothing(tmp_path: Path) -> None:
    def fill(name: str, count: int) -> None:
        with locked(tmp_path), staged(tmp_path / "tree") as stage:
            (stage / name).write_text(str(1 // count))

    fill("old", 1)
    with pytest.raises(ZeroDivisionError):
        fill("new", 0)
    assert [path.name for path in (tmp_path / "tree").iterdir()] == ["old"]
    fill("newer", 1)

    assert [path.name for path in (tmp_path / "tree").iterdir()] == ["newer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "tree"]


def test_what_a_killed_process_left_half_done_is_removed(tmp_path: Path) -> None:
    victim = (
        "import os, pathlib, signal\n"
        "from guest_tests.lab.cache import locked, staged\n"
        f"home = pathlib.Path({str(tmp_path)!r})\n"
        "with locked(home), staged(home / 'tree') as stage:\n"
        "    (stage / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", victim], check=False)
    assert list(tmp_path.glob("*/half"))
    with locked(tmp_path):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
