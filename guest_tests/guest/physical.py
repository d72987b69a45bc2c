"""A PCI function that no IOMMU is in front of, and memory whose physical addresses are known."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from guest_tests.guest import edu, pci
from guest_tests.guest.edu import Edu
from guest_tests.guest.vfio import Memory

__all__ = ["both_ways", "strays"]

_PAGE = mmap.PAGESIZE
_PRESENT = 1 << 63  # in /proc/PID/pagemap, of which the lower 55 bits are the page's number
_NUMBER = (1 << 55) - 1
_NOWHERE = 1 << 40

_COMMAND = 4  # in configuration space
_COMMAND_MEMORY = 2
_COMMAND_MASTER = 4


class Function:
    """A function whose BAR 0 and configuration space sysfs gives us."""

    def __init__(self, bdf: str) -> None:
        pci.unbind(bdf)
        self._config = pci.path(bdf) / "config"
        resource = os.open(pci.path(bdf) / "resource0", os.O_RDWR | os.O_SYNC)
        bar = mmap.mmap(resource, os.fstat(resource).st_size)
        os.close(resource)
        self.registers32 = memoryview(bar).cast("I")
        self.registers64 = memoryview(bar).cast("Q")

    def enable(self, *, master: bool = True) -> None:
        """Let the function decode its BARs, and do DMA if ``master``."""
        command = _COMMAND_MEMORY | (_COMMAND_MASTER if master else 0)
        with self._config.open("r+b", buffering=0) as config:
            config.seek(_COMMAND)
            config.write(struct.pack("<H", command))


def both_ways(bdf: str) -> None:
    """Copy pages of memory through the device, by their physical addresses.

    Raises:
        AssertionError: Something else arrived, or something beside it changed.
    """
    device = Edu(Function(bdf))
    source, target = Memory(4 * _PAGE), Memory(4 * _PAGE)
    source[:] = os.urandom(source.size)
    target[:] = bytes(target.size)
    expected = bytearray(target.size)
    # Neighbours in one address space are none in the other: never past the end of a page.
    for start, count in ((0, _PAGE), (_PAGE + 1, 3), (3 * _PAGE - 5, 5), (3 * _PAGE + 2048, 2048)):
        _expect("ok", device.read(_physical(source, start), count))
        _expect("ok", device.write(_physical(target, start), count))
        expected[start : start + count] = source[start : start + count]
        assert target[:] == expected, f"{count} bytes at {start:#x} didn't arrive as they left"


def strays(bdf: str) -> list[str]:
    """Let the device touch what is no memory, and memory without the bus; return the results."""
    function = Function(bdf)
    device = Edu(function)
    memory = Memory(_PAGE)
    memory[0:4] = b"mine"
    results = [device.read(_NOWHERE, 4), device.write(_NOWHERE, 4)]
    function.enable(master=False)
    results.append(device.write(_physical(memory, 0), 4))
    function.enable()
    assert memory[0:4] == b"mine", "a device that must not use the bus wrote memory"
    results.append(device.write(_physical(memory, 0), 4))
    return results


def _physical(memory: Memory, offset: int) -> int:
    """Return where a byte of ``memory``, which was written to, is for a device."""
    address = memory.address + offset
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // _PAGE * 8)
        (entry,) = struct.unpack("<Q", pagemap.read(8))
    assert entry & _PRESENT, "a page that was written to isn't there"
    return int((entry & _NUMBER) * _PAGE + address % _PAGE)


def _expect(result: str, got: str) -> None:
    assert got in {result, edu.UNKNOWN}, f"the transfer ended with {got}, not {result}"
