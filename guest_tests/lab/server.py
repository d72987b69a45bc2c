"""A ``viommu serve`` or ``viommu device`` for a virtual machine of the lab."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from guest_tests.lab.errors import LabError
from guest_tests.lab.leash import leashed
from viommu.control import SOCKET_NAME, ControlClient

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["ViommuDevice", "ViommuProcess", "ViommuServer"]

_STOP_SECONDS = 20.0


class ViommuProcess:
    """A ``viommu`` that serves, with these arguments; a context manager that ends it.

    What it prints as errors goes to ``log``. It dies with the process that started it.

    Raises:
        LabError: It ended before it was ready.
    """

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "viommu.cli.main", *arguments]
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                leashed(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self._process.stdout is not None
        if not any(line.strip() == "ready" for line in self._process.stdout):
            status = self._process.wait()
            self._process.stdout.close()
            raise LabError(
                f"viommu {arguments[0]} ended with {status} before it was ready: {self.log()}"
            )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def log(self) -> str:
        """Return what it has printed as errors."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def descriptors(self) -> Counter[str]:
        """Count what its open file descriptors refer to: names of files, or kinds."""
        found: Counter[str] = Counter()
        for entry in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found[re.sub(r":\[\d+\]$", "", entry.readlink().name)] += 1
        return found

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def stop(self) -> int:
        """End it with SIGTERM; return its exit status, which is 0 when all went well."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()


class ViommuDevice(ViommuProcess):
    """The stand-alone device of a description, ``KIND[,OPTION=VALUE...]``, on a socket.

    ``options`` go to ``viommu device`` as they are.
    """

    def __init__(self, description: str, socket: Path, *options: str) -> None:
        self.socket = socket
        log = socket.with_name(f"{socket.name}.log")
        super().__init__(log, "device", description, "--socket", str(socket), *options)


class ViommuServer(ViommuProcess):
    """The real server, in a process of its own.

    ``endpoints`` are what ``--endpoint`` takes, by address; ``options`` go to ``viommu serve`` as
    they are, and ``memory`` to ``--mem``.
    """

    def __init__(
        self,
        directory: Path,
        iommu: str,
        endpoints: Mapping[str, str],
        *options: str,
        memory: str | None = "512M",
    ) -> None:
        self.directory = directory
        arguments = ["serve", "--dir", str(directory), "--iommu", iommu, *options]
        arguments += ["--mem", memory] if memory else []
        for bdf, kind in endpoints.items():
            arguments += ["--endpoint", f"{bdf}={kind}"]
        super().__init__(directory.with_name(f"{directory.name}.log"), *arguments)
        # One for all questions, so that asking doesn't change the server's descriptors.
        self._control = ControlClient(directory / SOCKET_NAME)

    def qemu_arguments(self) -> list[str]:
        """Return the arguments that connect QEMU."""
        return (self.directory / "qemu.args").read_text().splitlines()

    def snapshot(self) -> dict[str, Any]:
        """Return its state, as ``viommu inspect --json`` does."""
        return self._control.snapshot()

    def stop(self) -> int:
        """End it with SIGTERM; return its exit status, which is 0 when all went well."""
        self._control.close()
        return super().stop()
