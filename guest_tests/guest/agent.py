"""The guest's end of the status channel: calls functions for the host, one JSON object a line.

Host to guest: ``{"id": 1, "call": "module.function", "arguments": {...}}``. Guest to host:
``{"boot": {...}}`` once, then ``{"id": 1, "result": ...}`` or ``{"id": 1, "error": "traceback"}``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import termios
import traceback
import tty
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

__all__ = ["find", "opened", "serve"]

_PACKAGE = "guest_tests.guest"


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Give both ends of the serial port at ``path``, for raw bytes."""
    port = os.open(path, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(port)
    termios.tcflush(port, termios.TCIFLUSH)
    with os.fdopen(port, "rb") as reader, os.fdopen(os.dup(port), "wb") as writer:
        yield reader, writer


def serve(
    reader: IO[bytes], writer: IO[bytes], look_up: Callable[[str], Callable[..., Any]]
) -> None:
    """Answer the calls that ``reader`` yields until it ends; ``look_up`` gives their functions."""
    _send(writer, {"boot": {"kernel": os.uname().release, "cpus": os.cpu_count()}})
    while line := reader.readline():
        try:
            request = json.loads(line)
        except ValueError:
            continue  # noise on the line from before we opened it
        _send(writer, {"id": request["id"]} | _answer(look_up, request))


def _answer(
    look_up: Callable[[str], Callable[..., Any]], request: dict[str, Any]
) -> dict[str, Any]:
    try:
        return {"result": look_up(request["call"])(**request["arguments"])}
    except Exception:  # noqa: BLE001 - whatever a test raises is its result
        return {"error": traceback.format_exc()}


def find(name: str, package: str = _PACKAGE) -> Callable[..., Any]:
    """Return the function ``module.function`` of a package, if its module offers it."""
    module_name, function_name = name.split(".")
    module = importlib.import_module(f"{package}.{module_name}")
    if function_name not in module.__all__:
        raise LookupError(f"{module_name} doesn't offer {function_name}")
    function: Callable[..., Any] = getattr(module, function_name)
    return function


def _send(writer: IO[bytes], message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    writer.flush()


def main() -> None:
    """Serve on the serial port that is the first argument."""
    with opened(sys.argv[1]) as (reader, writer):
        serve(reader, writer, find)


if __name__ == "__main__":
    main()
