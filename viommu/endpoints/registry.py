"""What endpoints there are, and how a description becomes one.

A description is ``kind[,option=value]...`` as on the command line, such as
``blk,path=disk.img,readonly=on``. A comma inside a value is written twice.
A further kind that is emulated here is one :class:`EndpointKind` in :data:`KINDS`, or in
any module that can be imported: ``package.module:NAME,option=value``. Kinds that are
devices of the host come from other packages, see :mod:`viommu.endpoints.host`.
"""

from __future__ import annotations

import contextlib
import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from viommu.endpoints.blk import BlkDevice
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.edu_registers import MAX_HOLD_MS
from viommu.endpoints.host import ENTRY_POINTS, HostKind
from viommu.endpoints.options import HOLD_OPTIONS, PROCESS_OPTIONS, Option, Running, read_switch
from viommu.errors import UsageError
from viommu.virtio.pci import VirtioPciFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.metadata import EntryPoint

    from viommu.endpoints.dma import EndpointDma
    from viommu.loop import Loop
    from viommu.memory import GuestMemory
    from viommu.pci.function import PciFunction

__all__ = [
    "KINDS",
    "EndpointKind",
    "Option",
    "Place",
    "Running",
    "common_options",
    "endpoint_kinds",
    "find_kind",
    "make_endpoint",
    "parse_endpoint",
    "running",
    "without_common",
]


class Place(NamedTuple):
    """Where an endpoint goes: its name, the memory of its guest, its port and the loop."""

    name: str
    memory: GuestMemory
    dma: EndpointDma
    loop: Loop


class EndpointKind(NamedTuple):
    """A kind that is emulated here; ``make`` gets the parsed options by name, if given.

    Without ``make`` the device is somebody else's, and only its DMA comes here.
    """

    help: str
    options: Mapping[str, Option]
    make: Callable[[Place, Mapping[str, Any]], PciFunction] | None


def find_kind(name: str) -> EndpointKind | HostKind:
    """Return the kind called ``name``; of other packages only that one is loaded.

    Raises:
        UsageError: There is none, or it can't be loaded; the message says why.
    """
    kind = KINDS.get(name)
    if kind is not None:
        return kind
    if ":" in name:
        return _import(name)
    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = ", ".join(sorted({*KINDS, *offered}))
        raise UsageError(f"no endpoint is called {name!r}: there are {known}")
    return _load(offered[name])


def endpoint_kinds() -> dict[str, EndpointKind | HostKind]:
    """Return every kind by name, without those that can't be loaded."""
    kinds: dict[str, EndpointKind | HostKind] = dict(KINDS)
    for entry in entry_points(group=ENTRY_POINTS):
        with contextlib.suppress(UsageError):
            kinds.setdefault(entry.name, _load(entry))
    return kinds


def parse_endpoint(description: str) -> tuple[str, dict[str, Any]]:
    """Return kind and options of a description, so that mistakes show before anything starts.

    Raises:
        UsageError: The description is wrong; the message says what there is.
    """
    name, *words = _split(description)
    kind = find_kind(name)
    possible = {**kind.options, **common_options(kind)}
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        option = possible.get(key)
        if option is None:
            known = ", ".join(possible) or "none"
            raise UsageError(f"{name} has no option {key!r}: there are {known}")
        if not equals or not value:
            raise UsageError(f"{name}: {key} needs a value ({option.help})")
        if key in options:
            raise UsageError(f"{name}: {key} is given twice")
        try:
            options[key] = option.parse(value)
        except UsageError as error:
            raise UsageError(f"{name}: {key}={value}: {error}") from error
    for key, option in kind.options.items():
        if option.required and key not in options:
            raise UsageError(f"{name} needs {key}=... ({option.help})")
    for key in ("hold-limit", "hold-policy"):
        if "process" in possible and key in options and "process" not in options:
            raise UsageError(f"{name}: {key} is for process=own")
    return name, options


def common_options(kind: EndpointKind | HostKind) -> Mapping[str, Option]:
    """Return the options that a kind has in common with others."""
    if isinstance(kind, HostKind):
        return {}
    return HOLD_OPTIONS if kind.make is None else {**PROCESS_OPTIONS, **HOLD_OPTIONS}


def running(description: str) -> Running:
    """Return where an endpoint runs, by the options that kinds have in common.

    Raises:
        UsageError: The description is wrong.
    """
    return Running.read(parse_endpoint(description)[1])


def without_common(description: str) -> str:
    """Return a description without the options that kinds have in common."""
    name, *words = _split(description)
    common = common_options(find_kind(name))
    kept = [word for word in words if word.partition("=")[0] not in common]
    return ",".join(word.replace(",", ",,") for word in (name, *kept))


def make_endpoint(
    description: str, name: str, memory: GuestMemory, dma: EndpointDma, loop: Loop
) -> PciFunction:
    """Make the emulated endpoint of a description; ``name`` is what messages call it.

    Raises:
        UsageError: The description is wrong, or a file it names can't be used; or it
            is of a device of the host, which is opened and not made.
    """
    called, options = parse_endpoint(description)
    kind = find_kind(called)
    if isinstance(kind, HostKind):
        raise UsageError(f"{called} is a device of the host, it can't be emulated")
    if kind.make is None:
        raise UsageError(f"{called} is emulated by another process, it can't be here")
    if "process" in options:
        raise UsageError(f"{called}: process=own is for an endpoint behind an IOMMU")
    return kind.make(Place(name, memory, dma, loop), options)


def _load(entry: EntryPoint) -> HostKind:
    try:
        kind = entry.load()
    except Exception as error:  # whatever another package does when it is imported
        raise UsageError(f"{entry.name} ({entry.value}) can't be loaded: {error}") from error
    if not isinstance(kind, HostKind):
        raise UsageError(f"{entry.name} ({entry.value}) is {kind!r}, which is no HostKind")
    return kind


def _import(name: str) -> EndpointKind:
    """Return the kind that ``package.module:NAME`` names."""
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # as in _load
        raise UsageError(f"{name} can't be loaded: {error} (is it on PYTHONPATH?)") from error
    if not isinstance(kind, EndpointKind):
        raise UsageError(f"{name} is {kind!r}, which is no EndpointKind")
    return kind


def _split(description: str) -> list[str]:
    """Split at single commas; a doubled one is part of a word."""
    words = description.replace(",,", "\0").split(",")
    return [word.replace("\0", ",") for word in words]


def _milliseconds(value: str) -> int:
    """Read a hold time."""
    if not value.isdecimal() or int(value) > MAX_HOLD_MS:
        raise UsageError(f"expected milliseconds, 0 to {MAX_HOLD_MS}")
    return int(value)


def _make_edu(place: Place, options: Mapping[str, Any]) -> PciFunction:
    return EduFunction(
        place.name, place.memory, place.dma, place.loop, hold_ms=options.get("hold", 0)
    )


def _make_blk(place: Place, options: Mapping[str, Any]) -> PciFunction:
    device = BlkDevice(
        options["path"],
        place.dma,
        place.loop,
        read_only=options.get("readonly", False),
        serial=options.get("serial"),
    )
    return VirtioPciFunction(place.name, place.memory, device, place.dma)


KINDS: Final[dict[str, EndpointKind]] = {
    "edu": EndpointKind(
        "QEMU's educational device, a DMA engine that can hold a transfer open",
        {
            "hold": Option(_milliseconds, "how long each transfer holds its memory, milliseconds"),
        },
        _make_edu,
    ),
    "blk": EndpointKind(
        "a virtio-blk disk on a file",
        {
            "path": Option(Path, "the disk image, a multiple of 512 bytes", required=True),
            "readonly": Option(read_switch, "on: the guest can't write, and others may read too"),
            "serial": Option(str, "what the guest sees as serial number, up to 20 characters"),
        },
        _make_blk,
    ),
    "external": EndpointKind(
        "a device that another process emulates, which uses memory by export sessions",
        {
            "socket": Option(Path, "where it connects; DIR/BDF.export.sock by default"),
        },
        None,
    ),
}
