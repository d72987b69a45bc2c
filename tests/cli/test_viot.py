from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from viommu.cli.exit_codes import ExitCode
from viommu.cli.main import cli
from viommu.vmm import Bdf, build_viot

if TYPE_CHECKING:
    from pathlib import Path

BUILD = ["viot", "--iommu", "00:05.0", "--endpoint", "00:06.0", "--endpoint", "00:07.0"]
TABLE = build_viot(Bdf(0, 5, 0), [Bdf(0, 6, 0), Bdf(0, 7, 0)])


def viommu(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_a_table_is_written(tmp_path: Path) -> None:
    result = viommu(*BUILD, "-o", str(tmp_path / "v"))

    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "v").read_bytes() == TABLE


def test_a_table_is_shown(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(TABLE)

    built, read = viommu(*BUILD), viommu("viot", "--show", str(tmp_path / "v"))

    assert built.exit_code == read.exit_code == ExitCode.OK
    assert built.stdout == read.stdout
    assert "VIOT, 112 bytes, 3 nodes" in read.stdout
    assert "virtio-iommu, PCI: 0000:00:05.0" in read.stdout
    assert "00:06.0 is endpoint 0x30\n00:07.0 is endpoint 0x38\n" in read.stdout


def test_a_bad_table_is_shown_and_fails(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(TABLE[:-1] + b"\1")

    result = viommu("viot", "--show", str(tmp_path / "v"))

    assert result.exit_code == ExitCode.FAILURE
    assert "problem: the bytes add up to 0x01" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*BUILD, "-o", "{}/no/such"], ExitCode.FAILURE, "no/such can't be written: No such file"),
        (["viot", "--show", "{}/big"], ExitCode.FAILURE, "more than 65536 bytes"),
        (["viot", "--show", "{}/no"], ExitCode.USAGE, "does not exist"),
        ([*BUILD, "--show", "{}/big"], ExitCode.USAGE, "give either"),
        (["viot", "--show", "{}/big", "-o", "x"], ExitCode.USAGE, "give either"),
    ],
)
def test_errors(arguments: list[str], code: ExitCode, message: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(TABLE + bytes(65536))

    result = viommu(*(argument.format(tmp_path) for argument in arguments))

    assert result.exit_code == code
    assert message in result.stderr
