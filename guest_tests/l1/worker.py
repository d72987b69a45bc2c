"""Runs tests for the machine outside, one at a time, on the status channel of the agent.

``pytest.run`` runs a test by its node ID and returns its reports in pytest's own
serialized form; the pytest outside takes them for those of its own item. Other
calls are functions of this package, as for :mod:`guest_tests.guest.agent`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from guest_tests.guest import agent

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

__all__ = ["Worker"]

_PACKAGE = "guest_tests.l1"
_POWER_OFF = 0x4321FEDC  # linux/reboot.h, LINUX_REBOOT_CMD_POWER_OFF

# The plugins that are installed belong to the machine outside; what is left out saves seconds.
_ARGUMENTS = (
    "guest_tests/l1",
    "--confcutdir=guest_tests/l1",
    "--override-ini=addopts=",
    "--import-mode=importlib",
    "-pno:cacheprovider",
    "-pno:terminal",
)


class Worker:
    """A pytest plugin: runs the tests that it is asked for instead of all."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader = reader
        self._writer = writer
        self._items: dict[str, pytest.Item] = {}
        self._reports: list[dict[str, Any]] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Serve until the other end of the channel is gone."""
        self._items = {item.nodeid: item for item in session.items}
        agent.serve(self._reader, self._writer, self._find)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a report for the reply."""
        self._reports.append(report._to_json())

    def _run(self, test: str, following: str | None) -> list[dict[str, Any]]:
        """Run ``test``; fixtures that ``following`` needs, too, are kept for it."""
        item = self._items[test]
        self._reports = []
        item.config.hook.pytest_runtest_protocol(
            item=item, nextitem=self._items[following] if following else None
        )
        return self._reports

    def _find(self, name: str) -> Callable[..., Any]:
        if name == "pytest.run":
            return self._run
        if name == "system.power_off":
            return _power_off
        return agent.find(name, _PACKAGE)


def _power_off() -> None:
    os.sync()
    ctypes.CDLL(None).reboot(_POWER_OFF)


def main() -> None:
    """Serve on the serial port that is the first argument."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with agent.opened(sys.argv[1]) as (reader, writer):
        sys.exit(pytest.main([*_ARGUMENTS], [Worker(reader, writer)]))


if __name__ == "__main__":
    main()
