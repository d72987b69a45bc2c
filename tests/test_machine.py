"""A machine: what it makes, tells and takes away again. Traffic is in tests/endpoints."""

from __future__ import annotations

import json
import socket
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pytest

from tests.endpoints import host_kind
from viommu.device import IommuConfig
from viommu.endpoints import registry
from viommu.errors import BackendError, UsageError
from viommu.ipc.client import ExportClient
from viommu.loop import Loop
from viommu.machine import Machine, MachineOptions
from viommu.testing.guest_ram import GuestRam
from viommu.testing.serving import LoopThread
from viommu.vfio_user.client import Client
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IOMMU = Bdf.parse("00:05.0")
EDU = Bdf.parse("00:06.0")
BLK = Bdf.parse("00:07.0")
DEV = Bdf.parse("00:08.0")


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def options(directory: Path, *endpoints: tuple[Bdf, str], bypass: bool = False) -> MachineOptions:
    return MachineOptions(directory, IOMMU, endpoints, IommuConfig(boot_bypass=bypass))


def sockets(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_socket())


def test_a_socket_for_each_function_until_it_is_closed(
    loop: Loop, tmp_path: Path, image: Path
) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu"), (BLK, f"blk,path={image}")))

    assert sockets(tmp_path) == ["00:05.0.sock", "00:06.0.sock", "00:07.0.sock"]
    for name in sockets(tmp_path):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / name))
    machine.close()
    machine.close()
    assert sockets(tmp_path) == []


def test_the_endpoint_id_is_the_pci_address(loop: Loop, tmp_path: Path) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu")))

    assert set(machine.iommu.endpoints) == {0x30}
    machine.close()


@pytest.mark.parametrize(
    ("endpoints", "message"),
    [
        ([(IOMMU, "edu")], "both the IOMMU and an endpoint"),
        ([(EDU, "edu"), (EDU, "edu")], "two endpoints"),
        ([(EDU, "edu"), (BLK, "floppy")], "floppy"),
        ([(EDU, "edu"), (BLK, "blk,path=/nonexistent/disk")], "/nonexistent/disk"),
    ],
)
def test_a_machine_that_can_not_be_made_leaves_nothing(
    loop: Loop, tmp_path: Path, endpoints: list[tuple[Bdf, str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Machine(loop, options(tmp_path, *endpoints))
    assert sockets(tmp_path) == []


def test_two_machines_do_not_share_a_disk(loop: Loop, tmp_path: Path, image: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = Machine(loop, options(tmp_path / "one", (BLK, f"blk,path={image}")))

    with pytest.raises(UsageError, match="in use"):
        Machine(loop, options(tmp_path / "two", (BLK, f"blk,path={image}")))
    one.close()
    Machine(loop, options(tmp_path / "two", (BLK, f"blk,path={image}"))).close()


@pytest.mark.parametrize("bypass", [False, True])
def test_the_snapshot_is_json_and_says_where_endpoints_are(
    loop: Loop, tmp_path: Path, bypass: bool
) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu"), bypass=bypass))

    snapshot = json.loads(json.dumps(machine.snapshot()))

    assert snapshot["iommu"]["bypass"] is bypass
    assert snapshot["domains"] == []
    (endpoint,) = snapshot["endpoints"]
    assert endpoint["id"] == 0x30
    assert endpoint["kind"] == ("bypass" if bypass else "blocked")
    assert endpoint["held"] == []
    assert snapshot["choices"]["unattached endpoints"] == endpoint["kind"]
    machine.close()


def test_the_snapshot_tells_domains_and_what_is_held(loop: Loop, tmp_path: Path) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu")))
    machine.iommu.handle(bytes((1, 0, 0, 0)) + bytes((7, 0, 0, 0, 0x30)) + bytes(11), 4)
    request = bytes((3, 0, 0, 0, 7, 0, 0, 0)) + bytes(8) + (0xFFF).to_bytes(8, "little")
    machine.iommu.handle(request + bytes(8) + bytes((1, 0, 0, 0)), 4)
    mapper = machine.iommu.endpoints[0x30].group.mapper
    fault = mapper.start_export_session()
    mapper.export(0x10, 0x20)

    snapshot = machine.snapshot()

    assert snapshot["domains"] == [
        {
            "id": 7,
            "kind": "translating",
            "endpoints": ["48"],
            "mappings": 1,
            "ranges": [[0, 0x1000, 0, "r-"]],
        }
    ]
    assert isinstance(snapshot["endpoints"], list)
    assert snapshot["endpoints"][0]["held"] == [[0x10, 0x20, 1]]
    mapper.release(0x10, 0x20)
    fault.close()
    machine.close()


def test_every_choice_is_said(loop: Loop, tmp_path: Path) -> None:
    machine = Machine(loop, options(tmp_path))

    said = {name for name, _ in machine.choices()}

    assert {"backend", "guest memory", "ring", "polling", "limits", "page sizes"} <= said
    machine.close()


# -- other processes


def test_an_endpoint_may_have_a_door_instead_of_a_socket(loop: Loop, tmp_path: Path) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu"), (DEV, "external")))

    assert sockets(tmp_path) == ["00:05.0.sock", "00:06.0.sock", "00:08.0.export.sock"]
    assert set(machine.iommu.endpoints) == {0x30, 0x40}
    endpoint = json.loads(json.dumps(machine.snapshot()))["endpoints"][1]
    assert endpoint["connected"] is None
    assert endpoint["exports"]["socket"] == str(tmp_path / "00:08.0.export.sock")
    said = dict(machine.choices())
    assert "00:08.0.export.sock; to have it let go: wait on" in said["backend of 00:08.0"]
    machine.close()
    assert sockets(tmp_path) == []


def test_an_endpoint_may_have_a_process_of_its_own(loop: Loop, tmp_path: Path) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu,process=own")))

    assert sockets(tmp_path) == ["00:05.0.sock", "00:06.0.sock"]
    endpoint = json.loads(json.dumps(machine.snapshot()))["endpoints"][0]
    assert endpoint["connected"] is False
    pid = endpoint["process"]["pid"]
    assert f"process {pid}, its own" in dict(machine.choices())["backend"]
    machine.close()


def test_a_door_leads_to_the_memory_of_the_iommu(loop: Loop, tmp_path: Path) -> None:
    machine = Machine(loop, options(tmp_path, (DEV, "external"), bypass=True))
    with (
        LoopThread(loop) as thread,
        GuestRam(1 << 20) as ram,
        Client(tmp_path / "00:05.0.sock") as vmm,
    ):
        ram.give(vmm)
        with ExportClient(tmp_path / "00:08.0.export.sock") as client:
            client.start_export_session().close()
            (region,) = client.export(0x3000, 16)
            client.memory.write(region.gpa, b"past the VMM")
        assert ram.memory.read(0x3000, 12) == b"past the VMM"
        thread.call(machine.close)


# -- devices of the host


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to devices of the kind ``dev``, which another package offers."""

    def entries(*, group: str) -> list[EntryPoint]:
        return [EntryPoint("dev", "tests.endpoints.host_kind:KIND", group)]

    monkeypatch.setattr(registry, "entry_points", entries)
    host_kind.LOG.clear()
    host_kind.OPENED.clear()
    return host_kind.LOG


def test_devices_of_the_host_are_opened_once_and_closed_behind_their_servers(
    loop: Loop, tmp_path: Path, log: list[str]
) -> None:
    machine = Machine(
        loop, options(tmp_path, (EDU, "edu"), (BLK, "dev,bits=39"), (DEV, "dev,bits=40"))
    )
    assert log == ["start", "open 00:07.0", "open 00:08.0"]
    assert sockets(tmp_path) == [f"00:0{n}.0.sock" for n in (5, 6, 7, 8)]

    machine.close()

    assert log[3:] == ["close 00:08.0", "close 00:07.0", "end"]
    assert machine.regions.regions() == []
    assert sockets(tmp_path) == []


def test_the_guest_is_offered_what_every_host_iommu_can_map(
    loop: Loop, tmp_path: Path, log: list[str]
) -> None:
    machine = Machine(loop, options(tmp_path, (BLK, "dev,bits=39"), (DEV, "dev,bits=40")))

    assert machine.iommu.config.input_range == (0, 1 << 39)
    said = dict(machine.choices())
    assert said["input range"] == "[0x0, 0x8000000000), which is all that 00:07.0 reaches"
    assert said["backend"] == "a host's IOMMU"
    machine.close()


def test_what_nobody_narrows_stays(loop: Loop, tmp_path: Path, log: list[str]) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu"), (DEV, "dev,bits=48")))

    said = dict(machine.choices())
    assert said["input range"] == "[0x0, 0x1000000000000)"
    assert said["backend of 00:06.0"] == "in this process (BasicMemoryMapper)"
    assert said["backend of 00:08.0"] == "a host's IOMMU"
    machine.close()


def test_a_device_that_reaches_nothing_of_what_is_offered_is_refused(
    loop: Loop, tmp_path: Path, log: list[str]
) -> None:
    config = IommuConfig(input_range=(1 << 40, 1 << 48))
    wanted = MachineOptions(tmp_path, IOMMU, [(DEV, "dev,bits=39")], config)

    with pytest.raises(UsageError, match=r"00:08\.0 reaches \[0x0, 0x8000000000\)"):
        Machine(loop, wanted)

    assert log[-2:] == ["close 00:08.0", "end"]


def test_a_host_that_refuses_a_device_leaves_nothing_open(
    loop: Loop, tmp_path: Path, log: list[str]
) -> None:
    with pytest.raises(BackendError, match="no such device"):
        Machine(loop, options(tmp_path, (EDU, "edu"), (BLK, "dev,bits=39"), (DEV, "dev,bits=13")))

    assert log == ["start", "open 00:07.0", "open 00:08.0", "close 00:07.0", "end"]
    assert sockets(tmp_path) == []


def test_devices_of_one_group_move_together(loop: Loop, tmp_path: Path, log: list[str]) -> None:
    machine = Machine(
        loop, options(tmp_path, (BLK, "dev,bits=39,group=1"), (DEV, "dev,bits=39,group=1"))
    )

    groups = {endpoint.group for endpoint in machine.iommu.endpoints.values()}

    assert len(groups) == 1
    machine.close()


def test_a_device_that_the_host_takes_back_is_served_no_more(
    loop: Loop, tmp_path: Path, log: list[str]
) -> None:
    machine = Machine(loop, options(tmp_path, (EDU, "edu"), (DEV, "dev,bits=39")))

    host_kind.OPENED[0].place.withdrawn()
    host_kind.OPENED[0].place.withdrawn()

    assert sockets(tmp_path) == ["00:05.0.sock", "00:06.0.sock"]
    assert json.loads(json.dumps(machine.snapshot()))["endpoints"][1]["connected"] is False
    machine.close()


def test_what_devices_of_the_host_reach_is_in_the_snapshot(
    loop: Loop, tmp_path: Path, log: list[str]
) -> None:
    machine = Machine(loop, options(tmp_path, (DEV, "dev,bits=39")))

    memory = json.loads(json.dumps(machine.snapshot()))["memory"]

    assert [region["name"] for region in memory["regions"]] == ["BAR of 00:08.0"]
    assert memory["targets"] == []
    machine.close()
    machine = Machine(loop, options(tmp_path, (EDU, "edu")))
    assert machine.snapshot()["memory"] is None
    machine.close()
