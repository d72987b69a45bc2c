"""What a host has of what viommu can use: one function a question, none changes anything."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import resource
import socket
import sys
import tempfile
from typing import TYPE_CHECKING, Final

from viommu.cli.check import Check, Outcome
from viommu.cli.device_checks import examine_devices
from viommu.vmm import UnsuitableQemuError, find_qemu, format_size, probe_qemu

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Check", "Outcome", "examine_host"]

_PYTHON: Final = (3, 11)
_BUILD: Final = (
    "apt-get install gcc python3-dev (linuxfd is published as source and needs a C compiler "
    "and Python's headers), then pip install viommu"
)


def examine_host(qemu: str | None = None) -> list[Check]:
    """Answer every question; ``qemu`` is a program to examine instead of the usual one."""
    checks = [_python(), _linux()]
    checks += (_package(name) for name in ("click", "linuxfd", "rich", "sortedcontainers"))
    checks += (question() for question in _QUESTIONS)
    checks.append(_qemu(qemu))
    checks.append(_kvm())
    checks += examine_devices()
    checks.append(_memlock())
    return checks


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info >= _PYTHON:
        return Check("python", Outcome.OK, f"{version} ({platform.python_implementation()})")
    wanted = ".".join(map(str, _PYTHON))
    return Check("python", Outcome.MISSING, version, f"install Python {wanted} or newer")


def _linux() -> Check:
    system = platform.uname()
    found = f"{system.system} {system.release}, {system.machine}"
    if system.system == "Linux":
        return Check("kernel", Outcome.OK, found)
    return Check("kernel", Outcome.MISSING, found, "use Linux: eventfd, memfd and epoll are its")


def _package(name: str) -> Check:
    label = f"package {name}"
    remedy = _BUILD if name == "linuxfd" else "pip install viommu installs it"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(label, Outcome.MISSING, "not installed", remedy)
    try:
        importlib.import_module(name)
    except ImportError as error:
        return Check(label, Outcome.MISSING, f"{version} does not load: {error}", remedy)
    return Check(label, Outcome.OK, version)


def _memfd() -> Check:
    """Guest memory arrives as memfds; a seal keeps a VMM from truncating one under us."""
    label = "memfd"
    try:
        fd = os.memfd_create("viommu-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Check(
            label, Outcome.MISSING, f"memfd_create fails: {error.strerror}", "allow memfd_create"
        )
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        return Check(
            label, Outcome.MISSING, f"can't be sealed: {error.strerror}", "allow F_ADD_SEALS"
        )
    finally:
        os.close(fd)
    return Check(label, Outcome.OK, "can be made and sealed")


def _eventfd() -> Check:
    label = "eventfd"
    try:
        os.close(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError as error:
        return Check(label, Outcome.MISSING, f"fails: {error.strerror}", "raise `ulimit -n`")
    return Check(label, Outcome.OK, "can be made")


def _unix_socket() -> Check:
    """vfio-user runs over a UNIX stream socket in a directory that can be written to."""
    label = "unix sockets"
    try:
        with (
            tempfile.TemporaryDirectory(prefix="viommu-") as directory,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        ):
            server.bind(os.path.join(directory, "s"))  # noqa: PTH118  # bind wants a string
    except OSError as error:
        return Check(
            label,
            Outcome.MISSING,
            f"none can be made in {tempfile.gettempdir()}: {error.strerror}",
            "set TMPDIR to a short, writable directory",
        )
    return Check(label, Outcome.OK, f"can be made in {tempfile.gettempdir()}")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} (at most {hard})"
    if soft < 256:
        return Check("open files", Outcome.MISSING, found, "raise it: ulimit -n 1024")
    return Check("open files", Outcome.OK, found)


def _qemu(explicit: str | None) -> Check:
    label = "qemu"
    try:
        found = probe_qemu(find_qemu(explicit))
        found.require()
    except UnsuitableQemuError as error:
        cause, _, remedy = str(error).partition(": ")
        return Check(label, Outcome.MISSING, cause, remedy)
    return Check(label, Outcome.OK, f"{found.version_text} with vfio-user-pci, {found.path}")


def _kvm() -> Check:
    path, purpose = "/dev/kvm", "QEMU uses it only with `viommu run --accel kvm`"
    if not os.path.exists(path):  # noqa: PTH110  # no exception where a parent can't be read
        remedy = "load kvm_intel or kvm_amd; without it guests run emulated"
        return Check(path, Outcome.ABSENT, f"not there; {purpose}", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return Check(
            path,
            Outcome.ABSENT,
            f"there, but not for user {os.geteuid()}; {purpose}",
            f"give this user read and write access to {path}",
        )
    return Check(path, Outcome.OK, f"there; {purpose}")


def _memlock() -> Check:
    label = "locked memory"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check(label, Outcome.OK, "no limit")
    return Check(
        label,
        Outcome.ABSENT,
        f"at most {format_size(soft)}; a real device would pin all of guest memory",
        "raise it: ulimit -l unlimited",
    )


_QUESTIONS: Final[tuple[Callable[[], Check], ...]] = (
    _memfd,
    _eventfd,
    _unix_socket,
    _open_files,
)
