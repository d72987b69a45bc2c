"""The PCI configuration access capability: a window on the BARs in configuration space.

Source: virtio 1.2, 4.1.4.9. Firmware uses it before any BAR has an address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from viommu.pci import Capability
from viommu.spec import pci
from viommu.spec import virtio_pci as spec
from viommu.spec._struct import sizeof

if TYPE_CHECKING:
    from viommu.pci import PciFunction

__all__ = ["ConfigWindow"]

_CAP: Any = spec.Cap
_DATA: Any = spec.CfgCap
_WIDTHS: Final = (1, 2, 4)


class ConfigWindow:
    """Adds the capability to ``function`` and carries out the accesses through it."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function
        size = sizeof(spec.CfgCap)
        body = spec.CAP_BODY.pack(size, spec.CfgType.PCI, 0, 0, 0, 0)
        writable = spec.CAP_BODY.pack(0, 0, 0xFF, 0, 0xFFFFFFFF, 0xFFFFFFFF)
        all_data = b"\xff" * spec.PCI_CFG_DATA_SIZE
        self._offset = function.config.add_capability(
            Capability(
                pci.CAP_ID_VENDOR,
                body + bytes(spec.PCI_CFG_DATA_SIZE),
                writable=writable + all_data,
            )
        )
        data = self._offset + _DATA.pci_cfg_data.offset
        self._data = data
        function.config.before_read(data, spec.PCI_CFG_DATA_SIZE, self._read)
        function.config.after_write(data, spec.PCI_CFG_DATA_SIZE, self._write)

    def _target(self) -> tuple[int, int, int] | None:
        """Return BAR, offset and width, if the driver made them name something."""
        config = self._function.config
        bar = config.u16(self._offset + _CAP.bar.offset) & 0xFF
        offset = config.u32(self._offset + _CAP.offset.offset)
        width = config.u32(self._offset + _CAP.length.offset)
        if width not in _WIDTHS or offset % width:
            return None
        if offset + width > self._function.bar_size(bar):
            return None
        return bar, offset, width

    def _read(self) -> None:
        if target := self._target():
            self._function.config.store(self._data, self._function.region_read(*target))

    def _write(self) -> None:
        if target := self._target():
            bar, offset, width = target
            value = self._function.config.u32(self._data).to_bytes(4, "little")
            self._function.region_write(bar, offset, value[:width])
