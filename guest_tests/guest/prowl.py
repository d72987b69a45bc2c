"""A driver in user space that lets a hostile device try all addresses, see prowler.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from guest_tests.guest import system
from guest_tests.guest.vfio import Container, Memory

if TYPE_CHECKING:
    from guest_tests.guest.vfio import Device

__all__ = ["everywhere"]

_PAGE = 4096
_READ_ONLY, _WRITABLE, _NOWHERE = 0x100000, 0x102000, 0x200000
_READ, _WRITE = 1, 2
_START, _STRIDE, _COUNT, _COMMAND, _REACHED, _LOOT = range(6)
_ADDRESSES = 0x100 // 8
_SECRET, _SPOIL = b"KEEP", b"EVIL"
_TIMEOUT = 30.0

#: Start, stride, number: around what is mapped, all guest memory, all there can be, the last ones.
_PLACES = (
    (0, _PAGE, 600),
    (0, 1 << 20, 1024),
    (0, 1 << 58, 64),
    ((1 << 64) - 4 * _PAGE, _PAGE, 4),
    (_READ_ONLY - 3, 1, 3),
    (_READ_ONLY + _PAGE - 3, 1, 3),
    (_WRITABLE + _PAGE - 3, 1, 3),
)


def everywhere(bdf: str) -> list[dict[str, Any]]:
    """Map a page to be read and one to be written, and let the device try all it can think of.

    Returns the address of three accesses that are blocked, and what the kernel's log says.

    Raises:
        AssertionError: It got at something else, or not at these.
    """
    memory = Memory(3 * _PAGE)
    with Container(bdf) as container:
        device = container.devices[bdf]
        device.enable()
        # Before it is mapped: of memory that nobody has written, Linux before 6.2 gives a device
        # that may only read the page of zeros, and goes on doing so.
        memory[0 : 3 * _PAGE] = expected = _SECRET * (3 * _PAGE // 4)
        container.map(_READ_ONLY, memory, size=_PAGE, write=False)
        container.map(_WRITABLE, memory, offset=_PAGE, size=_PAGE)
        outcomes = [
            _reported(device, iova, command)
            for iova, command in ((_NOWHERE, _READ), (_NOWHERE, _WRITE), (_READ_ONLY, _WRITE))
        ]
        for place in _PLACES:
            start, stride, count = place
            tried = range(start, start + stride * count, stride)
            expected_at = [iova for iova in (_READ_ONLY, _WRITABLE) if iova in tried]
            reached = _try(device, *place, _READ)
            assert reached == expected_at, f"it read at {reached} from {place}"
        assert device.registers64[_LOOT].to_bytes(8, "little")[:4] == _SECRET
        assert memory[0 : 3 * _PAGE] == expected, "reading has changed memory"
        for place in _PLACES:
            written = _try(device, *place, _WRITE)
            assert set(written) <= {_WRITABLE}, f"it wrote at {written} from {place}"
        spoilt = expected[:_PAGE] + _SPOIL + expected[_PAGE + 4 :]
        assert memory[0 : 3 * _PAGE] == spoilt, "it did not write where it may, or elsewhere"
        for start in (_READ_ONLY, _WRITABLE):
            assert container.unmap(start, _PAGE) == _PAGE
        for command in (_READ, _WRITE):
            assert not _try(device, 0, _PAGE, 600, command), "it got at what is unmapped"
        assert memory[0 : 3 * _PAGE] == spoilt
    return outcomes


def _try(device: Device, start: int, stride: int, count: int, command: int) -> list[int]:
    """Let the device try addresses; return the first of those where it could."""
    registers = device.registers64
    registers[_START] = start
    registers[_STRIDE] = stride
    registers[_COUNT] = count
    registers[_COMMAND] = command
    deadline = time.monotonic() + _TIMEOUT
    while registers[_COMMAND]:
        assert time.monotonic() < deadline, f"{count} attempts took more than {_TIMEOUT} s"
        time.sleep(0.01)
    return [registers[_ADDRESSES + number] for number in range(registers[_REACHED])]


def _reported(device: Device, iova: int, command: int) -> dict[str, Any]:
    """Let the device do what it must not, until the kernel has logged it.

    It logs ten faults in five seconds, and drops others.
    """
    deadline = time.monotonic() + _TIMEOUT
    while True:
        position = system.log_position()
        assert not _try(device, iova, 0, 1, command), f"it got at {iova:#x}"
        try:
            log = system.wait_for_log(rf"fault from EP \d+ at {iova:#x}", position, timeout=1.0)
        except TimeoutError:
            assert time.monotonic() < deadline, f"the kernel logs no fault at {iova:#x}"
        else:
            return {"iova": iova, "kind": "R" if command == _READ else "W", "log": log}
