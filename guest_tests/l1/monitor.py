"""The monitor of the QEMU that runs this machine: plug and unplug devices from inside.

Source: QEMU's docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import os
import select
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from guest_tests.guest import pci
from guest_tests.json_lines import JsonLines
from guest_tests.l1.layout import MONITOR

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Monitor"]

_TIMEOUT: Final = 30.0
_FORGET: Final = b"\xff"  # no part of any JSON: the parser starts anew


class Monitor:
    """A session with QEMU; a context manager."""

    def __init__(self) -> None:
        (port,) = pci.path(MONITOR).glob("**/tty/ttyS*")
        self._fd = os.open(Path("/dev") / port.name, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        tty.setraw(self._fd)
        self._lines = JsonLines()  # the end of the greeting is none of them
        self._events: list[dict[str, Any]] = []
        self._commands = 0
        # The port has echoed the greeting: have it forgotten.
        os.write(self._fd, _FORGET)
        self._ask("qmp_capabilities")  # refused if an earlier session has done it

    def execute(self, command: str, **arguments: Any) -> Any:
        """Carry out a command and return what it returns.

        Raises:
            AssertionError: QEMU refuses.
        """
        answer = self._ask(command, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def wait_for(self, event: str, **data: Any) -> None:
        """Wait for ``event`` with at least this ``data``; earlier events are dropped.

        Raises:
            TimeoutError: It didn't come.
        """
        deadline = time.monotonic() + _TIMEOUT
        while True:
            message = self._events.pop(0) if self._events else self._next(deadline)
            if message.get("event") == event and data.items() <= message["data"].items():
                return

    def close(self) -> None:
        """End the session."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._commands += 1
        request = {"execute": command, "arguments": arguments, "id": self._commands}
        os.write(self._fd, json.dumps(request).encode())
        deadline = time.monotonic() + _TIMEOUT
        while True:
            message = self._next(deadline)
            if message.get("id") == self._commands:
                return message
            if "event" in message:
                self._events.append(message)

    def _next(self, deadline: float) -> dict[str, Any]:
        while (message := self._lines.take()) is None:
            self._receive(deadline)
        return message

    def _receive(self, deadline: float) -> None:
        if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"QEMU said nothing more than {self._lines.rest!r}")
        self._lines.feed(os.read(self._fd, 65536))
