"""What endpoints there are, and how a description becomes one.

A description is ``kind[,option=value]...`` as on the command line, such as
``blk,path=disk.img,readonly=on``. A comma inside a value is written twice.
A further kind is one :class:`EndpointKind` in :data:`KINDS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from viommu.endpoints.blk import BlkDevice
from viommu.endpoints.edu import EduFunction
from viommu.endpoints.edu_registers import MAX_HOLD_MS
from viommu.errors import UsageError
from viommu.virtio.pci import VirtioPciFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from viommu.endpoints.dma import EndpointDma
    from viommu.loop import Loop
    from viommu.memory import GuestMemory
    from viommu.pci.function import PciFunction

__all__ = ["KINDS", "EndpointKind", "Option", "Place", "make_endpoint", "parse_endpoint"]


class Place(NamedTuple):
    """Where an endpoint goes: its name, the memory of its guest, its port and the loop."""

    name: str
    memory: GuestMemory
    dma: EndpointDma
    loop: Loop


class Option(NamedTuple):
    """An option of a kind: how its value is read (UsageError when it can't be), and help."""

    parse: Callable[[str], Any]
    help: str
    required: bool = False


class EndpointKind(NamedTuple):
    """A kind of endpoint. ``make`` gets the parsed options by name, absent ones left out."""

    help: str
    options: Mapping[str, Option]
    make: Callable[[Place, Mapping[str, Any]], PciFunction]


def parse_endpoint(description: str) -> tuple[str, dict[str, Any]]:
    """Return kind and options of a description, so that mistakes show before anything starts.

    Raises:
        UsageError: The description is wrong; the message says what there is.
    """
    name, *words = _split(description)
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"no endpoint is called {name!r}: there are {', '.join(sorted(KINDS))}")
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        option = kind.options.get(key)
        if option is None:
            raise UsageError(f"{name} has no option {key!r}: there are {', '.join(kind.options)}")
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
    return name, options


def make_endpoint(
    description: str, name: str, memory: GuestMemory, dma: EndpointDma, loop: Loop
) -> PciFunction:
    """Make the endpoint of a description; ``name`` is what messages call it.

    Raises:
        UsageError: The description is wrong, or a file it names can't be used.
    """
    kind, options = parse_endpoint(description)
    return KINDS[kind].make(Place(name, memory, dma, loop), options)


def _split(description: str) -> list[str]:
    """Split at single commas; a doubled one is part of a word."""
    words = description.replace(",,", "\0").split(",")
    return [word.replace("\0", ",") for word in words]


def _switch(value: str) -> bool:
    """Read ``on`` or ``off``."""
    if value not in {"on", "off"}:
        raise UsageError("expected on or off")
    return value == "on"


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
            "readonly": Option(_switch, "on: the guest can't write, and others may read too"),
            "serial": Option(str, "what the guest sees as serial number, up to 20 characters"),
        },
        _make_blk,
    ),
}
