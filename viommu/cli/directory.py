"""The directory of a running server: one server has it, and leaves it as it was found."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from typing import TYPE_CHECKING, Final, Self

from viommu.cli.exit_codes import CliError
from viommu.control import SOCKET_NAME
from viommu.vmm import check_directory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["QEMU_ARGUMENTS", "VIOT", "ServerDirectory"]

VIOT: Final = "viot.aml"
QEMU_ARGUMENTS: Final = "qemu.args"

_LOCK: Final = "viommu.pid"
_CREATED: Final = "created by viommu"
_SOCKET: Final = re.compile(
    r"[0-9a-f]{2}:[0-9a-f]{2}\.[0-7](\.export)?\.sock|" + re.escape(SOCKET_NAME)
)


class ServerDirectory:
    """Takes ``path`` (absolute) for this process; a context manager.

    A lock file with our process number marks the directory as ours. Its lock
    ends with the process, however that ends, so what a killed server left
    behind is told from what a running one uses, and is removed. On exit every
    file and socket made here is removed, and the directory if it was made here.

    Raises:
        CliError: Another server has the directory, or it can't be used.
        UsageError: Nothing could be connected to sockets in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        self._created = False
        self._files: list[Path] = []

    def __enter__(self) -> Self:
        check_directory(self.path)
        try:
            self._take()
        except OSError as error:
            raise CliError(
                f"directory {self.path} can't be used: {error.strerror}; "
                "choose one that you can write to, in a directory that exists"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)
        # The lock file goes last, and while it is locked: whoever waits for the
        # lock finds that the file it opened is no longer the one in the directory.
        (self.path / _LOCK).unlink(missing_ok=True)
        if self._created:
            with contextlib.suppress(OSError):  # ENOTEMPTY: somebody else put something there
                self.path.rmdir()
        os.close(self._lock)

    def write(self, name: str, data: bytes) -> Path:
        """Make the file ``name``, to be removed on exit; return its path.

        Raises:
            CliError: There is such a file that no server made, or no room for it.
        """
        path = self.path / name
        try:
            with path.open("xb") as file:
                self._files.append(path)
                file.write(data)
        except FileExistsError as error:
            raise CliError(
                f"{path} exists and was not made by a server: remove it or choose another directory"
            ) from error
        except OSError as error:
            raise CliError(f"{path} can't be written: {error.strerror}") from error
        return path

    def _take(self) -> None:
        try:
            self.path.mkdir(mode=0o700)
            self._created = True
        except FileExistsError:
            pass
        while True:
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._take_lock(lock)
                if self._is_current(lock):
                    break
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        self._lock = lock
        if before := os.pread(lock, 256, 0).decode(errors="replace"):
            self._created |= _CREATED in before
            self._clean()
        note = f"{os.getpid()}\n" + (f"{_CREATED}\n" if self._created else "")
        os.ftruncate(lock, 0)
        os.pwrite(lock, note.encode(), 0)

    def _take_lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            owner = os.pread(lock, 32, 0).decode(errors="replace").partition("\n")[0] or "unknown"
            raise CliError(
                f"directory {self.path} is used by a running server (process {owner}): "
                "end that one or choose another directory"
            ) from error

    def _is_current(self, lock: int) -> bool:
        """Return whether the locked file is still in the directory, not an ending server's."""
        try:
            return os.path.samestat(os.fstat(lock), (self.path / _LOCK).stat())
        except FileNotFoundError:
            return False

    def _clean(self) -> None:
        """Remove what a killed server left: its sockets and files, and nothing else."""
        for path in self.path.iterdir():
            mode = path.lstat().st_mode
            if (stat.S_ISSOCK(mode) and _SOCKET.fullmatch(path.name)) or (
                stat.S_ISREG(mode) and path.name in {VIOT, QEMU_ARGUMENTS}
            ):
                path.unlink()
