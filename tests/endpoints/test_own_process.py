"""The same endpoints in processes of their own: the same tests, and the end of a process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.endpoints.test_chain import (  # noqa: F401 - tests run here too, with these fixtures
    DISK,
    DISK_SIZE,
    DOMAIN,
    EDU,
    IOMMU,
    IOVA,
    Guest,
    test_a_disk_behind_the_iommu,
    test_a_disk_reaches_only_what_was_mapped,
    test_an_endpoint_that_leaves_has_released,
    test_dma_both_ways,
    test_stray_dma_is_blocked_and_reported,
    test_two_endpoints_share_a_domain,
)
from viommu.endpoints.edu_registers import Result
from viommu.errors import UsageError, ViommuError
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.spec import pci
from viommu.spec.virtio_blk import RequestType
from viommu.spec.virtio_blk import Status as BlkStatus
from viommu.spec.virtio_iommu import Status
from viommu.testing.blk_driver import BlkDriver
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE
from viommu.testing.iommu_driver import MappedDma, unmap_request
from viommu.testing.serving import LoopThread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.vmm import Bdf

PATIENCE = 60  # seconds until a test that waits for a process fails


class Served:
    """A machine whose loop runs in a thread, and what is known of its processes."""

    def __init__(self, directory: Path, *endpoints: tuple[Bdf, str]) -> None:
        self.directory = directory
        self.loop = Loop()
        try:
            self.machine = Machine(self.loop, MachineOptions(directory, IOMMU, endpoints))
        except BaseException:
            self.loop.close()
            raise
        self.thread = LoopThread(self.loop)

    def __enter__(self) -> Self:
        self.thread.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.thread.call(self.machine.close)
        self.thread.__exit__(*exc)
        self.loop.close()

    def endpoint(self, bdf: Bdf) -> dict[str, Any]:
        """What a snapshot says of an endpoint."""
        snapshot: dict[str, Any] = self.thread.call(self.machine.snapshot)
        return next(e for e in snapshot["endpoints"] if e["bdf"] == str(bdf))

    def pid(self, bdf: Bdf) -> int:
        pid = self.endpoint(bdf)["process"]["pid"]
        assert isinstance(pid, int)
        return pid

    def kill(self, bdf: Bdf) -> None:
        """Have the process of an endpoint end, and wait until the server has noticed."""
        pidfd = os.pidfd_open(self.pid(bdf))
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert has_ended(pidfd)
        os.close(pidfd)
        for _ in range(3):
            self.thread.call(lambda: None)


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], PATIENCE)[0])


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="viommu-") as name:
        yield Path(name)


@pytest.fixture
def image(directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture
def both(directory: Path, image: Path) -> Iterator[Served]:
    """Both endpoints in processes of their own."""
    endpoints = (EDU, "edu,process=own"), (DISK, f"blk,path={image},process=own")
    with Served(directory, *endpoints) as served:
        yield served


@pytest.fixture
def guest(both: Served) -> Iterator[Guest]:
    with contextlib.ExitStack() as stack:
        yield Guest(both.directory, stack)


def test_it_says_which_process_it_is(both: Served, guest: Guest) -> None:
    edu, disk = both.endpoint(EDU), both.endpoint(DISK)

    assert edu["process"] == {"pid": both.pid(EDU), "starts": 1, "ended": None}
    assert edu["process"]["pid"] != disk["process"]["pid"] != os.getpid()
    assert edu["exports"]["client"]["pid"] == edu["process"]["pid"]
    assert edu["device"]["state"] == "alive"
    assert edu["backend"] == (
        f"export session of process {both.pid(EDU)}, its own; to have it let go: kill it after 8 s"
    )
    assert {"IOMMU faults", "exports", "fault reports", "deaths"} <= set(edu["counters"])


def test_a_terminal_does_not_end_it_before_the_server(both: Served) -> None:
    pid = both.pid(EDU)

    assert os.getpgid(pid) == pid != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGHUP)
    assert both.pid(EDU) == pid


def test_it_has_no_file_of_the_server(both: Served) -> None:
    """What it inherits: three standard files, and two sockets."""
    kinds = [str(fd.readlink()) for fd in Path(f"/proc/{both.pid(EDU)}/fd").iterdir()]

    assert sum(kind.startswith("socket:") for kind in kinds) == 2
    assert len([kind for kind in kinds if not kind.startswith(("socket:", "anon_inode:"))]) <= 3


# -- the end of a process


def test_a_process_that_dies_has_released_what_it_held(directory: Path) -> None:
    with Served(directory, (EDU, "edu,process=own")) as served, contextlib.ExitStack() as stack:
        guest = Guest(directory, stack)
        guest.attach(EDU)
        edu = guest.edu()
        guest.map(IOVA, guest.page())
        edu.hold(5000)
        edu.start_write(IOVA, 64)
        (unmap,) = guest.iommu.submit(unmap_request(DOMAIN, IOVA, PAGE))
        with pytest.raises(TimeoutError):
            guest.iommu.wait(unmap, 0.02)
        served.kill(EDU)

        assert guest.iommu.wait(unmap).status == Status.OK
        ended = served.endpoint(EDU)
        assert ended["process"] == {"pid": None, "starts": 1, "ended": "killed by SIGKILL"}
        assert ended["held"] == []
        assert ended["backend"].startswith("export session of no process now")
        # The guest goes on with the rest, and sees ones where the device was.
        guest.map(IOVA, guest.page())
        assert edu.pci.read(0, 0, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("reset", ["function level", "system"])
def test_a_reset_starts_another_process(directory: Path, reset: str) -> None:
    with Served(directory, (EDU, "edu,process=own")) as served, contextlib.ExitStack() as stack:
        guest = Guest(directory, stack)
        guest.attach(EDU)
        edu = guest.edu()
        guest.map(IOVA, guest.page(b"still there"))
        before = served.pid(EDU)
        control = edu.pci.capability(pci.CAP_ID_EXPRESS) + pci.EXP_DEVCTL
        served.kill(EDU)
        if reset == "system":
            edu.pci.client.reset()
        else:
            edu.pci.config_write(control, pci.EXP_DEVCTL_FLR, 2)
        edu = EduDriver(edu.pci.client)

        assert edu.read_memory(IOVA, 11) == Result.OK
        assert served.pid(EDU) != before
        assert served.endpoint(EDU)["process"]["starts"] == 2
        edu.close()


def test_requests_of_a_disk_whose_process_died_fail(directory: Path) -> None:
    image = directory / "disk"
    image.write_bytes(bytes(DISK_SIZE))
    endpoints = (EDU, "edu"), (DISK, f"blk,path={image},process=own")
    with Served(directory, *endpoints) as served, contextlib.ExitStack() as stack:
        guest = Guest(directory, stack)
        guest.attach(DISK)
        disk = guest.disk(MappedDma(guest.iommu, DOMAIN, IOVA))
        assert disk.read(0, 1) == bytes(512)
        served.kill(DISK)

        assert disk.request(RequestType.FLUSH) == BlkStatus.IOERR
        assert served.endpoint(DISK)["device"]["state"] != "alive"
        disk.virtio.reset()
        disk = BlkDriver(disk.virtio.pci.client, disk.dma)
        assert disk.read(0, 1) == bytes(512)
        disk.close()


def test_one_that_does_not_let_go_is_killed(directory: Path) -> None:
    description = "edu,process=own,hold-limit=0.1"
    with Served(directory, (EDU, description)) as served, contextlib.ExitStack() as stack:
        guest = Guest(directory, stack)
        guest.attach(EDU)
        edu = guest.edu()
        guest.map(IOVA, guest.page())
        edu.hold(5000)
        edu.start_write(IOVA, 64)

        assert guest.iommu.unmap(DOMAIN, IOVA, PAGE) == Status.OK
        assert served.endpoint(EDU)["process"]["ended"] == "killed by SIGKILL"


def test_under_wait_it_may_hold_on(directory: Path) -> None:
    description = "edu,process=own,hold-limit=0.01,hold-policy=wait"
    with Served(directory, (EDU, description)) as served, contextlib.ExitStack() as stack:
        guest = Guest(directory, stack)
        guest.attach(EDU)
        edu = guest.edu()
        guest.map(IOVA, guest.page())
        edu.hold(100)
        edu.start_write(IOVA, 64)

        assert guest.iommu.unmap(DOMAIN, IOVA, PAGE) == Status.OK
        assert edu.wait() == Result.OK
        assert served.endpoint(EDU)["process"]["ended"] is None


# -- beginning and end of the server


def test_a_file_that_can_not_be_used_is_said_as_always(directory: Path) -> None:
    with pytest.raises(UsageError, match=r"00:07\.0: .*/none: can't open the disk: No such file"):
        Served(directory, (DISK, f"blk,path={directory}/none,process=own"))


def test_without_processes_there_is_no_endpoint(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(ViommuError, match=r"00:06\.0.*no process for it"):
        Served(directory, (EDU, "edu,process=own"))


def test_the_process_ends_with_its_endpoint(directory: Path) -> None:
    with Served(directory, (EDU, "edu,process=own")) as served:
        pidfd = os.pidfd_open(served.pid(EDU))

    # It was waited for, so it is not even a zombie.
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, 0)
    os.close(pidfd)


SERVER = """
import sys
from pathlib import Path
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.vmm import Bdf

directory = Path(sys.argv[1])
endpoints = [(Bdf.parse("00:06.0"), "edu,process=own")]
loop = Loop()
machine = Machine(loop, MachineOptions(directory, Bdf.parse("00:05.0"), endpoints))
print(machine.snapshot()["endpoints"][0]["process"]["pid"], flush=True)
loop.run()
"""


def test_the_process_ends_with_its_server(directory: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pidfd = os.pidfd_open(int(server.stdout.readline()))
        server.kill()
    assert has_ended(pidfd)
    os.close(pidfd)
