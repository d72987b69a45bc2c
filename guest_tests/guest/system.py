"""The guest as a whole: its kernel's log, its end."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

__all__ = ["kernel_log", "panic", "power_off", "reboot", "wait_for_log"]

_RECORD = re.compile(r"\d+,(?P<sequence>\d+),\d+,[^;]*;(?P<text>[^\n]*)")
_RECORD_SIZE = 8192


def kernel_log() -> list[str]:
    """Return the messages of the kernel since it started."""
    return [text for _, text in _records()]


def log_position() -> int:
    """Return the sequence number of the newest message, for :func:`wait_for_log`."""
    return max((sequence for sequence, _ in _records()), default=-1)


def wait_for_log(pattern: str, after: int = -1, timeout: float = 5.0) -> str:
    """Return the first message newer than ``after`` that ``pattern`` is found in.

    Raises:
        TimeoutError: None came within ``timeout`` seconds; shows those that did.
    """
    deadline = time.monotonic() + timeout
    while True:
        texts = [text for sequence, text in _records() if sequence > after]
        for text in texts:
            if re.search(pattern, text):
                return text
        if time.monotonic() > deadline:
            raise TimeoutError(f"no message like {pattern!r} among {texts[-20:]}")
        time.sleep(0.02)


def power_off() -> None:
    """Switch the machine off; the agent doesn't answer this call."""
    subprocess.run(["poweroff", "-f"], check=True)


def reboot() -> None:
    """Restart the machine; the agent doesn't answer this call, but boots again."""
    subprocess.run(["reboot", "-f"], check=True)


def panic() -> None:
    """Crash the kernel; nothing answers this call."""
    Path("/proc/sysrq-trigger").write_text("c")


def _records() -> list[tuple[int, str]]:
    """Return the kernel's messages with their sequence numbers, oldest first."""
    records: list[tuple[int, str]] = []
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(log, _RECORD_SIZE).decode(errors="replace")
            except BlockingIOError:
                return records
            except BrokenPipeError:
                continue  # overwritten while we read: the next read gives the oldest left
            found = _RECORD.match(record)
            if found:
                records.append((int(found["sequence"]), found["text"]))
    finally:
        os.close(log)
