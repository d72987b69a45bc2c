"""Fixtures: one boot for each kernel and mode, shared by all tests that don't end it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_tests.lab.bundles import cached_versions, fetch
from guest_tests.lab.kbuild import BUILT_KERNEL, build_kernel
from guest_tests.lab.kernels import Kernel, debian_kernel
from guest_tests.lab.l1_remote import RemoteTests
from guest_tests.lab.manifest import GUEST, KERNELS
from guest_tests.lab.qemu import choose_qemu
from guest_tests.lab.reports import refuse_skip
from guest_tests.lab.userland import Userland
from guest_tests.rig import MODES, Lab, Rig

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_CONSOLE_TAIL = 3000

KERNEL_PARAMETERS = [
    *KERNELS,
    pytest.param(BUILT_KERNEL, marks=pytest.mark.slow),  # takes minutes to build
]


def pytest_configure(config: pytest.Config) -> None:
    """Send the tests of ``l1`` into their machines."""
    config.pluginmanager.register(RemoteTests())


def pytest_report_header() -> list[str]:
    """Say which versions are in the lab's cache."""
    return [f"lab: {name} {version}" for name, version in cached_versions().items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here as those that boot a virtual machine."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.guest)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show console and server log below a failure; on CI a skipped test is a failure, too."""
    report = yield
    refuse_skip(report)
    arguments = item.funcargs if isinstance(item, pytest.Function) else {}
    rig = arguments.get("guest", arguments.get("rig"))
    if report.failed and isinstance(rig, Rig):
        report.sections.append(("guest console", rig.vm.console()[-_CONSOLE_TAIL:]))
        report.sections.append(("viommu serve", rig.server.log()[-_CONSOLE_TAIL:]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests that passed have measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")


@pytest.fixture(scope="session")
def lab() -> Lab:
    """QEMU and the guest's user space, fetched when the cache lacks them."""
    return Lab(choose_qemu(), Userland(fetch([GUEST])[GUEST.name]))


@pytest.fixture(scope="session", params=KERNEL_PARAMETERS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each kernel in turn."""
    return build_kernel() if request.param == BUILT_KERNEL else debian_kernel(request.param)


@pytest.fixture(scope="session")
def some_kernel() -> Kernel:
    """One kernel, for what doesn't depend on it."""
    return debian_kernel(next(iter(KERNELS)))


@pytest.fixture(scope="session", params=MODES)
def guest(
    request: pytest.FixtureRequest,
    lab: Lab,
    kernel: Kernel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    """A booted guest in each mode."""
    directory = tmp_path_factory.mktemp(f"{kernel.name}-{request.param}")
    with Rig(lab, kernel, MODES[request.param], directory) as rig:
        yield rig
