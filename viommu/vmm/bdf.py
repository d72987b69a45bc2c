"""PCI addresses: bus, device, function, as lspci writes them."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from viommu.errors import UsageError

__all__ = ["Bdf"]

_TEXT = re.compile(
    r"(?:(?P<segment>[0-9a-f]{1,4}):)?"
    r"(?P<bus>[0-9a-f]{1,2}):(?P<device>[0-9a-f]{1,2})\.(?P<function>[0-9a-f]+)",
    re.IGNORECASE | re.ASCII,
)


class Bdf(NamedTuple):
    """Where a PCI function is: bus 0 to 255, device 0 to 31, function 0 to 7, segment 0."""

    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the address written as ``00:05.0`` or ``0000:00:05.0`` (hexadecimal).

        Raises:
            UsageError: It is not an address, or of a segment other than 0.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is not a PCI address: write BUS:DEVICE.FUNCTION as 00:05.0")
        if int(match["segment"] or "0", 16):
            raise UsageError(f"PCI address {text!r}: only segment 0000 exists, leave it out")
        bus, device, function = (int(match[part], 16) for part in ("bus", "device", "function"))
        if device > 0x1F:
            raise UsageError(f"PCI address {text!r}: device numbers end at 1f")
        if function > 7:
            raise UsageError(f"PCI address {text!r}: function numbers end at 7")
        return cls(bus, device, function)

    @classmethod
    def from_number(cls, number: int) -> Self:
        """Return the address of the 16-bit ``number``."""
        return cls(number >> 8 & 0xFF, number >> 3 & 0x1F, number & 7)

    @property
    def number(self) -> int:
        """The 16-bit routing id: also the endpoint id that the VIOT gives this function."""
        return self.bus << 8 | self.device << 3 | self.function

    def __str__(self) -> str:
        """Write it as lspci does, without the segment: ``00:05.0``."""
        return f"{self.bus:02x}:{self.device:02x}.{self.function:x}"
