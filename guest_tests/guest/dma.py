"""A driver in user space that lets ``edu`` do what it may, and what it must not."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from guest_tests.guest import disk, edu, system
from guest_tests.guest.edu import Edu
from guest_tests.guest.vfio import Container, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "beside_disk",
    "both_ways",
    "exhaust",
    "give_back",
    "one_domain",
    "strays",
    "successive_domains",
    "take",
    "unmap_held",
    "unmap_of_the_dead",
]

_PAGE = 4096
_IOVA = 0x100000
_UNMAPPED = 0x200000
_STRIDE = 2 * _PAGE  # keeps mappings apart, so that nobody merges them
_WORD = 4  # of a stray: QEMU's own device reports each word, and Linux prints ten in five seconds


def both_ways(bdf: str) -> None:
    """Copy memory to memory through the device, at odd addresses and across two mappings.

    Raises:
        AssertionError: Something else arrived, or something beside it changed.
    """
    source, target = Memory(2 * _PAGE), Memory(2 * _PAGE)
    source[:] = os.urandom(source.size)
    with Container(bdf) as container:
        device = Edu(container.devices[bdf])
        # Mapped page by page, the pages crossed: neighbours in IOVA are not in memory.
        for memory, start in ((source, _IOVA), (target, _UNMAPPED)):
            container.map(start, memory, offset=_PAGE, size=_PAGE, write=memory is target)
            container.map(start + _PAGE, memory, size=_PAGE, write=memory is target)
        expected = bytearray(2 * _PAGE)
        crossed = source[_PAGE : 2 * _PAGE] + source[0:_PAGE]
        for start, count in ((0, _PAGE), (1, 3), (_PAGE - 5, 9), (2 * _PAGE - 1, 1), (2048, 4096)):
            _expect("ok", device.read(_IOVA + start, count))
            _expect("ok", device.write(_UNMAPPED + start, count))
            expected[start : start + count] = crossed[start : start + count]
            arrived = target[_PAGE : 2 * _PAGE] + target[0:_PAGE]
            assert arrived == expected, f"{count} bytes at {start:#x} didn't arrive as they left"


def beside_disk(bdf: str, disk_bdf: str, files: dict[str, int]) -> int:
    """Copy as :func:`both_ways` while files are written to a disk; return how often.

    Raises:
        AssertionError: Data went wrong on either side.
    """
    written: dict[str, str] = {}
    writer = threading.Thread(target=lambda: written.update(disk.fill(disk_bdf, files)))
    writer.start()
    copies = 0
    while writer.is_alive() or not copies:
        both_ways(bdf)
        copies += 1
    writer.join()
    assert written.items() <= disk.sums(disk_bdf).items(), "the disk doesn't have what was written"
    return copies


def strays(bdf: str) -> list[dict[str, Any]]:
    """Let the device touch what it must not; return for each what, where, and the kernel's log.

    Raises:
        AssertionError: A byte got through, in either direction.
    """
    memory = Memory(_PAGE)
    secret, shown = b"SECR", b"show"
    with Container(bdf) as container:
        device = Edu(container.devices[bdf])
        container.map(_IOVA, memory, write=False)

        def attempt(what: str, iova: int, access: Callable[[int, int], str]) -> dict[str, Any]:
            memory[0:_WORD] = secret
            position = system.log_position()
            result = access(iova, _WORD)
            _expect("translation fault", result)
            assert memory[0:_WORD] == secret, f"{what}: the device wrote to memory"
            log = system.wait_for_log(rf"fault from EP \d+ at {iova:#x}", after=position)
            return {"what": what, "iova": iova, "result": result, "log": log}

        memory[0:_WORD] = shown
        _expect("ok", device.read(_IOVA, _WORD))
        outcomes = [
            attempt("read of an unmapped address", _UNMAPPED, device.read),
            attempt("write to an unmapped address", _UNMAPPED + 256, device.write),
            attempt("write to a read-only mapping", _IOVA, device.write),
        ]
        assert container.unmap(_IOVA, _PAGE) == _PAGE
        outcomes += [
            attempt("read after unmap", _IOVA + 512, device.read),
            attempt("write after unmap", _IOVA + 1024, device.write),
        ]
        # Whatever the refused reads left in the device's buffer, it isn't what was in memory.
        memory[0:_WORD] = bytes(_WORD)
        container.map(_IOVA, memory)
        _expect("ok", device.write(_IOVA, _WORD))
        assert memory[0:_WORD] != secret, "a refused read got through"
    return outcomes


def unmap_held(bdf: str, milliseconds: int, policy: int) -> dict[str, Any]:
    """Unmap memory while the device holds a transfer into it open for ``milliseconds``.

    Returns how long the guest's unmap took (seconds), the device's times (nanoseconds of its
    clock), its result, and whether the data had arrived when the unmap returned.
    """
    memory = Memory(_PAGE)
    with Container(bdf) as container:
        device = Edu(container.devices[bdf])
        container.map(_IOVA, memory)
        memory[0:64] = data = os.urandom(64)
        _expect("ok", device.read(_IOVA, 64))
        memory[0:64] = bytes(64)
        device.hold(milliseconds, policy)
        device.start_write(_IOVA, 64)
        before = time.monotonic()
        assert container.unmap(_IOVA, _PAGE) == _PAGE
        after = time.monotonic()
        arrived = memory[0:64] == data
        return {
            "seconds": after - before,
            "arrived": arrived,
            "result": device.wait(),
            "times": device.times(),
        }


def unmap_of_the_dead(bdf: str, milliseconds: int) -> float:
    """Unmap memory that the device holds for longer than it may, and dies for.

    Returns how long the guest's unmap took (seconds).

    Raises:
        AssertionError: The device is there still.
    """
    memory = Memory(_PAGE)
    with Container(bdf) as container:
        device = Edu(container.devices[bdf])
        container.map(_IOVA, memory)
        device.hold(milliseconds)
        device.start_write(_IOVA, 64)
        before = time.monotonic()
        assert container.unmap(_IOVA, _PAGE) == _PAGE
        after = time.monotonic()
        assert device.result() == edu.UNKNOWN, "its registers can still be read"
        return after - before


def one_domain(first: str, second: str) -> list[dict[str, Any]]:
    """Put two functions into one IOVA space; return what each stray of theirs made the log say.

    Raises:
        AssertionError: One doesn't see a mapping that the other does, or either still does
            after it was removed.
    """
    memory = Memory(2 * _PAGE)
    outcomes = []
    with Container(first) as container:
        container.map(_IOVA, memory, size=_PAGE)
        container.add(second)  # what is mapped already must be there for it, too
        container.map(_IOVA + _PAGE, memory, offset=_PAGE, size=_PAGE)
        devices = {bdf: Edu(device) for bdf, device in container.devices.items()}
        memory[0:64] = data = os.urandom(64)
        _expect("ok", devices[first].read(_IOVA, 64))
        _expect("ok", devices[first].write(_IOVA + _PAGE, 64))
        _expect("ok", devices[second].read(_IOVA + _PAGE, 64))
        _expect("ok", devices[second].write(_IOVA + 2048, 64))
        assert memory[2048:2112] == data, "the data didn't go through both devices"
        assert container.unmap(_IOVA, _PAGE) == _PAGE
        for bdf, device in devices.items():
            position = system.log_position()
            _expect("translation fault", device.write(_IOVA, _WORD))
            log = system.wait_for_log(rf"fault from EP \d+ at {_IOVA:#x}", after=position)
            outcomes.append({"bdf": bdf, "iova": _IOVA, "log": log})
        assert memory[0:64] == data
    return outcomes


def successive_domains(bdf: str) -> dict[str, Any]:
    """Move a function from one IOVA space to another; return what its stray made the log say.

    Raises:
        AssertionError: It reached what only the first space had mapped.
    """
    memory = Memory(_PAGE)
    with Container(bdf) as container:
        container.map(_IOVA, memory)
        _expect("ok", Edu(container.devices[bdf]).write(_IOVA, 64))
    with Container(bdf) as container:
        device = Edu(container.devices[bdf])
        container.map(_UNMAPPED, memory)
        position = system.log_position()
        _expect("translation fault", device.write(_IOVA, _WORD))
        log = system.wait_for_log(rf"fault from EP \d+ at {_IOVA:#x}", after=position)
        memory[0:64] = data = os.urandom(64)
        _expect("ok", device.read(_UNMAPPED, 64))
        _expect("ok", device.write(_UNMAPPED + 2048, 64))
        assert memory[2048:2112] == data
    return {"bdf": bdf, "iova": _IOVA, "log": log}


def exhaust(bdf: str, limit: int) -> dict[str, str]:
    """Map ``limit`` pages and one more, then that one again in the place of another.

    Returns how the device's use of them ended, or why they couldn't be mapped.
    """
    memory = Memory(_PAGE)

    def use(number: int) -> str:
        try:
            container.map(_IOVA + number * _STRIDE, memory)
        except OSError as error:
            return os.strerror(error.errno or 0)
        return device.write(_IOVA + number * _STRIDE, _WORD)

    with Container(bdf) as container:
        device = Edu(container.devices[bdf])
        outcomes = [use(number) for number in range(limit)]
        one_more = use(limit)
        if one_more in edu.RESULTS.values():
            container.unmap(_IOVA + limit * _STRIDE, _PAGE)
        container.unmap(_IOVA, _PAGE)
        return {
            "last allowed": outcomes[-1],
            "one more": one_more,
            "after an unmap": use(limit),
        }


def take(bdf: str) -> None:
    """Move a function into an IOVA space with one mapping, until :func:`give_back`."""
    container = Container(bdf)
    _taken.append(container)
    container.map(_IOVA, Memory(_PAGE))


def give_back() -> None:
    """Close what :func:`take` opened."""
    while _taken:
        with _taken.pop():
            pass


_taken: list[Container] = []


def _expect(result: str, got: str) -> None:
    """Compare results; QEMU's own device tells none."""
    assert got in {result, edu.UNKNOWN}, f"the transfer ended with {got}, not {result}"
