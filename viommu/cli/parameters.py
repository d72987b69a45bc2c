"""What the text of an option means: sizes, PCI addresses, endpoints, page sizes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from viommu.errors import UsageError
from viommu.vmm import Bdf

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "EndpointArgument",
    "parse_endpoint",
    "parse_limit",
    "parse_page_sizes",
    "parse_size",
    "parsed",
]

_SIZE: Final = re.compile(r"(\d+)(?:([KMGT])(?:i?B)?)?", re.IGNORECASE | re.ASCII)
_SHIFT: Final = {"K": 10, "M": 20, "G": 30, "T": 40}
_LIMIT: Final = 1 << 64


class EndpointArgument(NamedTuple):
    """``00:07.0=blk,path=disk.img``: where an endpoint is, and what."""

    bdf: Bdf
    spec: str


def parsed(parse: Callable[[str], object]) -> Callable[..., Any]:
    """Return the click callback that puts an option's text through ``parse``.

    An option given several times comes as a tuple, one that was not given as ``None``.
    """

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> object:
        try:
            if isinstance(value, tuple):
                return tuple(parse(text) for text in value)
            return None if value is None else parse(value)
        except UsageError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return callback


def parse_size(text: str) -> int:
    """Return the bytes that ``512M``, ``4K`` or ``4096`` mean (powers of 1024).

    Raises:
        UsageError: It is no size, or not below 2**64.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size: write a number of bytes, or 512M")
    size = int(match[1]) << _SHIFT.get((match[2] or "").upper(), 0)
    if size >= _LIMIT:
        raise UsageError(f"{text!r} is more than a 64-bit machine has")
    return size


def parse_page_sizes(text: str) -> int:
    """Return the mask of the page sizes of ``4K,2M,1G``: each one is its own bit.

    Raises:
        UsageError: One is not a power of two, or none is as small as a guest's page.
    """
    mask = 0
    for part in text.split(","):
        size = parse_size(part)
        if size.bit_count() != 1:
            raise UsageError(f"page size {part!r} is not a power of two")
        mask |= size
    return mask


def parse_endpoint(text: str) -> EndpointArgument:
    """Return the address and the device of ``00:06.0=edu``.

    Raises:
        UsageError: There is no ``=``, or no PCI address before it.
    """
    address, equals, spec = text.partition("=")
    if not equals or not spec:
        raise UsageError(
            f"{text!r} is not an endpoint: write BUS:DEVICE.FUNCTION=KIND as 00:06.0=edu"
        )
    return EndpointArgument(Bdf.parse(address), spec)


def parse_limit(text: str) -> tuple[str, int]:
    """Return the name and the number of ``mappings=65536``; a number can be ``64K``.

    Raises:
        UsageError: There is no ``=``, or no number after it.
    """
    name, equals, number = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{text!r} is not a limit: write NAME=NUMBER as mappings=65536")
    return name, parse_size(number)
