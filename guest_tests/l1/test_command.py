"""The ``viommu`` command on a host that has devices to give."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest_tests.guest import pci
from guest_tests.l1.function import host_device
from guest_tests.l1.layout import APERTURE_BITS, EDU, GROUPED_EDU, MACHINES, NVME

if TYPE_CHECKING:
    from collections.abc import Iterator

_VIOMMU = (sys.executable, "-m", "viommu.cli.main")
_SECONDS = 120.0


def doctor() -> dict[str, Any]:
    """Return what the doctor says, by name."""
    answer = subprocess.run(
        [*_VIOMMU, "doctor", "--json"], check=False, capture_output=True, timeout=_SECONDS
    )
    return {check["name"]: check for check in json.loads(answer.stdout)["checks"]}


@pytest.fixture
def free() -> Iterator[None]:
    """No device is given to vfio-pci; afterwards, each is where the other tests left it."""
    mine = [path.name[5:] for path in pci.path(EDU).parent.glob("*:*")]
    mine = [bdf for bdf in mine if pci.driver(bdf) == "vfio-pci"]
    for bdf in mine:
        pci.unbind(bdf)
    yield
    for bdf in mine:
        pci.bind(bdf, "vfio-pci")


def test_the_doctor_says_what_is_missing_and_what_is_possible(machine: str, free: None) -> None:
    before = doctor()
    host_device(EDU)
    host_device(NVME)
    after = doctor()

    assert before["IOMMU"]["outcome"] == "ok"
    assert before["driver vfio_pci"]["outcome"] == "ok"
    assert before["backend type1"]["found"] == "vfio-pci has no device"
    assert after["backend type1"]["found"] == f"can have 0000:{EDU}, 0000:{NVME}"
    if "iommufd" in MACHINES[machine].backends:
        assert after["backend iommufd"]["found"] == f"can have 0000:{EDU}, 0000:{NVME}"
    else:
        assert after["backend iommufd"]["found"] == "/dev/iommu is not there"
    pci.unbind(NVME)


def test_a_server_says_which_backend_it_took_and_why(machine: str) -> None:
    host_device(EDU)
    with tempfile.TemporaryDirectory() as directory:
        command = [*_VIOMMU, "serve", "--dir", f"{directory}/v"]
        command += ["--endpoint", f"00:06.0=vfio,host=0000:{EDU}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        said = {}
        for line in server.stdout:
            if line.strip() == "ready":
                break
            name, _, value = line.strip().partition("  ")
            said[name] = value.strip()
        snapshot = subprocess.run(
            [*_VIOMMU, "inspect", f"{directory}/v"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        ).stdout
        server.send_signal(signal.SIGTERM)

        assert server.wait(_SECONDS) == 0
        server.stdout.close()
        assert list(Path(directory).iterdir()) == []
    assert (
        said["input range"] == f"[0x0, {1 << APERTURE_BITS:#x}), which is all that 00:06.0 reaches"
    )
    if "iommufd" in MACHINES[machine].backends:
        assert said["backend"] == "iommufd"
    else:
        assert said["backend"] == (
            "VFIO type1, because iommufd is out of reach: "
            "can't open /dev/iommu: No such file or directory"
        )
    assert f"0000:{EDU}" in snapshot


def test_a_device_that_the_host_uses_is_refused_with_what_to_do() -> None:
    pci.unbind(GROUPED_EDU)
    with tempfile.TemporaryDirectory() as directory:
        endpoint = f"00:06.0=vfio,host=0000:{GROUPED_EDU}"
        refused = subprocess.run(
            [*_VIOMMU, "serve", "--dir", f"{directory}/v", "--endpoint", endpoint],
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )

    assert refused.returncode == 1
    assert f"0000:{GROUPED_EDU} is driven by no driver" in refused.stderr
    assert "driver_override" in refused.stderr
