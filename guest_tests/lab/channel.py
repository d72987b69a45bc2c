"""The host's end of the status channel: calls into the guest, one JSON object a line."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

from guest_tests.json_lines import JsonLines
from guest_tests.lab.errors import GuestCallError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Channel", "ChannelClosedError", "ChannelRestartedError", "ChannelTimeoutError"]

_CHUNK = 65536


class ChannelClosedError(Exception):
    """The machine closed its end: QEMU is gone."""


class ChannelRestartedError(Exception):
    """The guest started again while it should have answered: its kernel crashed."""


class ChannelTimeoutError(Exception):
    """The guest said nothing for as long as was allowed."""


class Channel:
    """Waits at the UNIX socket ``path`` for QEMU's serial port, then speaks with the agent.

    Of a QEMU that ends before it connects only :meth:`watch` knows.
    """

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._process: int | None = None
        self._lines = JsonLines()
        self._calls = 0

    def watch(self, pid: int) -> None:
        """Notice the end of ``pid``, the child process that has the other end or is to have it."""
        self._process = os.pidfd_open(pid)

    def close(self) -> None:
        """Close everything; no further call."""
        self._listener.close()
        if self._process is not None:
            os.close(self._process)
            self._process = None
        if self._connection is not None:
            self._connection.close()

    def boot(self, deadline: float) -> dict[str, Any]:
        """Wait for the agent of a guest that starts (again); return what it says of itself.

        ``deadline`` is a :func:`time.monotonic` time.
        """
        while True:
            message = self._next(deadline)
            if "boot" in message:
                return dict(message["boot"])

    def result(self, deadline: float) -> Any:
        """Wait for the end of the last call and return its result.

        Raises:
            GuestCallError: The function raised.
        """
        while True:
            message = self._next(deadline)
            if "boot" in message:
                raise ChannelRestartedError
            if message.get("id") != self._calls:
                continue
            if "error" in message:
                raise GuestCallError(message["error"])
            return message["result"]

    def send(self, function: str, arguments: dict[str, Any]) -> None:
        """Call ``function`` (``module.name``) in the guest; :meth:`result` waits for its end."""
        if self._connection is None:
            raise ChannelClosedError
        self._calls += 1
        request = {"id": self._calls, "call": function, "arguments": arguments}
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError as error:
            raise ChannelClosedError from error

    def _next(self, deadline: float) -> dict[str, Any]:
        while (message := self._lines.take()) is None:
            self._receive(deadline)
        return message

    def _receive(self, deadline: float) -> None:
        source = (self._connection or self._listener).fileno()
        watched = [source] if self._process is None else [source, self._process]
        ready = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            raise ChannelTimeoutError
        if source not in ready:
            raise ChannelClosedError
        if self._connection is None:
            self._connection, _ = self._listener.accept()
            return
        try:
            data = self._connection.recv(_CHUNK)
        except ConnectionError as error:
            raise ChannelClosedError from error
        if not data:
            raise ChannelClosedError
        self._lines.feed(data)
