"""Bundles in the cache: fetched once, then used without any network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from guest_tests.lab.archive import Archive, Package
from guest_tests.lab.cache import cache_directory, content_key, locked, staged
from guest_tests.lab.errors import LabError
from guest_tests.lab.manifest import BUNDLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_tests.lab.manifest import Bundle

__all__ = ["bundle_key", "cached_versions", "fetch", "packages_key"]

_RECORD = "RESOLVED.json"
_FORMAT = 2  # of the record and the tree


def fetch(bundles: Sequence[Bundle], *, refresh: bool = False) -> dict[str, Path]:
    """Return the unpacked tree of each bundle by its name, fetching what the cache lacks.

    With ``refresh`` all are fetched again, at the versions that are newest now.

    Raises:
        LabError: The archive can't be reached, or doesn't have a package.
    """
    home = cache_directory() / "bundles"
    with locked(home):
        missing = [b for b in bundles if refresh or not _complete(home / b.name, b)]
        for suites in dict.fromkeys(b.suites for b in missing):
            with tempfile.TemporaryDirectory(prefix="viommu-apt.") as root:
                archive = Archive(Path(root), suites)
                for bundle in (b for b in missing if b.suites == suites):
                    with staged(home / bundle.name) as stage:
                        _fill(stage, bundle, archive)
    return {bundle.name: home / bundle.name for bundle in bundles}


def cached_versions() -> dict[str, str]:
    """Return what the cache holds: of each bundle by name, its main package and version."""
    home = cache_directory() / "bundles"
    complete = (home / name for name, bundle in BUNDLES.items() if _complete(home / name, bundle))
    return {tree.name: json.loads((tree / _RECORD).read_text())["version"] for tree in complete}


def bundle_key(tree: Path) -> str:
    """Return a key of the exact contents of ``tree``."""
    return content_key(json.loads((tree / _RECORD).read_text()))


def packages_key(tree: Path) -> str:
    """Return a key of the packages that ``tree`` was made of, whatever was kept of them."""
    return content_key(json.loads((tree / _RECORD).read_text())["packages"])


def _complete(tree: Path, bundle: Bundle) -> bool:
    try:
        record = json.loads((tree / _RECORD).read_text())
    except FileNotFoundError:
        return False
    return bool(record["bundle"] == _key(bundle))


def _key(bundle: Bundle) -> str:
    return content_key(_FORMAT, bundle)


def _fill(stage: Path, bundle: Bundle, archive: Archive) -> None:
    preferred = archive.names(bundle.prefer) if bundle.prefer else []
    closure = archive.resolve(preferred[-1:] or bundle.packages, bundle.release)
    wanted = [package for package in closure if re.fullmatch(bundle.fetch, package.name)]
    if not wanted:
        raise LabError(f"{bundle.release} has no package {' or '.join(bundle.packages)}")
    debs = stage / "debs"
    unpacked = stage / "all"
    debs.mkdir()
    unpacked.mkdir()
    packages = {}
    for deb in archive.download(wanted, debs):
        package = _identity(deb)
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        packages[package.name] = {"version": package.version, "sha256": digest}
        subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True, stdin=subprocess.DEVNULL)
        deb.unlink()
    debs.rmdir()
    for pattern in bundle.keep:
        for path in sorted(unpacked.glob(pattern)):
            target = stage / path.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    shutil.rmtree(unpacked)
    version = f"{wanted[-1].name} {wanted[-1].version}"  # dependencies come first
    record = {"bundle": _key(bundle), "version": version, "packages": packages}
    (stage / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _identity(deb: Path) -> Package:
    fields = subprocess.run(
        ["dpkg-deb", "-f", deb, "Package", "Version"],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    ).stdout.splitlines()
    values = dict(field.split(": ", 1) for field in fields)
    return Package(values["Package"], values["Version"])
