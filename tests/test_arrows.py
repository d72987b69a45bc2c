"""Imports point one way: which room may know which, checked in the source of every module.

Imports inside functions and under ``TYPE_CHECKING`` count as well: a module that
names another one's types knows it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 700

# Room (a package of `viommu`, or a module at its top) -> the rooms it may import.
# A room may always import itself. Everything may import the ground floor.
GROUND = {"_version", "errors", "spec"}
WAITING = {"deferred", "events", "loop"}
MAPPING = {"basic", "export", "iova", "mapper"}
DEVICE = {"config", "device", "domain", "settlement"}
SERVING = {"pci", "vfio_user", "virtio"}

ROOMS: dict[str, set[str]] = {
    # The ground floor itself: `errors` names statuses of the wire, `spec` knows nothing.
    "_version": set(),
    "spec": set(),
    "errors": {"spec"},
    # Waiting, and guest memory, which knows nothing of virtio; `iova` is a map of intervals.
    "events": GROUND,
    "loop": GROUND,
    "deferred": GROUND,
    "memory": GROUND | {"deferred", "iova"},
    # One address space, and what an endpoint gets to see of it.
    "iova": GROUND | {"mapper"},
    "mapper": GROUND | {"events"},
    "basic": GROUND | {"events", "export", "iova", "mapper"},
    "export": GROUND | {"events", "mapper", "memory"},
    # The device: one request in, one reply out.
    "domain": GROUND | {"events"} | MAPPING,
    "settlement": GROUND | {"domain", "events"} | MAPPING,
    "config": GROUND | MAPPING,
    "device": GROUND | {"config", "domain", "events", "settlement"} | MAPPING,
    # Transports. The vfio-user server defines the protocol of what it serves and
    # knows neither PCI nor virtio; PCI implements that protocol; virtio sits on PCI.
    "vfio_user": GROUND | WAITING | {"iova", "mapper", "memory"},
    "pci": GROUND | WAITING | {"memory", "vfio_user"},
    "virtio": GROUND | WAITING | DEVICE | {"memory", "pci", "vfio_user"},
    # Exports for other processes: sockets as those of vfio-user, and no PCI.
    "ipc": GROUND | WAITING | MAPPING | {"memory", "vfio_user"},
    "endpoints": GROUND | WAITING | MAPPING | SERVING | {"domain", "ipc", "memory"},
    # What a VMM must be told is bytes and strings.
    "vmm": GROUND,
    # The whole machine, and what looks at it.
    "machine": GROUND | WAITING | MAPPING | DEVICE | SERVING | {"endpoints", "memory", "vmm"},
    "control": GROUND | WAITING,
    "cli": GROUND | WAITING | SERVING | {"control", "endpoints", "machine", "memory", "vmm"},
}
# Backends stand behind `mapper` and see what a domain tells them, never the device. What
# of them is an endpoint, is one as `endpoints` says, and serves itself.
BACKENDS = GROUND | WAITING | MAPPING | SERVING | {"domain", "endpoints", "memory"}
# Shipped for tests (ours and other people's) and for the demonstration: may import
# anything, and only these modules may import it.
TESTING_USERS = {"viommu.cli.demo"}

# Modules without I/O of their own: they can be driven by any loop, and tested without one.
SANS_IO = (
    "viommu.basic",
    "viommu.device",
    "viommu.domain",
    "viommu.export",
    "viommu.iova",
    "viommu.ipc.conversation",
    "viommu.ipc.hold",
    "viommu.ipc.protocol",
    "viommu.ipc.rate",
    "viommu.mapper",
    "viommu.pci.config_space",
    "viommu.spec.*",
    "viommu.vfio_user.dma_service",
    "viommu.vfio_user.free_iova",
    "viommu.vfio_user.ioas",
    "viommu.vfio_user.ioas_commands",
    "viommu.vfio_user.ioas_requests",
    "viommu.vfio_user.ioas_table",
    "viommu.vfio_user.protocol",
    "viommu.vfio_user.request",
    "viommu.vfio_user.requests",
    "viommu.virtio.ring",
    "viommu.virtio.status",
    "viommu.vmm.bdf",
    "viommu.vmm.viot",
)
IO_MODULES = {
    "asyncio", "fcntl", "mmap", "os", "select", "selectors", "signal", "socket", "subprocess",
    "threading", "time",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "backends":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("viommu", "backends/viommu_backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(source: str, name: str, *, is_package: bool = False) -> set[str]:
    """Return the absolute names of every module that ``source`` imports, anywhere in it.

    ``from a.b import c`` gives both ``a.b`` and ``a.b.c``: c may be a module.
    """
    package = name if is_package else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def imports(name: str) -> set[str]:
    path = SOURCES[name]
    return imports_of(path.read_text(), name, is_package=path.name == "__init__.py")


def room(name: str) -> str:
    return name.split(".")[1]


def rooms_imported(name: str) -> set[str]:
    """Return the rooms of viommu that module ``name`` imports; names in the package root count."""
    found = set()
    for imported in imports(name):
        parts = imported.split(".")
        if parts[0] == "viommu" and len(parts) > 1:
            # `from viommu import __version__` names no module.
            found.add("_version" if parts[1] == "__version__" else parts[1])
    return found


def matches(name: str, pattern: str) -> bool:
    prefix = pattern.removesuffix(".*")
    return name == prefix or (prefix != pattern and name.startswith(prefix + "."))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os", {"os"}),
        ("import os.path as p", {"os.path"}),
        ("def f():\n    import viommu.loop", {"viommu.loop"}),
        ("if TYPE_CHECKING:\n    from viommu import loop", {"viommu", "viommu.loop"}),
        ("from .ring import Chain", {"viommu.virtio.ring", "viommu.virtio.ring.Chain"}),
        ("from ..pci import msix", {"viommu.pci", "viommu.pci.msix"}),
        ("from . import ring", {"viommu.virtio", "viommu.virtio.ring"}),
    ],
    ids=str,
)
def test_imports_are_found_wherever_they_are(source: str, expected: set[str]) -> None:
    assert imports_of(source, "viommu.virtio.device") == expected


@pytest.mark.parametrize("name", SOURCES)
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    if name in {"viommu", "viommu_backends"}:
        allowed = {"_version"}
    elif name.startswith("viommu_backends."):
        allowed = BACKENDS
    elif room(name) == "testing":
        return
    else:
        assert room(name) in ROOMS, f"{name}: a new room must say in {__name__} what it may know"
        allowed = ROOMS[room(name)] | {room(name)}
        if name in TESTING_USERS:
            allowed |= {"testing"}

    assert rooms_imported(name) <= allowed


@pytest.mark.parametrize("name", SOURCES)
def test_viommu_never_imports_a_backend_or_its_own_tests(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imports(name)}

    assert not roots & {"tests", "guest_tests"}
    if not name.startswith("viommu_backends"):
        assert "viommu_backends" not in roots


@pytest.mark.parametrize(
    "name", [n for n in SOURCES if any(matches(n, pattern) for pattern in SANS_IO)]
)
def test_the_core_does_no_io(name: str) -> None:
    assert not {imported.split(".")[0] for imported in imports(name)} & IO_MODULES


def test_every_sans_io_pattern_names_a_module() -> None:
    assert [p for p in SANS_IO if not any(matches(n, p) for n in SOURCES)] == []


def test_every_room_of_the_table_exists() -> None:
    assert set(ROOMS) - {room(name) for name in SOURCES if "." in name} == set()


@pytest.mark.parametrize(
    "path",
    sorted(
        p for f in ("viommu", "backends", "tests", "guest_tests") for p in (ROOT / f).rglob("*.py")
    ),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_module_fits_in_the_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
