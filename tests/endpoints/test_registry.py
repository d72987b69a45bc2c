from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.endpoints import host_kind
from tests.endpoints.rig import Rig, make_rig
from viommu.endpoints.blk import BlkDevice
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.options import Running
from viommu.endpoints.registry import (
    KINDS,
    common_options,
    make_endpoint,
    parse_endpoint,
    running,
    without_common,
)
from viommu.errors import UsageError
from viommu.spec.virtio_blk import Feature
from viommu.virtio.pci import VirtioPciFunction

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def rig() -> Iterator[Rig]:
    with make_rig() as rig:
        yield rig


@pytest.mark.parametrize(
    ("description", "kind", "options"),
    [
        ("edu", "edu", {}),
        ("edu,hold=250", "edu", {"hold": 250}),
        ("blk,path=disk.img", "blk", {"path": Path("disk.img")}),
        (
            "blk,path=/a,,b=c,,,readonly=on,serial=x",
            "blk",
            {"path": Path("/a,b=c,"), "readonly": True, "serial": "x"},
        ),
        ("blk,readonly=off,path=d", "blk", {"path": Path("d"), "readonly": False}),
    ],
)
def test_descriptions(description: str, kind: str, options: dict[str, object]) -> None:
    assert parse_endpoint(description) == (kind, options)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("", r"no endpoint is called '': there are blk, edu, external"),
        ("nvme,path=x", r"no endpoint is called 'nvme': there are blk, edu"),
        ("edu,speed=1", r"edu has no option 'speed': there are hold"),
        ("edu,", r"edu has no option ''"),
        ("edu,hold", r"edu: hold needs a value \(how long"),
        ("edu,hold=", r"edu: hold needs a value"),
        ("edu,hold=1,hold=2", r"edu: hold is given twice"),
        ("edu,hold=soon", r"edu: hold=soon: expected milliseconds, 0 to 5000"),
        ("edu,hold=5001", r"hold=5001: expected milliseconds"),
        ("edu,hold=-1", r"hold=-1: expected milliseconds"),
        ("blk", r"blk needs path=\.\.\. \(the disk image"),
        ("blk,path=x,readonly=yes", r"readonly=yes: expected on or off"),
        ("nowhere.at.all:KIND", r"nowhere.at.all:KIND can't be loaded: No module named 'nowhere'"),
        ("tests.endpoints.own_kind:NONE", r"can't be loaded: .* has no attribute 'NONE'"),
        (":KIND", r"can't be loaded"),
        ("tests.endpoints.own_kind:NO_KIND", r"is 'no kind', which is no EndpointKind"),
        ("tests.endpoints.own_kind:KIND,x=y", r"KIND has no option 'x'"),
    ],
)
def test_mistakes_are_explained(description: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_endpoint(description)


def test_every_kind_and_option_has_help() -> None:
    for kind in KINDS.values():
        assert kind.help
        assert all(option.help for option in kind.options.values())


def test_makes_edu(rig: Rig) -> None:
    function = make_endpoint("edu,hold=20", "00:06.0", rig.memory, rig.dma, rig.loop)
    assert isinstance(function, EduFunction)
    assert (function.name, function.engine.hold_ms) == ("00:06.0", 20)


def test_makes_blk(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "a,b.img"
    path.write_bytes(bytes(512))
    description = f"blk,path={tmp_path}/a,,b.img,readonly=on,serial=s"
    function = make_endpoint(description, "00:07.0", rig.memory, rig.dma, rig.loop)
    assert isinstance(function, VirtioPciFunction)
    assert isinstance(function.device, BlkDevice)
    assert function.device.features >> Feature.RO & 1
    function.device.close()


def test_what_is_wrong_with_the_file_is_said(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        make_endpoint(f"blk,path={tmp_path}/none", "x", rig.memory, rig.dma, rig.loop)


def test_a_kind_of_somebody_else_is_named_by_its_module(rig: Rig) -> None:
    description = "tests.endpoints.own_kind:KIND"
    assert parse_endpoint(description) == (description, {})
    function = make_endpoint(description, "00:06.0", rig.memory, rig.dma, rig.loop)
    assert isinstance(function, EduFunction)
    assert function.engine.hold_ms == 7


def test_where_an_endpoint_runs_is_what_its_options_say() -> None:
    assert running("edu,hold=3,process=own") == Running.read({"process": "own"})
    assert not running("external").own


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("edu,hold-limit=3", "edu: hold-limit is for process=own"),
        ("edu,hold-policy=kill", "edu: hold-policy is for process=own"),
        ("edu,process=other", "edu: process=other: expected own"),
        ("external,process=own", "external has no option 'process'"),
    ],
)
def test_mistakes_about_processes_are_explained(description: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_endpoint(description)


@pytest.mark.parametrize(
    ("description", "kept"),
    [
        ("edu", "edu"),
        ("edu,process=own,hold=3,hold-limit=2,hold-policy=wait", "edu,hold=3"),
        ("blk,path=/a,,b=c,,,process=own,serial=x", "blk,path=/a,,b=c,,,serial=x"),
    ],
)
def test_what_is_left_for_the_process(description: str, kept: str) -> None:
    assert without_common(description) == kept


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("edu,process=own", "edu: process=own is for an endpoint behind an IOMMU"),
        ("external", "external is emulated by another process"),
    ],
)
def test_what_is_not_made_here(rig: Rig, description: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_endpoint(description, "00:06.0", rig.memory, rig.dma, rig.loop)


def test_a_device_of_the_host_has_nothing_in_common_with_what_is_emulated() -> None:
    assert common_options(host_kind.KIND) == {}
