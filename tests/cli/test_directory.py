from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest

from viommu.cli.directory import ServerDirectory
from viommu.cli.exit_codes import CliError
from viommu.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def killed(directory: ServerDirectory) -> None:
    """What is left of a server's lock when its process is gone: the file, unlocked."""
    os.close(directory._lock)


def test_it_is_made_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with ServerDirectory(path) as directory:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        written = directory.write("viot.aml", b"table")
        assert written.read_bytes() == b"table"

    assert not path.exists()


def test_one_that_was_there_stays_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with ServerDirectory(tmp_path) as directory:
        directory.write("qemu.args", b"-m\n1G\n")
        assert names(tmp_path) == ["mine", "qemu.args", "viommu.pid"]

    assert names(tmp_path) == ["mine"]


def test_files_of_others_that_came_meanwhile_stay(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with ServerDirectory(path):
        (path / "notes").write_text("mine")

    assert names(path) == ["notes"]


def test_a_running_server_is_named(tmp_path: Path) -> None:
    with (
        ServerDirectory(tmp_path),
        pytest.raises(CliError, match=f"running server .process {os.getpid()}.: end that one"),
        ServerDirectory(tmp_path),
    ):
        pass

    with ServerDirectory(tmp_path):
        pass


def test_what_a_killed_server_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d"
    before = ServerDirectory(path)
    before.__enter__()
    before.write("viot.aml", b"old")
    before.write("qemu.args", b"old")
    for name in (
        *("00:05.0.sock", "00:09.0.export.sock", "control.sock"),
        *("other.sock", "00:05.0.socket", "00:05.0.import.sock"),
    ):
        bind(path / name)
    (path / "00:06.0.sock").write_text("a file, no socket")
    killed(before)

    with ServerDirectory(path) as directory:
        directory.write("viot.aml", b"new")
        assert names(path) == [
            "00:05.0.import.sock",
            "00:05.0.socket",
            "00:06.0.sock",
            "other.sock",
            "viommu.pid",
            "viot.aml",
        ]
    assert path.exists()


def test_a_directory_that_a_killed_server_made_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "d"
    before = ServerDirectory(path)
    before.__enter__()
    killed(before)

    with ServerDirectory(path):
        pass

    assert not path.exists()


def test_a_lock_that_is_going_away_is_not_taken(tmp_path: Path) -> None:
    """The one that ends removes its lock file after we opened it and before we lock it."""
    with ServerDirectory(tmp_path) as directory:
        stale = os.dup(directory._lock)
    try:
        directory = ServerDirectory(tmp_path)
        assert not directory._is_current(stale)
        (tmp_path / "viommu.pid").write_text("")
        assert not directory._is_current(stale)
    finally:
        os.close(stale)


def test_files_that_no_server_made_are_kept(tmp_path: Path) -> None:
    (tmp_path / "viot.aml").write_text("mine")
    with (
        ServerDirectory(tmp_path) as directory,
        pytest.raises(CliError, match=r"viot.aml exists and was not made by a server"),
    ):
        directory.write("viot.aml", b"ours")

    assert (tmp_path / "viot.aml").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "can't be used: No such file or directory; choose"),
        ("file", "can't be used: Not a directory"),
    ],
)
def test_one_that_cannot_be_had(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CliError, match=message), ServerDirectory(tmp_path / name):
        pass


def test_one_that_qemu_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="splits"), ServerDirectory(tmp_path / "a:b"):
        pass

    assert names(tmp_path) == []
