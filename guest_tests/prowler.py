"""A hostile device for ``viommu device``: it asks its client for whatever address its driver says.

It passes over its own map of what the client has mapped, which an honest device looks at.
BAR 0, 64-bit registers: start, stride and number of the addresses that it tries; a command,
1 to read and 2 to write four bytes at each, which reads as 0 when it has tried all; how many
it got at, the last four bytes that it read, and, from 0x100 on, the first addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from viommu.endpoints.registry import EndpointKind, Place
from viommu.errors import GuestMemoryError
from viommu.memory import MessageMemory
from viommu.pci import Identity, PciFunction, ResetKind

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["KIND", "Prowler"]

_START, _STRIDE, _COUNT, _COMMAND, _REACHED, _LOOT = range(0, 0x30, 8)
_ADDRESSES: Final = 0x100
_LISTED: Final = 256
_WRITE: Final = 2
_SPOIL: Final = b"EVIL"
_MASK: Final = (1 << 64) - 1


class Prowler(PciFunction):
    """The device."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.name, place.memory, Identity(0x1234, 0xBAD0, class_code=0x00FF00))
        self._place = place
        self._registers: dict[int, int] = {}
        self.add_bar(0, 4096, self)

    def read(self, offset: int, count: int) -> bytes:
        """Read a register."""
        value = self._registers.get(offset & ~7, 0) >> 8 * (offset & 7)
        return (value & (1 << 8 * count) - 1).to_bytes(count, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write a register; a command is carried out when this was answered."""
        self._registers[offset] = int.from_bytes(data, "little")
        if offset == _COMMAND:
            self._place.loop.call_soon(self._prowl)

    def on_reset(self, kind: ResetKind) -> None:
        """Forget everything."""
        del kind
        self._registers.clear()

    def _prowl(self) -> None:
        registers = self._registers
        start, stride, count, command = (registers.get(at, 0) for at in range(0, 0x20, 8))
        reached = []
        for number in range(count):
            address = start + number * stride & _MASK
            if self._get_at(address, write=command == _WRITE):
                reached.append(address)
        registers[_REACHED] = len(reached)
        for at, address in enumerate(reached[:_LISTED]):
            registers[_ADDRESSES + 8 * at] = address
        registers[_COMMAND] = 0

    def _get_at(self, address: int, *, write: bool) -> bool:
        memory = self.memory
        assert isinstance(memory, MessageMemory)
        if memory.port is None:
            return False
        try:
            if write:
                memory.port.write(address, _SPOIL)
            else:
                loot = memory.port.read(address, len(_SPOIL))
                self._registers[_LOOT] = int.from_bytes(loot, "little")
        except GuestMemoryError:
            return False
        return True


def _make(place: Place, options: Mapping[str, Any]) -> Prowler:
    del options
    return Prowler(place)


KIND: Final = EndpointKind("a device that reaches for all of its guest's memory", {}, _make)
