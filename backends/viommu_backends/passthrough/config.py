"""A host device's configuration space as its guest sees it, and what that says of BARs.

The kernel virtualises most of it: BARs are sized and placed there without moving
the device's own. What is left to do: interrupts are messages only (pin 0), there
is no ROM, and a guest's request for a reset is taken out, because the reset is
then done with all that belongs to it.

Source: PCI Local Bus 3.0, chapter 6; ``drivers/vfio/pci/vfio_pci_config.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from viommu.pci.layout import BarPlace, ConfigLayout, overlay
from viommu.spec import pci, vfio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from viommu_backends.vfio_device import HostRegion

__all__ = ["HostConfig"]

_CONFIG: Final = vfio.PCI_CONFIG_REGION_INDEX
_BARS: Final = (pci.BASE_ADDRESS_0, pci.BASE_ADDRESS_0 + 4 * pci.NUM_BARS)
_ROM: Final = (pci.ROM_ADDRESS, pci.ROM_ADDRESS + 4)


class _Device(Protocol):
    """What is used of a :class:`~viommu_backends.vfio_device.VfioDevice`."""

    regions: list[HostRegion]

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read a region."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a region."""


class HostConfig:
    """Configuration space of ``device``; ``size`` is the host's, 256 bytes or 4096.

    Raises:
        BackendError: The device can't be read.
    """

    def __init__(self, device: _Device) -> None:
        self._device = device
        self.size = device.regions[_CONFIG].size
        self._sizes = [region.size for region in device.regions[: pci.NUM_BARS]]
        self._layout = ConfigLayout(device.read(_CONFIG, 0, pci.LEGACY_CONFIG_SPACE_SIZE))
        power = self._layout.find(pci.CAP_ID_PM)
        self._power = power and power + pci.PM_CTRL

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes as the guest sees them."""
        data = bytearray(self._device.read(_CONFIG, offset, count))
        overlay(data, offset, _ROM[0], bytes(4))
        overlay(data, offset, pci.INTERRUPT_PIN, b"\0")
        return bytes(data)

    def filter(self, offset: int, data: bytes) -> tuple[bytes, bool]:
        """Return what to write instead of ``data``, and whether a reset was asked for.

        A function's interrupt pin must stay silent when the guest doesn't know of it.
        """
        filtered = bytearray(data)
        overlay(filtered, offset, _ROM[0], bytes(4))
        silent = pci.COMMAND + 1 - offset
        if 0 <= silent < len(data):
            filtered[silent] |= pci.COMMAND_INTX_DISABLE >> 8
        reset = False
        for at, bit in self._layout.reset_bits.items():
            index = at - offset
            if 0 <= index < len(data) and data[index] & bit:
                filtered[index] &= ~bit
                reset = True
        return bytes(filtered), reset

    def write(self, offset: int, data: bytes) -> None:
        """Write what :meth:`filter` returned."""
        self._device.write(_CONFIG, offset, data)

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self._device.read(_CONFIG, pci.COMMAND, 2), "little")

    @command.setter
    def command(self, value: int) -> None:
        value |= pci.COMMAND_INTX_DISABLE
        self._device.write(_CONFIG, pci.COMMAND, value.to_bytes(2, "little"))

    def forget_bars(self) -> None:
        """Write zeros to all BARs, as after power-on."""
        self._device.write(_CONFIG, _BARS[0], bytes(_BARS[1] - _BARS[0]))

    @property
    def msix(self) -> tuple[BarPlace, ...]:
        """Where the table and the pending bits of MSI-X are; empty without MSI-X."""
        return self._layout.msix

    def places_bars(self, offset: int, size: int) -> bool:
        """Return whether a write there may change where BARs are, or whether they are."""
        spans = [_BARS, (pci.COMMAND, pci.COMMAND + 2)]
        if self._power is not None:
            spans.append((self._power, self._power + 2))
        return any(offset < end and start < offset + size for start, end in spans)

    def starts_dma(self, offset: int, data: bytes) -> bool:
        """Return whether a write of ``data`` allows the device to do DMA."""
        at = pci.COMMAND - offset
        return 0 <= at < len(data) and bool(data[at] & pci.COMMAND_MASTER)

    def bars(self, offset: int = 0, data: bytes = b"") -> dict[int, int]:
        """Return the guest physical address of every memory BAR that is decoded now.

        With ``data``, of those that would be if it were written at ``offset``. What a
        BAR reads as while its size is asked for is no address, and neither is 0.
        """
        now = self._device.read(_CONFIG, 0, pci.HEADER_SIZE)
        header = bytearray(now)
        overlay(header, 0, offset, data)
        command = int.from_bytes(header[pci.COMMAND : pci.COMMAND + 2], "little")
        if not command & pci.COMMAND_MEMORY or not self._is_awake(offset, data):
            return {}
        return dict(_addresses(_registers(header), _registers(now), self._sizes))

    def _is_awake(self, offset: int, data: bytes) -> bool:
        if self._power is None:
            return True
        state = bytearray(self._device.read(_CONFIG, self._power, 1))
        overlay(state, self._power, offset, data)
        return state[0] & pci.PM_CTRL_STATE == pci.PM_STATE_D0


def _registers(header: bytes | bytearray) -> list[int]:
    """Return the BAR registers."""
    return [int.from_bytes(header[at : at + 4], "little") for at in range(_BARS[0], _BARS[1], 4)]


def _addresses(
    registers: Sequence[int], types: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield index and address of every memory BAR that has one.

    ``types`` are registers whose low bits, which nobody can write, are as they are.
    """
    index = 0
    while index < pci.NUM_BARS:
        low, first = types[index], index
        address, bits = registers[index] & pci.BAR_ADDRESS, 32
        index += 1
        if low & pci.BAR_IO:
            continue
        if low & pci.BAR_TYPE == pci.BAR_MEM_64 and index < pci.NUM_BARS:
            address, bits = address | registers[index] << 32, 64
            index += 1
        size = sizes[first]
        if size and address and address != -size & (1 << bits) - 1:
            yield first, address
