"""QEMU's ``iommu-testdev``: writes one word at once, and says whether the IOMMU let it.

Source: QEMU's docs/specs/iommu-testdev.rst, include/hw/misc/iommu-testdev.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from guest_tests.l1.function import Function

__all__ = ["WORD", "WordWriter"]

WORD: Final = 0x12345678.to_bytes(4, "little")

_TRIGGER: Final = 0x00
_ADDRESS: Final = 0x04
_LENGTH: Final = 0x0C
_RESULT: Final = 0x10
_DOORBELL: Final = 0x14
_ATTRIBUTES: Final = 0x18
_READ_BACK: Final = 0x1C

_ARM: Final = 1
_FAULTED: Final = 0xDEAD0002
# It reads back at a physical address. Which one memory of ours has, we don't know: that it finds
# something else there says that it wrote without a fault.
_WRITTEN: Final = (0, 0xDEAD0004)


class WordWriter:
    """An ``iommu-testdev``, through its BAR 0."""

    def __init__(self, function: Function) -> None:
        function.enable()
        self._registers = function.registers32

    def write(self, iova: int, size: int = len(WORD)) -> bool:
        """Write ``size`` bytes of :data:`WORD`, again and again, at ``iova``.

        Returns whether the IOMMU translated it; if not, part may have been written.
        """
        self._set(_ADDRESS, iova & 0xFFFFFFFF)
        self._set(_ADDRESS + 4, iova >> 32)
        self._set(_READ_BACK, 0)
        self._set(_READ_BACK + 4, 0)
        self._set(_LENGTH, size)
        self._set(_ATTRIBUTES, 0)
        self._set(_DOORBELL, _ARM)
        _ = self._registers[_TRIGGER // 4]
        result = self._registers[_RESULT // 4]
        assert result == _FAULTED or result in _WRITTEN, f"the device answers {result:#x}"
        return result != _FAULTED

    def _set(self, register: int, value: int) -> None:
        self._registers[register // 4] = value
