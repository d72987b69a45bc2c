from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from viommu.cli import serving as module
from viommu.cli.exit_codes import CliError, CliUsageError
from viommu.cli.serving import (
    ServeOptions,
    endpoint_help,
    machine_options,
    report,
    serving,
)
from viommu.endpoints.registry import common_options, endpoint_kinds
from viommu.errors import UsageError
from viommu.loop import Loop
from viommu.vmm import Bdf, parse_viot

if TYPE_CHECKING:
    from collections.abc import Callable


def chosen(*arguments: str) -> dict[str, Any]:
    """Return what a command with the machine's options gets for these arguments."""
    found: dict[str, Any] = {}

    @click.command()
    @machine_options
    def command(**parameters: Any) -> None:
        found.update(parameters)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return found


def options(directory: Path, *arguments: str, memory: int | None = None) -> ServeOptions:
    return ServeOptions.make(directory, memory, chosen(*arguments))


def test_defaults(tmp_path: Path) -> None:
    machine = options(tmp_path).machine

    assert (machine.iommu, list(machine.endpoints)) == (Bdf(0, 5, 0), [])
    assert machine.config.boot_bypass is False
    assert machine.config.input_range == (0, 1 << 48)
    assert machine.config.page_size_mask == 0x40201000


def test_every_option_arrives(tmp_path: Path) -> None:
    found = options(
        tmp_path,
        *("--iommu", "00:03.0", "--endpoint", "00:04.0=edu", "--boot-bypass"),
        *("--page-sizes", "4K", "--aw-bits", "64", "--limit", "domains=3", "--limit", "mappings=9"),
        memory=1 << 30,
    )

    assert found.memory == 1 << 30
    machine = found.machine
    assert (machine.directory, machine.iommu) == (tmp_path, Bdf(0, 3, 0))
    assert list(machine.endpoints) == [(Bdf(0, 4, 0), "edu")]
    config = machine.config
    assert (config.boot_bypass, config.page_size_mask) == (True, 4096)
    assert config.input_range == (0, 1 << 64)
    assert (config.limits.domains, config.limits.mappings) == (3, 9)


def test_the_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert options(Path("a/../b")).machine.directory == tmp_path / "b"


@pytest.mark.parametrize(
    ("limit", "kind", "message"),
    [
        ("cookies=1", CliUsageError, "there is no limit 'cookies': there are domains, "),
        ("domains=0", UsageError, "limit domains must be positive"),
    ],
)
def test_limits_that_are_none(
    limit: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        options(tmp_path, "--limit", limit)


@pytest.mark.parametrize(
    ("arguments", "strict"), [((), True), (("--boot-bypass",), False)], ids=["blocked", "bypass"]
)
def test_files_are_there_within_the_block(
    arguments: tuple[str, ...], strict: bool, tmp_path: Path
) -> None:
    path = tmp_path / "d"
    with contextlib.closing(Loop()) as loop, serving(loop, options(path, *arguments)) as server:
        written = (path / "qemu.args").read_text().splitlines()
        assert written == server.qemu_arguments
        assert ("strict=on" in written) == strict
        assert (path / "viot.aml").exists()
        assert (path / "00:05.0.sock").is_socket()
        assert (path / "control.sock").is_socket()

    assert not path.exists()


def test_a_device_of_another_process_is_in_the_table_and_not_on_the_command_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "d"
    wanted = options(path, "--endpoint", "00:06.0=edu", "--endpoint", "00:09.0=external")
    with contextlib.closing(Loop()) as loop, serving(loop, wanted) as server:
        arguments = "\n".join(server.qemu_arguments)
        assert "00:06.0.sock" in arguments
        assert "00:09.0" not in arguments
        assert (path / "00:09.0.export.sock").is_socket()
        table = parse_viot((path / "viot.aml").read_bytes())
        assert sorted(table.endpoints.values()) == [0x30, 0x48]

    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.EMFILE, "Too many open files"),
            "the server can't start: Too many open files; raise the limit with ulimit -n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/d.img"),
            "/d.img can't be opened: Permission denied; check that it exists",
        ),
    ],
)
def test_what_the_host_refuses_is_told_and_nothing_is_left(
    error: OSError, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "Machine", refuse)
    with (
        contextlib.closing(Loop()) as loop,
        pytest.raises(CliError, match=message),
        serving(loop, options(tmp_path / "d")),
    ):
        pass

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "said"),
    [(512 << 20, "512M, shared by QEMU as a memfd"), (None, "not said with --mem; give QEMU -obj")],
)
def test_everything_chosen_is_printed(
    memory: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = options(tmp_path / "d", "--endpoint", "00:06.0=edu", memory=memory)
    with contextlib.closing(Loop()) as loop, serving(loop, wanted) as server:
        report(server)
        choices = server.machine.choices()

    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["virtio-iommu 00:05.0", "endpoint 00:06.0 edu"]
    assert lines[2].startswith(f"memory {said}")
    assert [f"{name} {value}" for name, value in choices] == lines[3:-1]
    assert lines[-1].startswith(f"directory {tmp_path}/d: ")


def test_it_can_be_printed_apart_from_a_guests_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(Loop()) as loop, serving(loop, options(tmp_path / "d")) as server:
        report(server, err=True)

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "virtio-iommu" in captured.err


def test_help_names_every_kind_of_endpoint_and_its_options() -> None:
    text = endpoint_help()

    for name, kind in endpoint_kinds().items():
        assert f"  {name}: {kind.help}" in text
        assert all(f"{option}=..." in text for option in kind.options)
        assert all(f"{option}=..." in text for option in common_options(kind))


def test_a_directory_is_asked_for_before_a_disk_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server must not touch what the first one uses."""
    made: list[Callable[..., object]] = []
    monkeypatch.setattr(module, "Machine", made.append)
    wanted = options(tmp_path / "d" / "no")
    with (
        contextlib.closing(Loop()) as loop,
        pytest.raises(CliError, match=os.strerror(errno.ENOENT)),
        serving(loop, wanted),
    ):
        pass

    assert made == []
