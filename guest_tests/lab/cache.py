"""The lab's cache: outside the repository, safe for several processes, never half filled."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cache_directory", "content_key", "locked", "staged"]

_UNFINISHED = ".unfinished."


def cache_directory() -> Path:
    """Return where the lab keeps what it fetched and built; made when missing.

    ``VIOMMU_CACHE``, else ``viommu`` in ``XDG_CACHE_HOME``, else in ``~/.cache``.
    """
    chosen = os.environ.get("VIOMMU_CACHE")
    if chosen:
        base = Path(chosen)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "viommu"
    directory = base.absolute() / "lab"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let one process at a time change ``directory``; others wait.

    What a process that was killed left half done in it is removed.
    """
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        yield


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a new directory that becomes ``target`` when the block ends well, else vanishes.

    It lies beside ``target``, so that the change is one rename. A ``target`` that exists is
    replaced. The caller holds the lock of its parent (:func:`locked`).
    """
    stage = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target.parent))
    try:
        yield stage
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target.parent))
            target.rename(old / target.name)
            stage.rename(target)
            shutil.rmtree(old)
        else:
            stage.rename(target)
        target.chmod(0o755)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def content_key(*parts: Any) -> str:
    """Return 16 hex digits that change when any of ``parts`` (JSON values) does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
