"""Debian packages without root: a private apt, beside the machine's own.

The mirror, the transport, proxies and credentials are those the machine's apt is configured
with; its hooks, package state and caches are not touched. apt itself checks the signature of
the release file, its hashes of the indices and theirs of the packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from guest_tests.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Archive", "Package"]

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SECONDS = 900  # for all of a bundle, over a slow line
_INDEX_FORMAT = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
_SETTINGS = re.compile(r"(Acquire::|Dir::Etc::netrc|Dir::Etc::trusted)")
_INSTALL = re.compile(r"^Inst (?P<name>\S+) (?:\[\S+\] )?\((?P<version>\S+) ", re.MULTILINE)


class Package(NamedTuple):
    """A package at the version that was resolved."""

    name: str
    version: str


class Archive:
    """The machine's mirror, read as another Debian release.

    ``root`` is an empty private directory (it may get to hold the machine's proxy settings);
    ``suites`` are the releases to read. The first mirror that serves them all is taken.

    Raises:
        LabError: No apt, no mirror that has ``suites``, or a signature that doesn't verify.
    """

    def __init__(self, root: Path, suites: Sequence[str]) -> None:
        if shutil.which("apt-get") is None:
            raise LabError(
                "apt-get was not found: the lab fetches QEMU and kernels from the Debian mirror "
                "that the machine's apt is configured with"
            )
        self._root = root
        self._environment = dict(os.environ, LC_ALL="C")
        settings = self._run("apt-config", "dump").splitlines()
        self._write_configuration([line for line in settings if _SETTINGS.match(line)])
        mirrors = self._mirrors()
        self._environment["APT_CONFIG"] = str(root / "apt.conf")
        failures = [failure for mirror in mirrors if (failure := self._open(mirror, suites))]
        if len(failures) == len(mirrors):
            raise LabError(
                f"no mirror of this machine's apt serves {', '.join(suites)}: "
                f"{failures[0] if failures else 'it has no source with a main component'}"
            )

    def names(self, pattern: str) -> list[str]:
        """Return the package names that match ``pattern`` entirely, oldest kernel first."""
        found = self._run("apt-cache", "pkgnames").split()
        return sorted((n for n in found if re.fullmatch(pattern, n)), key=_version_key)

    def resolve(self, packages: Iterable[str], release: str) -> list[Package]:
        """Return ``packages`` from ``release`` and all they depend on."""
        plan = self._run("apt-get", "install", "-s", "-t", release, *packages)
        return [Package(m["name"], m["version"]) for m in _INSTALL.finditer(plan)]

    def download(self, packages: Iterable[Package], into: Path) -> list[Path]:
        """Download ``packages`` into the directory ``into``; apt checks their hashes."""
        self._run("apt-get", "download", *(f"{p.name}={p.version}" for p in packages), cwd=into)
        return sorted(into.glob("*.deb"))

    def _mirrors(self) -> list[str]:
        """Return the mirrors of the machine's own apt, the most likely first."""
        # Without that option only what an earlier "apt-get update" has fetched is listed.
        options = ("--no-release-info", "--format", _INDEX_FORMAT)
        targets = self._run("apt-get", "indextargets", *options).splitlines()
        fields = [target.split(" ") for target in targets]
        return list(
            dict.fromkeys(
                uri
                for uri, release, component in (f for f in fields if len(f) == 3)
                if component == "main" and not release.endswith("-security")
            )
        )

    def _open(self, mirror: str, suites: Sequence[str]) -> str:
        """Read the indices of ``suites`` at ``mirror``; return why not, or an empty string."""
        signed = f" signed-by={_KEYRING}" if _KEYRING.exists() else ""
        lines = [f"deb [arch=amd64{signed}] {mirror} {suite} main\n" for suite in suites]
        (self._root / "sources.list").write_text("".join(lines))
        try:
            self._run("apt-get", "update", "-o", "APT::Update::Error-Mode=any")
        except LabError as error:
            return str(error)
        return ""

    def _write_configuration(self, inherited: Iterable[str]) -> None:
        directory = self._root
        for name in ("state/lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        own = {
            "Dir::State": directory / "state",
            "Dir::State::status": directory / "status",
            "Dir::Cache": directory / "cache",
            "Dir::Etc::sourcelist": directory / "sources.list",
            "Dir::Etc::sourceparts": directory / "none",
            "Dir::Etc::parts": directory / "none",
            "Dir::Etc::main": directory / "none",
            "Dir::Etc::preferences": directory / "none",
            "Dir::Etc::preferencesparts": directory / "none",
            "Dir::Log": directory,
            # apt would otherwise drop to a user who can't write into a private directory
            "APT::Sandbox::User": "root",
            "APT::Architecture": "amd64",
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        (directory / "none").mkdir()
        configuration = directory / "apt.conf"
        configuration.touch(mode=0o600)
        lines = [*inherited, *(f'{key} "{value}";' for key, value in own.items())]
        configuration.write_text("\n".join(lines) + "\n")

    def _run(self, *command: str, cwd: Path | None = None) -> str:
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(command[:2])} took more than {_SECONDS} s") from error
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise LabError(f"{' '.join(command[:2])} failed: {(errors or [done.stderr])[0]}")
        return done.stdout


def _version_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
