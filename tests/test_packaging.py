"""The wheel contains the packages, their typing markers and the command, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import viommu

ROOT = Path(__file__).parents[1]
PACKAGES = ("viommu", "backends/viommu_backends")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, with the setuptools of this environment."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that contains what the wheel would put into site-packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, code: str) -> str:
    """Run ``code`` where only the unpacked wheel provides viommu; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        cwd=site,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


@pytest.mark.slow
def test_the_wheel_contains_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {
        str(path.relative_to((ROOT / name).parent))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert names == expected


@pytest.mark.slow
def test_the_wheel_is_for_every_platform_and_says_its_version(wheel: Path) -> None:
    assert wheel.name == f"viommu-{viommu.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_the_wheel_brings_its_licence(site: Path) -> None:
    licences = list(site.glob("viommu-*.dist-info/licenses/LICENSE"))

    assert [path.read_text() for path in licences] == [(ROOT / "LICENSE").read_text()]


@pytest.mark.slow
def test_both_import_packages_can_be_imported(site: Path) -> None:
    printed = run(
        site,
        "import viommu, viommu_backends; print(viommu.__file__); print(viommu_backends.__file__)",
    )

    assert [Path(line).parent for line in printed.split()] == [
        site / "viommu",
        site / "viommu_backends",
    ]


@pytest.mark.slow
def test_the_command_starts(site: Path) -> None:
    entry_points = next(site.glob("viommu-*.dist-info/entry_points.txt")).read_text()
    script = re.search(r"^viommu = ([\w.]+):(\w+)$", entry_points, re.MULTILINE)

    assert script is not None
    printed = run(
        site,
        f"from {script[1]} import {script[2]}; sys.argv = ['viommu', '--version']; {script[2]}()",
    )
    assert viommu.__version__ in printed
