"""JSON objects in a stream of bytes, one a line, as QEMU's monitor and our agent speak."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["JsonLines"]


class JsonLines:
    """Takes bytes as they come and gives out objects; a line that is none is noise, left out."""

    def __init__(self) -> None:
        self._received = b""

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._received += data

    def take(self) -> dict[str, Any] | None:
        """Return the next object, or nothing if more has to be received first."""
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if not newline:
                return None
            self._received = rest
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                return message

    @property
    def rest(self) -> bytes:
        """What was received of a line that isn't complete."""
        return self._received
