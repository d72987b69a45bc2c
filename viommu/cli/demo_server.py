"""The server of the demo: ``viommu serve`` as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from viommu.cli.child import dies_with_us
from viommu.cli.exit_codes import CliError
from viommu.control import SOCKET_NAME, ControlClient

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["DemoServer"]

_PATIENCE: Final = 30.0  # seconds; a server that runs longer hangs, and is killed


class DemoServer:
    """``viommu serve`` with ``arguments`` in ``directory``; a context manager that ends it.

    Whatever happens, the process ends with the block, or with us.
    """

    def __init__(self, directory: Path, arguments: Sequence[str]) -> None:
        self.directory = directory
        self._words = ["serve", "--dir", str(directory), *arguments]
        self._log = (directory.parent / "server.log").open("w+")
        self._process: subprocess.Popen[str] | None = None
        self._watchdog: threading.Timer | None = None

    def start(self) -> int:
        """Start it, wait until it is ready, and return its process number.

        Raises:
            CliError: It ended before it was ready.
        """
        process = subprocess.Popen(  # noqa: S603  # ourselves
            [sys.executable, "-m", "viommu.cli.main", *self._words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=dies_with_us(),  # noqa: PLW1509  # this process has one thread yet
        )
        self._process = process
        self._watchdog = threading.Timer(_PATIENCE, process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        assert process.stdout is not None  # noqa: S101  # asked for above
        if "ready\n" not in process.stdout:
            raise CliError(f"the server ended before it was ready: {self.log or 'no reason given'}")
        return process.pid

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        assert self._process is not None  # noqa: S101  # the caller's order
        self._process.terminate()
        return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    @property
    def log(self) -> str:
        """What it wrote to its stderr so far."""
        self._log.seek(0)
        return self._log.read().strip()

    def snapshot(self) -> dict[str, Any]:
        """Ask its control socket for its state."""
        with ControlClient(self.directory / SOCKET_NAME) as client:
            return client.snapshot()
