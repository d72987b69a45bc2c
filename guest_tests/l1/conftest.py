"""Which machines and backends a test is for; the same seen from inside and outside."""

from __future__ import annotations

import pytest

from guest_tests.l1.layout import MACHINES


def pytest_configure(config: pytest.Config) -> None:
    """Register our markers."""
    config.addinivalue_line("markers", "iommufd: needs a machine that has it")
    config.addinivalue_line("markers", "mock: needs a machine with iommufd's mock of an IOMMU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each machine that it is for, and with each backend if it asks for one."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    choices = []
    for name, machine in MACHINES.items():
        if ("iommufd" in marks and "iommufd" not in machine.backends) or (
            "mock" in marks and not machine.mock
        ):
            continue
        slow = [pytest.mark.slow] if machine.built else []
        if "backend" in metafunc.fixturenames:
            for backend in machine.backends:
                choices.append(pytest.param(name, backend, marks=slow, id=f"{name}-{backend}"))
        else:
            choices.append(pytest.param(name, "", marks=slow, id=name))
    metafunc.parametrize(("machine", "backend"), choices, indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def machine(request: pytest.FixtureRequest, backend: str) -> str:
    """The name of the machine that a test runs on."""
    return str(request.param)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The backend that a test is about, in turn, if it asks for one."""
    return str(request.param)
