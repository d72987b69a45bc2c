from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import UsageError
from viommu.vmm.bdf import Bdf
from viommu.vmm.qemu import (
    check_directory,
    device_argument,
    format_size,
    qemu_arguments,
    socket_name,
)


def sockets(*addresses: str, directory: str = "/run/v") -> dict[Bdf, Path]:
    bdfs = [Bdf.parse(address) for address in addresses]
    return {bdf: Path(directory) / socket_name(bdf) for bdf in bdfs}


def test_every_argument() -> None:
    arguments = qemu_arguments(
        sockets("00:05.0", "00:06.0"), Path("/run/v/viot.aml"), memory=512 << 20
    )

    assert arguments == [
        "-machine",
        "q35,memory-backend=mem",
        "-m",
        "512M",
        "-object",
        "memory-backend-memfd,id=mem,size=512M,share=on",
        "-acpitable",
        "file=/run/v/viot.aml",
        "-device",
        (
            '{"driver":"vfio-user-pci","id":"viommu-00-05-0","bus":"pcie.0","addr":"5.0",'
            '"socket":{"type":"unix","path":"/run/v/00:05.0.sock"}}'
        ),
        "-device",
        (
            '{"driver":"vfio-user-pci","id":"viommu-00-06-0","bus":"pcie.0","addr":"6.0",'
            '"socket":{"type":"unix","path":"/run/v/00:06.0.sock"}}'
        ),
    ]


def test_firmware_is_kept_from_disks_that_it_can_not_reach() -> None:
    arguments = qemu_arguments(
        sockets("00:05.0"), Path("/v/viot.aml"), memory=None, blocked_at_boot=True
    )

    assert arguments[2:4] == ["-boot", "strict=on"]


def test_without_memory_the_caller_shares_it() -> None:
    arguments = qemu_arguments(sockets("00:05.0"), Path("/v/viot.aml"), memory=None)

    assert arguments[:3] == ["-machine", "q35", "-acpitable"]
    assert not {"-m", "-object"} & set(arguments)


def test_functions_of_one_device_are_marked_in_order() -> None:
    arguments = qemu_arguments(
        sockets("00:06.1", "00:1a.0", "00:06.0"), Path("/v/viot.aml"), memory=None
    )

    devices = [json.loads(text) for text in arguments if text.startswith("{")]
    assert [(device["addr"], device.get("multifunction")) for device in devices] == [
        ("6.0", True),
        ("6.1", True),
        ("1a.0", None),
    ]


def test_a_comma_is_doubled_for_the_option_parser_and_not_in_json() -> None:
    directory = "/tmp/a,b"

    arguments = qemu_arguments(
        sockets("00:05.0", directory=directory), Path(directory) / "viot.aml", memory=None
    )

    assert "file=/tmp/a,,b/viot.aml" in arguments
    assert json.loads(arguments[-1])["socket"]["path"] == "/tmp/a,b/00:05.0.sock"


@pytest.mark.parametrize("memory", [0, -1, 4096, (1 << 20) + 1])
def test_memory_that_no_machine_has(memory: int) -> None:
    with pytest.raises(UsageError, match=f"guest memory of {memory} bytes"):
        qemu_arguments(sockets("00:05.0"), Path("/v/viot.aml"), memory=memory)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (512 << 20, "512M"),
        (1 << 30, "1G"),
        (1536 << 20, "1536M"),
        (1 << 40, "1T"),
        (4096, "4K"),
        (4097, "4097"),
        (0, "0"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_a_size_loses_nothing(size: int) -> None:
    text = format_size(size)
    units = {"K": 10, "M": 20, "G": 30, "T": 40}

    assert size == (int(text[:-1]) << units[text[-1]] if text[-1] in units else int(text))


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("/tmp/a:b", "splits file names at ':'"),
        ("/tmp/a\nb", "not printable"),
        ("/tmp/\udcff", "not printable"),
        ("/tmp/" + "d" * 83, "would have 108 bytes and Linux allows 107"),
        ("/tmp/" + "ü" * 50, "would have 125 bytes"),
    ],
)
def test_directories_that_cannot_be_told(directory: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_directory(Path(directory))


@pytest.mark.parametrize("directory", ["/tmp/a,b c", "/tmp/" + "d" * 82, "/tmp/ü"])
def test_directories_that_can(directory: str) -> None:
    check_directory(Path(directory))


def test_a_device_alone_goes_where_qemu_has_room() -> None:
    assert device_argument(Path("/run/a,b.sock")) == (
        '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/a,b.sock"}}'
    )
    assert json.loads(device_argument(Path("/run/x"), {"id": "disk", "addr": "7.0"})) == {
        "driver": "vfio-user-pci",
        "id": "disk",
        "addr": "7.0",
        "socket": {"type": "unix", "path": "/run/x"},
    }
