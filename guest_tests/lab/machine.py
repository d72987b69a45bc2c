"""Boot a kernel in QEMU and call functions in it.

The console and the status channel are two serial ports: what the kernel prints can't be
mistaken for a result. QEMU dies with the process that started it.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from guest_tests.lab.channel import (
    Channel,
    ChannelClosedError,
    ChannelRestartedError,
    ChannelTimeoutError,
)
from guest_tests.lab.errors import LostVMError
from guest_tests.lab.leash import leashed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from guest_tests.lab.kernels import Kernel
    from viommu.vmm.qemu_binary import Qemu

__all__ = ["BOOT_SECONDS", "CALL_SECONDS", "Image", "VirtualMachine"]

BOOT_SECONDS = 120.0
CALL_SECONDS = 60.0

_POWER_OFF_SECONDS = 20.0
_CONSOLE_TAIL = 4000
# Without hardware virtualisation every skipped instruction counts; a panic ends the machine.
_COMMAND_LINE = (
    "console=ttyS0 earlyprintk=ttyS0 ignore_loglevel oops=panic panic=-1 nokaslr mitigations=off "
    "tsc=reliable no_timer_check random.trust_cpu=on"
)


class Image(NamedTuple):
    """What is booted."""

    kernel: Kernel
    initramfs: Path
    command_line: str = ""


class VirtualMachine:
    """A guest that boots; a context manager that ends it. First call :meth:`wait_for_boot`.

    ``arguments`` are QEMU's for the devices under test (the lines of ``qemu.args``), ``smp`` the
    number of virtual CPUs; ``reboots`` lets the guest restart, which otherwise ends it. Files of
    the run (console, socket) are put into ``directory``.
    """

    def __init__(
        self,
        qemu: Qemu,
        image: Image,
        arguments: Sequence[str],
        directory: Path,
        *,
        smp: int = 1,
        reboots: bool = False,
    ) -> None:
        self.image = image
        self._directory = directory
        self._console = directory / "console.log"
        self._output = directory / "qemu.log"
        self._started = ""
        socket = directory / "status.sock"
        socket.unlink(missing_ok=True)
        self._channel = Channel(socket)
        command = [
            str(qemu.path),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            # /dev/kvm may exist and yet hang guests: emulation works everywhere.
            *("-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", str(smp)),
            *(() if reboots else ("-no-reboot",)),
            *("-serial", f"file:{self._console}"),
            *("-chardev", f"socket,id=status,path={socket}", "-serial", "chardev:status"),
            *("-kernel", str(image.kernel.image), "-initrd", str(image.initramfs)),
            *("-append", f"{_COMMAND_LINE} {image.command_line}"),
            *arguments,
        ]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                leashed(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._channel.watch(self.process.pid)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Power off when all is well, else kill."""
        if error is None:
            self.power_off()
        else:
            self.kill()

    def call(self, function: str, *, timeout: float = CALL_SECONDS, **arguments: Any) -> Any:
        """Call ``function`` (``module.name`` in ``guest_tests.guest``); return its result.

        Raises:
            GuestCallError: It raised.
            LostVMError: No answer within ``timeout`` seconds, or QEMU ended.
        """
        self.start(function, **arguments)
        return self.finish(timeout)

    def start(self, function: str, **arguments: Any) -> None:
        """Call ``function`` and don't wait; :meth:`finish` does, if there will be an end."""
        self._started = function
        try:
            self._channel.send(function, arguments)
        except ChannelClosedError as error:
            raise self._lost(f"{function} could not be called", error) from error

    def finish(self, timeout: float = CALL_SECONDS) -> Any:
        """Wait for the function that was started and return its result; raises as :meth:`call`."""
        try:
            return self._channel.result(time.monotonic() + timeout)
        except (ChannelClosedError, ChannelRestartedError, ChannelTimeoutError) as error:
            raise self._lost(f"{self._started} didn't answer", error, timeout) from error

    def wait_for_boot(self, timeout: float = BOOT_SECONDS) -> dict[str, Any]:
        """Wait until the guest's agent is up, also after a reboot; return what it says.

        Raises:
            LostVMError: QEMU ended, or the agent wasn't up in time.
        """
        try:
            return self._channel.boot(time.monotonic() + timeout)
        except (ChannelClosedError, ChannelTimeoutError) as error:
            raise self._lost("the guest wasn't up", error, timeout) from error

    def console(self) -> str:
        """Return what the guest's kernel has printed, over all its boots."""
        with suppress(FileNotFoundError):
            return self._console.read_text(errors="replace").replace("\r", "")
        return ""

    def output(self) -> str:
        """Return what QEMU itself has printed."""
        return self._output.read_text(errors="replace").strip()

    def power_off(self) -> None:
        """Let the guest's kernel switch off; QEMU ends.

        Raises:
            LostVMError: It didn't.
        """
        if self.process.poll() is not None:
            self.kill()
            return
        try:
            self.start("system.power_off")
            self.process.wait(_POWER_OFF_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise self._lost("the guest didn't switch off", error) from error
        finally:
            self.kill()

    def kill(self) -> None:
        """End QEMU at once (SIGKILL), if it still runs."""
        self.process.kill()
        self.process.wait()
        self._channel.close()

    def _lost(self, what: str, error: Exception, seconds: float = 0.0) -> LostVMError:
        if isinstance(error, ChannelTimeoutError):
            what = f"{what} within {seconds:g} s"
        elif isinstance(error, ChannelClosedError):
            status = self.process.wait(_POWER_OFF_SECONDS)
            what = f"{what}: QEMU ended with {status}"
        elif isinstance(error, ChannelRestartedError):
            what = f"{what}: the guest restarted"
        said = self.output()
        return LostVMError(f"{what}{': ' if said else ''}{said}", self.console()[-_CONSOLE_TAIL:])
