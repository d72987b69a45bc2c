"""Configuration space of a device in another process, as the VMM sees it, and what is said there.

Reads and writes go to the device. What is changed on the way: there is no ROM,
because a VMM would look for its contents; and no interrupt pin without an
interrupt. What is noticed on the way: bus mastering, resets, and what a device that
starts again has to be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.pci.layout import overlay
from viommu.spec import pci, vfio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from viommu.endpoints.remote.description import Description

__all__ = ["RemoteConfig"]

_NO_ROM: Final = bytes(4)
_NO_PIN: Final = b"\0"


class RemoteConfig:
    """Follows what the guest writes, from one reset of the function to the next."""

    def __init__(self, description: Description) -> None:
        self._layout = description.layout
        self._has_pin = description.irqs[vfio.PCI_INTX_IRQ_INDEX].count > 0
        self._kept = list(_kept_registers(description))
        self._written: dict[int, int] = {}  # bytes, by offset

    @property
    def bus_master(self) -> bool:
        """COMMAND.BUS_MASTER as the guest wrote it."""
        return bool(self._written.get(pci.COMMAND, 0) & pci.COMMAND_MASTER)

    def seen(self, offset: int, data: bytes) -> bytes:
        """Return what the guest sees of what the device answered."""
        shown = bytearray(data)
        overlay(shown, offset, pci.ROM_ADDRESS, _NO_ROM)
        if not self._has_pin:
            overlay(shown, offset, pci.INTERRUPT_PIN, _NO_PIN)
        return bytes(shown)

    def wrote(self, offset: int, data: bytes) -> tuple[bytes, bool]:
        """Follow a write; return what to write instead, and whether it resets the function."""
        filtered = bytearray(data)
        overlay(filtered, offset, pci.ROM_ADDRESS, _NO_ROM)
        resets = self._layout.asks_for_reset(offset, data)
        if resets:
            self.forget()
        else:
            for at, size in self._kept:
                for byte in range(max(at, offset), min(at + size, offset + len(data))):
                    self._written[byte] = data[byte - offset]
        return bytes(filtered), resets

    def forget(self) -> None:
        """The function was reset."""
        self._written.clear()

    def keep_command(self, command: int) -> None:
        """Take what a reset has left in the command register, if the guest had allowed it.

        What the guest has written since counts for more.
        """
        for at, byte in enumerate(command.to_bytes(2, "little"), pci.COMMAND):
            self._written.setdefault(at, byte)

    def kept(self) -> Iterator[tuple[int, bytes]]:
        """Yield the registers that the guest has written since the last reset, in order.

        A device that is started again has to have them when its driver resets no more
        than the device, as a virtio driver does.
        """
        for at, size in self._kept:
            known = [self._written.get(byte) for byte in range(at, at + size)]
            if None not in known:
                yield at, bytes(byte for byte in known if byte is not None)

    def reset_write(self) -> tuple[int, bytes] | None:
        """Return a write that resets the function, if there is one.

        It has the width of the register: libvfio-user takes no other.
        """
        for at, bit in self._layout.reset_bits.items():
            if at % 2:
                return at - 1, bytes([0, bit])
            return at, bytes([bit])
        return None


def _kept_registers(description: Description) -> Iterator[tuple[int, int]]:
    """Yield offset and size of registers that a guest doesn't write again, COMMAND last."""
    for index in range(pci.NUM_BARS):
        yield pci.BASE_ADDRESS_0 + 4 * index, 4
    yield pci.INTERRUPT_LINE, 1
    if (msix := description.layout.find(pci.CAP_ID_MSIX)) is not None:
        yield msix + 2, 2
    yield pci.COMMAND, 2
