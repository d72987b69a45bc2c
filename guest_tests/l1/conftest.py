"""Which machines and backends a test is for; the same seen from inside and outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest_tests.l1.bench import Bench
from guest_tests.l1.layout import MACHINES

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure(config: pytest.Config) -> None:
    """Register our markers."""
    config.addinivalue_line("markers", "iommufd: needs a machine that has it")
    config.addinivalue_line("markers", "mock: needs a machine with iommufd's mock of an IOMMU")
    config.addinivalue_line("markers", "bridges: lets devices below a bridge change domains")
    config.addinivalue_line("markers", "seconds(limit): may take longer than others do")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each machine that it is for, and with each backend if it asks for one."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    machines = {
        name: machine
        for name, machine in MACHINES.items()
        if ("iommufd" not in marks or "iommufd" in machine.backends)
        and ("mock" not in marks or machine.mock)
        and ("bridges" not in marks or machine.bridges)
    }
    slow = {name: [pytest.mark.slow] if machine.built else [] for name, machine in machines.items()}
    if "backend" in metafunc.fixturenames:
        both = [(name, backend) for name in machines for backend in machines[name].backends]
        choices = [pytest.param(*pair, marks=slow[pair[0]], id="-".join(pair)) for pair in both]
        metafunc.parametrize(("machine", "backend"), choices, indirect=True, scope="session")
    else:
        choices = [pytest.param(name, marks=slow[name]) for name in machines]
        metafunc.parametrize("machine", choices, indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def machine(request: pytest.FixtureRequest) -> str:
    """The name of the machine that a test runs on."""
    return str(request.param)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The backend that a test is about: each that the machine has, in turn."""
    return str(request.param)


@pytest.fixture
def bench(backend: str) -> Iterator[Bench]:
    """Devices behind the backend, and guest memory; nothing is opened yet."""
    with Bench(backend) as bench:
        yield bench
