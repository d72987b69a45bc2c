"""PCI Express configuration space: bytes, which of their bits a driver may change, hooks.

Source: PCI Local Bus 3.0, chapter 6. An access of any width anywhere is fine: a
write changes what is writable and nothing else, as on real hardware, and never
fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import UsageError
from viommu.spec import pci as spec

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Capability", "ConfigSpace", "Identity"]

_FIRST_CAPABILITY: Final = spec.HEADER_SIZE


class Identity(NamedTuple):
    """What a function says it is; ``class_code`` is base class, subclass, interface."""

    vendor_id: int
    device_id: int
    class_code: int
    revision: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0


class Capability(NamedTuple):
    """A capability without its two header bytes; masks may be shorter than ``body``."""

    cap_id: int
    body: bytes
    writable: bytes = b""
    clear_on_one: bytes = b""


class _Hook(NamedTuple):
    start: int
    end: int
    callback: Callable[[], None]


class ConfigSpace:
    """4096 bytes of configuration space of a type 0 function.

    The device :meth:`define` s contents and masks once; :meth:`reset` brings the
    contents back. The ROM BAR reads as zero whatever is written (there is no
    ROM), and the interrupt pin is zero: interrupts are messages.
    """

    def __init__(self, identity: Identity) -> None:
        self._bytes = bytearray(spec.CONFIG_SPACE_SIZE)
        self._initial = bytearray(spec.CONFIG_SPACE_SIZE)
        self._writable = bytearray(spec.CONFIG_SPACE_SIZE)
        self._clear_on_one = bytearray(spec.CONFIG_SPACE_SIZE)
        self._readers: list[_Hook] = []
        self._writers: list[_Hook] = []
        self._last_capability = spec.CAPABILITY_LIST
        self._free = _FIRST_CAPABILITY
        self._define_header(identity)

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes; beyond the end they are zero."""
        for hook in self._readers:
            # A dump of everything must not set off what a register access does.
            if hook.start <= offset and offset + count <= hook.end:
                hook.callback()
        return bytes(self._bytes[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Change the writable bits that ``data`` covers; hooks run when all of it is stored."""
        data = data[: max(0, spec.CONFIG_SPACE_SIZE - offset)]
        for index, byte in enumerate(data, offset):
            writable = self._writable[index]
            kept = self._bytes[index] & ~(byte & self._clear_on_one[index])
            self._bytes[index] = kept & ~writable | byte & writable
        for hook in self._writers:
            if offset < hook.end and hook.start < offset + len(data):
                hook.callback()

    def define(
        self, offset: int, data: bytes, *, writable: bytes = b"", clear_on_one: bytes = b""
    ) -> None:
        """Set the contents after power-on, and which bits of them a driver may change.

        Raises:
            UsageError: It does not fit.
        """
        if offset + len(data) > spec.CONFIG_SPACE_SIZE:
            raise UsageError(f"{len(data)} bytes at {offset:#x} are beyond configuration space")
        span = slice(offset, offset + len(data))
        self._initial[span] = self._bytes[span] = data
        self._writable[span] = writable.ljust(len(data), b"\0")
        self._clear_on_one[span] = clear_on_one.ljust(len(data), b"\0")

    def store(self, offset: int, data: bytes) -> None:
        """Change contents on the device's behalf, until the next :meth:`reset`."""
        self._bytes[offset : offset + len(data)] = data

    def u16(self, offset: int) -> int:
        """Return a 16-bit register, without hooks."""
        return int.from_bytes(self._bytes[offset : offset + 2], "little")

    def u32(self, offset: int) -> int:
        """Return a 32-bit register, without hooks."""
        return int.from_bytes(self._bytes[offset : offset + 4], "little")

    def before_read(self, offset: int, size: int, callback: Callable[[], None]) -> None:
        """Call back before a read that lies inside these bytes, to bring them up to date."""
        self._readers.append(_Hook(offset, offset + size, callback))

    def after_write(self, offset: int, size: int, callback: Callable[[], None]) -> None:
        """Call back after a write that touches these bytes."""
        self._writers.append(_Hook(offset, offset + size, callback))

    def add_capability(self, capability: Capability) -> int:
        """Append a capability to the chain; return its offset.

        Raises:
            UsageError: No room below 256 bytes, where the chain must stay.
        """
        offset = self._free
        end = offset + 2 + len(capability.body)
        if end > spec.LEGACY_CONFIG_SPACE_SIZE:
            raise UsageError(f"no room for capability {capability.cap_id:#x} at {offset:#x}")
        self.define(offset, bytes([capability.cap_id, 0]))
        self.define(
            offset + 2,
            capability.body,
            writable=capability.writable,
            clear_on_one=capability.clear_on_one,
        )
        # The pointer to the next one is the second byte of a capability.
        self.define(self._last_capability, bytes([offset]))
        self._last_capability = offset + 1
        self._free = -(-end // 4) * 4
        status = spec.STATUS_CAP_LIST | self.u16(spec.STATUS)
        self._initial[spec.STATUS : spec.STATUS + 2] = status.to_bytes(2, "little")
        self.store(spec.STATUS, status.to_bytes(2, "little"))
        return offset

    def reset(self) -> None:
        """Bring everything back to what it was after power-on; no hook runs."""
        self._bytes[:] = self._initial

    def _define_header(self, identity: Identity) -> None:
        vendor, device = identity.vendor_id, identity.device_id
        self.define(spec.VENDOR_ID, _words(vendor, device))
        command = (
            spec.COMMAND_MEMORY
            | spec.COMMAND_MASTER
            | spec.COMMAND_PARITY
            | spec.COMMAND_SERR
            | spec.COMMAND_INTX_DISABLE
        )
        self.define(spec.COMMAND, _words(0), writable=_words(command))
        self.define(spec.STATUS, _words(0), clear_on_one=_words(spec.STATUS_ERRORS))
        self.define(spec.REVISION_ID, bytes([identity.revision]))
        self.define(spec.CLASS_PROG, identity.class_code.to_bytes(3, "little"))
        self.define(spec.CACHE_LINE_SIZE, b"\0", writable=b"\xff")
        self.define(spec.HEADER_TYPE, bytes([spec.HEADER_TYPE_NORMAL]))
        self.define(
            spec.SUBSYSTEM_VENDOR_ID, _words(identity.subsystem_vendor_id, identity.subsystem_id)
        )
        self.define(spec.INTERRUPT_LINE, b"\0", writable=b"\xff")


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(2, "little") for value in values)
