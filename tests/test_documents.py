"""What the documents show is true: their examples run, their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import FunctionType

import click
import pytest

from guest_tests.l1.layout import MACHINES
from viommu import errors
from viommu.cli.exit_codes import EXIT_CODES
from viommu.cli.main import COMMANDS, cli
from viommu.endpoints.edu_registers import EXTENSION_START, Register
from viommu.spec import vfio_user_iommufd as iommufd
from viommu.spec._struct import sizeof
from viommu.spec.vfio_user import Command
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.spec.virtio_iommu import Status
from viommu.vfio_user import requests

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
# Pages whose Python examples are complete and run in the order of the page.
RUNNABLE = (
    "docs/embedding.md",
    "docs/endpoints.md",
    "docs/export-sessions.md",
    "docs/iommufd.md",
    "docs/mappers.md",
    "docs/vfio-user-client.md",
)


def code_blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Return the line number and the text of each block of ``language`` on a page."""
    text = PAGES[page]
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_python_examples_of_a_page_run(page: str) -> None:
    namespace: dict[str, object] = {"__name__": page}
    blocks = code_blocks(page, "python")

    assert blocks
    for line, block in blocks:
        # Blank lines in front: a traceback shows the line of the page.
        exec(compile("\n" * line + block, page, "exec"), namespace)  # our own text


def shell_commands(page: str) -> list[str]:
    """Return the lines with a prompt of the console blocks of a page, continuations joined."""
    joined = "\n".join(block for _, block in code_blocks(page, "console")).replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


VIOMMU_COMMANDS = [
    pytest.param(command, id=f"{page}: {' '.join(command.split())}")
    for page in PAGES
    for command in dict.fromkeys(shell_commands(page))
    if command.startswith("viommu ")
]


@pytest.mark.parametrize("command", VIOMMU_COMMANDS)
def test_a_command_that_is_shown_can_be_given(command: str) -> None:
    words = shlex.split(command.partition("#")[0].removesuffix("&"))
    name = words[1]
    subcommand = cli.get_command(click.Context(cli), name)

    assert subcommand is not None, f"no such subcommand: {name}"
    # Files that are named needn't exist here, so options are looked up rather than parsed.
    options = {option for parameter in subcommand.params for option in parameter.opts}
    ours = words[2 : words.index("--") if "--" in words else None]
    assert [w for w in ours if w.startswith("-") and w.partition("=")[0] not in options] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_documented(name: str) -> None:
    subcommand = cli.get_command(click.Context(cli), name)
    page = PAGES["docs/command.md"]
    section = re.search(rf"^## viommu {name}$(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)

    assert subcommand is not None
    assert section is not None
    options = [p.opts[0] for p in subcommand.params if isinstance(p, click.Option)]
    assert [option for option in options if f"`{option}" not in section[1]] == []


def test_every_exit_code_is_documented_with_its_meaning() -> None:
    documented = re.findall(r"^\| (\d+) \| (.*) \|$", PAGES["docs/command.md"], re.MULTILINE)

    assert {int(code): meaning for code, meaning in documented} == EXIT_CODES


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_shown_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE)
    shown = re.findall(r"`make ([a-z-]+)`", PAGES[page])
    shown += [c.split()[1] for c in shell_commands(page) if c.startswith("make ")]

    assert set(shown) <= set(targets)


def test_every_register_of_edu_that_is_ours_is_documented() -> None:
    rows = re.findall(r"^\| (0x\w+) \| `(\w+)` \|", PAGES["docs/endpoints.md"], re.MULTILINE)

    assert {name: int(offset, 16) for offset, name in rows} == {
        register.name: register.value for register in Register if register >= EXTENSION_START
    }


def test_every_command_of_the_client_is_documented_with_its_request() -> None:
    page = PAGES["docs/vfio-user-client.md"]
    rows = re.findall(r"^\| ([A-Z_]+) \| (.*?) \|", page, re.MULTILINE)

    assert [name for name, _ in rows] == [command.name for command in Command]
    documented = {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    functions = {
        name
        for name, value in vars(requests).items()
        if name in requests.__all__ and isinstance(value, FunctionType)
    }
    assert documented == functions


IOMMUFD_MESSAGES = {
    "ALLOC_IOAS": iommufd.AllocIoas,
    "DESTROY_IOAS": iommufd.DestroyIoas,
    "IOAS_MAP": iommufd.IoasMap,
    "IOAS_UNMAP": iommufd.IoasUnmap,
    "IOAS_COPY": iommufd.IoasCopy,
    "BIND": iommufd.Bind,
    "ATTACH_PT": iommufd.AttachPt,
    "DETACH_PT": iommufd.DetachPt,
}


def test_every_iommufd_command_is_documented_with_its_layout() -> None:
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)` \| (\d+) \| (.*?) \|", PAGES["docs/iommufd.md"], re.MULTILINE
    )

    assert {name: int(number) for number, name, _, _ in rows} == {
        command.name: command.value for command in IommufdCommand
    }
    for _, name, size, fields in rows:
        message = IOMMUFD_MESSAGES[name]
        assert int(size) == sizeof(message)
        assert re.findall(r"`(\w+)`", fields) == [field[0] for field in message._fields_]
        wide = [field for field, kind in re.findall(r"`(\w+)` \((\w+)\)", fields) if kind == "u64"]
        assert wide == [f[0] for f in message._fields_ if getattr(message, f[0]).size == 8]


def test_every_flag_of_an_iommufd_command_is_documented() -> None:
    documented = {
        (name, flag): int(value, 16)
        for name, cell in re.findall(
            r"^\| \d+ \| `(\w+)` .*\|(.*)\|$", PAGES["docs/iommufd.md"], re.MULTILINE
        )
        for flag, value in re.findall(r"`(\w+)` (0x\w+)", cell)
    }

    assert documented == {
        ("IOAS_MAP", "WRITEABLE"): iommufd.MAP_F_WRITEABLE,
        ("IOAS_MAP", "READABLE"): iommufd.MAP_F_READABLE,
        ("IOAS_MAP", "FIXED_IOVA"): iommufd.MAP_F_FIXED_IOVA,
        ("IOAS_UNMAP", "ALL"): iommufd.IOAS_UNMAP_F_ALL,
        ("ATTACH_PT", "PASID"): iommufd.ATTACH_PT_F_PASID,
        ("DETACH_PT", "PASID"): iommufd.DETACH_PT_F_PASID,
    }


def test_every_exception_is_documented() -> None:
    first_column = re.findall(r"^\| (`\w+`.*?) \|", PAGES["docs/errors.md"], re.MULTILINE)
    documented = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    exceptions = {
        name
        for name in errors.__all__
        if isinstance(cls := getattr(errors, name), type) and issubclass(cls, Exception)
    }

    assert exceptions - {"ViommuError"} <= documented


def test_every_status_is_documented() -> None:
    rows = re.findall(r"^\| `([A-Z]+)` \|", PAGES["docs/errors.md"], re.MULTILINE)

    # The standard's IOERR is for a virtqueue that failed: we never answer with it.
    assert set(rows) == {status.name for status in Status} - {"IOERR"}


def test_every_host_of_the_guest_tests_is_documented_with_its_backends() -> None:
    page = PAGES["docs/guest-tests.md"]
    rows = re.findall(r"^\| `(\S+)` \| (Debian's|built).* \| (.*) \|$", page, re.MULTILINE)

    assert {name: (kernel == "built", "iommufd" in has) for name, kernel, has in rows} == {
        name: (machine.built, "iommufd" in machine.backends) for name, machine in MACHINES.items()
    }
