"""Runs the tests of ``guest_tests/l1`` where they belong: inside the machine they name.

They are collected here as any others, with the machine as a parameter. When the turn of one
comes, the machine is booted if it isn't up; a worker in it runs the test and sends back what
pytest reports of it. A machine that is lost fails its test; the next test gets a new one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_tests.lab.errors import LabError
from guest_tests.lab.l1_machine import boot_l1
from guest_tests.lab.qemu import choose_qemu
from guest_tests.lab.reports import refuse_skip

if TYPE_CHECKING:
    from guest_tests.lab.machine import VirtualMachine

__all__ = ["RemoteTests"]

_TESTS = Path(__file__).parents[1] / "l1"
_TEST_SECONDS = 300.0
_CONSOLE_TAIL = 3000


class RemoteTests:
    """A pytest plugin; keeps one machine at a time."""

    def __init__(self) -> None:
        self._name = ""
        self._vm: VirtualMachine | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._unbootable: dict[str, LabError] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run a test of ours; the others are left to pytest."""
        name = _machine(item)
        if name is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        following = nextitem.nodeid if nextitem and _machine(nextitem) == name else None
        for report in self._reports(item, name, following):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if following is None:
            self._end()
        return True

    @pytest.hookimpl
    def pytest_unconfigure(self) -> None:
        """End what an interrupted session left."""
        self._end()

    def _reports(
        self, item: pytest.Item, name: str, following: str | None
    ) -> list[pytest.TestReport]:
        try:
            machine = self._booted(name)
            data = machine.call(
                "pytest.run", test=item.nodeid, following=following, timeout=_seconds(item)
            )
        except LabError as error:
            self._end()
            return [_failure(item, error)]
        reports = [pytest.TestReport._from_json(report) for report in data]
        for report in reports:
            refuse_skip(report)
            if report.failed:
                report.sections.append((f"console of {name}", machine.console()[-_CONSOLE_TAIL:]))
        return reports

    def _booted(self, name: str) -> VirtualMachine:
        """Return the machine ``name``, booted now unless it is up."""
        if self._vm is None or self._name != name:
            self._end()
            if name in self._unbootable:  # no need to wait for that again, test by test
                raise self._unbootable[name]
            self._name = name
            self._directory = tempfile.TemporaryDirectory(prefix="viommu-l1.")
            try:
                self._vm = boot_l1(choose_qemu(), name, Path(self._directory.name))
                self._vm.wait_for_boot()
            except LabError as error:
                self._unbootable[name] = error
                raise
        return self._vm

    def _end(self) -> None:
        vm, self._vm = self._vm, None
        directory, self._directory = self._directory, None
        if vm is not None:
            vm.kill()
        if directory is not None:
            directory.cleanup()


def _machine(item: pytest.Item) -> str | None:
    """Return which machine a test of ours is for."""
    if not item.path.is_relative_to(_TESTS):
        return None
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["machine"])


def _seconds(item: pytest.Item) -> float:
    """Return how long a test may take."""
    mark = item.get_closest_marker("seconds")
    return float(mark.args[0]) if mark else _TEST_SECONDS


def _failure(item: pytest.Item, error: LabError) -> pytest.TestReport:
    """Return the report of a test that had no machine to run on, or lost it."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=str(error),
        when="call",
    )
