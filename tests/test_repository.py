"""Facts that are written in more than one place agree, and the tree keeps its shape."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import viommu

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13"]

# Modules whose tests are elsewhere than in tests/<same path>/test_<module>.py, and why.
TESTED_ELSEWHERE = {
    "viommu._version": "one constant, compared with the changelog below",
    "viommu.endpoints.remote.companions": "a contract: tests/virtio/test_undertaker.py runs it",
    "viommu.mapper": "a contract: tests/test_basic.py runs it on an implementation",
    "viommu.spec._struct": "the base of every structure: tests/spec/test_layouts.py",
    "viommu.spec.pci": "layouts: tests/spec/test_layouts.py compares them with the C headers",
    "viommu.spec.vfio": "layouts: as viommu.spec.pci",
    "viommu.spec.virtio_config": "layouts: as viommu.spec.pci",
    "viommu.spec.virtio_iommu": "layouts: as viommu.spec.pci",
    "viommu.spec.virtio_pci": "layouts: as viommu.spec.pci",
    "viommu.spec.virtio_ring": "layouts: as viommu.spec.pci",
    "viommu.vfio_user.served": "a contract: tests/vfio_user/test_server.py runs it",
    "viommu.virtio.device": "a contract: tests/virtio/test_pci.py runs it",
    "viommu_backends.host_mapper": "a base class: test_iommufd.py and test_vfio_type1.py run it",
}


def tracked_files() -> list[Path]:
    """Return every file of the repository, or of the unpacked source, that people wrote."""
    git = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode:
        return [p for p in ROOT.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(ROOT)}"]
    return [path for name in git.stdout.split("\0") if name and (path := ROOT / name).is_file()]


FILES = tracked_files()
MODULES = [
    path
    for path in FILES
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in {"viommu", "backends"}
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "backends" else parts)


def test_the_top_of_the_tree() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "backends",
        "docs",
        "guest_tests",
        "pyproject.toml",
        "tests",
        "viommu",
    }


def test_classifiers_say_the_pythons_that_are_supported() -> None:
    prefix = "Programming Language :: Python :: "
    classified = [
        entry.removeprefix(prefix) for entry in PROJECT["classifiers"] if entry.startswith(prefix)
    ]

    assert classified == ["3", *PYTHONS]


def test_the_floor_is_the_same_everywhere() -> None:
    floor = PYTHONS[0]
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert PROJECT["requires-python"] == f">={floor}"
    assert configuration["tool"]["ruff"]["target-version"] == f"py{floor.replace('.', '')}"
    assert f"< ({floor.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def test_the_makefile_tries_every_supported_python() -> None:
    assert f"for version in {' '.join(PYTHONS)};" in (ROOT / "Makefile").read_text()


def test_the_readme_says_the_pythons_that_are_supported() -> None:
    row = re.search(r"^\| Python \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)

    assert row is not None
    assert re.findall(r"3\.\d+", row[1]) == PYTHONS


def test_the_changelog_starts_with_this_version() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert heading is not None
    assert heading[1] == viommu.__version__


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.name not in {"__init__.py", "__main__.py"}], ids=dotted
)
def test_every_module_has_a_test_module_of_its_own(path: Path) -> None:
    name = dotted(path)
    parts = name.split(".")
    folders = ["backends" if part == "viommu_backends" else part for part in parts[:-1]]
    folders = folders[1:] if folders[0] == "viommu" else folders
    test = f"test_{parts[-1].lstrip('_')}.py"
    tests = [ROOT.joinpath("tests", *folders, test)]
    if folders == ["backends"]:
        # What only a kernel can answer is asked on one that has an IOMMU.
        tests.append(ROOT.joinpath("guest_tests", "l1", test))

    exists = any(path.exists() for path in tests)
    if name in TESTED_ELSEWHERE:
        assert not exists, "no exception any more: take it from TESTED_ELSEWHERE"
    else:
        assert exists, [relative(path) for path in tests]


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=relative)
def test_a_package_is_a_docstring_and_its_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public: list[str] = []
    imported: list[str] = []
    for node in tree.body[1:]:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                public = ast.literal_eval(value)
            case ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.List() as value):
                public = ast.literal_eval(value)
            case ast.ImportFrom(module="__future__"):
                pass
            case ast.ImportFrom(names=names):
                imported += [alias.asname or alias.name for alias in names]
            case _:
                pytest.fail(f"more than imports and __all__: {ast.unparse(node)}")

    assert ast.get_docstring(tree)
    assert sorted(public) == sorted(imported)


@pytest.mark.parametrize("path", [p for p in MODULES if not p.name.startswith("_")], ids=dotted)
def test_a_module_says_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text())

    assert ast.get_docstring(tree)
    assert any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for node in tree.body
    )


# Packages come from where the machine's own tools are configured to get them.
REGISTRY = re.compile(
    r"\b(?:[\w-]+\.)*(?:debian|ubuntu|pypi|pythonhosted|npmjs|kernel|qemu)\.(?:org|com|net)\b"
)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_names_a_host_to_download_from(path: Path) -> None:
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        pytest.fail("not text: a binary file does not belong in the repository")

    assert REGISTRY.findall(text) == []


def test_the_host_pattern_can_match() -> None:
    assert REGISTRY.search("http://ftp.de.debian" + ".org/debian")


def without_code(markdown: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)


def test_every_relative_link_of_the_documents_leads_somewhere() -> None:
    dead = [
        f"{relative(path)}: {target}"
        for path in FILES
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code(path.read_text()))
        if "://" not in target and not (path.parent / target).exists()
    ]

    assert dead == []


def test_every_package_name_in_the_layout_of_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"^ {4}(?:[a-z_]+/ +)*([a-z_]+(?:/|\.py))", text, re.MULTILINE)

    assert named
    assert [name for name in named if not (ROOT / "viommu" / name).exists()] == []
