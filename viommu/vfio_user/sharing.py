"""Is guest memory really shared with us? Tell a VMM that keeps it to itself.

There are two ways to get it wrong. Memory without a file comes without a file
descriptor, which is easy to see. Memory with a private copy of a file
(``share=off``) comes with one, and then we read zeros and what we write is lost.
That is found in two ways: the VMM's own ``/proc/PID/maps`` says so at once where
it may be read; otherwise pages are compared with what DMA_READ makes of them.
"""

from __future__ import annotations

import enum
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

from viommu.errors import GuestMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from viommu.memory import FileKey, GuestMemory, MemoryRegion

__all__ = [
    "REMEDY",
    "SharingProbe",
    "Verdict",
    "classify_maps",
    "look_at_peer",
    "why_out_of_reach",
    "why_private",
]

REMEDY: Final = (
    "start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on"
    " -machine memory-backend=mem"
)

_PAGE: Final = 4096
_SAMPLES: Final = 16
_MAX_READS: Final = 256
_MAX_HINTS: Final = 16


class Verdict(enum.Enum):
    """What is known about a client's memory."""

    UNKNOWN = "unknown"
    SHARED = "shared"
    PRIVATE = "private"


def why_out_of_reach(regions: Iterable[MemoryRegion]) -> str | None:
    """Return why RAM can't be reached, or ``None``: it can, or none is mapped yet.

    Some regions legitimately come without a file: firmware, which is read-only,
    and BARs of other devices. So the RAM is missing when nothing that is writable
    has a file, or when what lies at address 0 is writable and has none.
    """
    writable = [region for region in regions if region.writable]
    without = [region for region in writable if not region.shared]
    if without and (len(without) == len(writable) or without[0].gpa == 0):
        region = without[0]
        return (
            f"guest memory at {region.gpa:#x} ({region.size:#x} bytes) came without a file"
            f" descriptor, so this process can't reach it: {REMEDY}"
        )
    return None


def why_private() -> str:
    """Say that the memory is a private copy, and what to do."""
    return (
        "guest memory is a private copy of its file (share=off), so this process reads zeros"
        f" and what it writes is lost: {REMEDY}"
    )


def classify_maps(maps: Iterable[str], key: FileKey) -> Verdict:
    """Return how the process whose ``/proc/PID/maps`` lines these are maps a file.

    UNKNOWN when it doesn't map the file (the VMM may be another process).
    """
    device = f"{os.major(key.device):02x}:{os.minor(key.device):02x}"
    verdict = Verdict.UNKNOWN
    for line in maps:
        fields = line.split(maxsplit=5)
        if len(fields) < 5 or fields[3] != device or fields[4] != str(key.inode):
            continue
        if fields[1][3:] == "s":
            return Verdict.SHARED
        verdict = Verdict.PRIVATE
    return verdict


def look_at_peer(pid: int, regions: Sequence[MemoryRegion]) -> Verdict:
    """Return how the process ``pid`` maps the files of ``regions``.

    PRIVATE if it does so with any file that holds writable memory; UNKNOWN where
    it can't be said, or is ourselves, who map it shared in any case.
    """
    files = {region.file.key for region in regions if region.file and region.writable}
    if not files or pid <= 0 or pid == os.getpid():
        return Verdict.UNKNOWN
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:  # another user's, another namespace's, or gone
        return Verdict.UNKNOWN
    verdicts = {classify_maps(maps, key) for key in files}
    if Verdict.PRIVATE in verdicts:
        return Verdict.PRIVATE
    return verdicts.pop() if len(verdicts) == 1 else Verdict.UNKNOWN


class SharingProbe:
    """Compares pages as we see them with what the client reads from the same addresses.

    It does no I/O: whoever has the socket asks :meth:`next_read` what to read and
    gives the data to :meth:`answer`. One read is out at a time. A client that
    never answers is never asked again.

    A page that is zero for us and not for the client, twice, while it doesn't
    change for us, proves a private copy. A page that is equal and not zero
    proves sharing, which ends all probing.
    """

    def __init__(self, memory: GuestMemory, *, enabled: bool) -> None:
        self.verdict = Verdict.UNKNOWN
        self._memory = memory
        self._enabled = enabled
        self._touched = 0
        self._hints = 0
        self._reads = 0
        # Pages to compare, and whether they were seen to differ before.
        self._todo: deque[tuple[int, bool]] = deque()
        # The page that the client is reading: address, what we saw there, differed before.
        self._asked: tuple[int, bytes, bool] | None = None

    def touched(self) -> None:
        """Note that the guest's driver used the device, so its memory can't be all zeros.

        At the first, second, fourth, eighth ... such moment pages spread over
        the memory are sampled; when all are zero, that is suspicious.
        """
        self._touched += 1
        if self._touched & (self._touched - 1) or not self._wanted():
            return
        pages = self._spread()
        if not any(any(self._page(gpa)) for gpa in pages):
            self._todo.extend((gpa, False) for gpa in pages)

    def suspect(self, gpa: int | None = None) -> None:
        """Compare the page at ``gpa``, or some, because the device misses what must be there."""
        if self._hints < _MAX_HINTS and self._wanted():
            self._hints += 1
            pages = self._spread() if gpa is None else [gpa - gpa % _PAGE]
            self._todo.extend((page, False) for page in pages)

    def next_read(self) -> tuple[int, int] | None:
        """Return the address and size that the client is to read now, if any."""
        while self._todo and self._asked is None and self._wanted():
            gpa, differed = self._todo.popleft()
            if seen := self._page(gpa):
                self._reads += 1
                self._asked = (gpa, seen, differed)
                return gpa, len(seen)
        return None

    def answer(self, data: bytes | None) -> Verdict:
        """Take the data that :meth:`next_read` asked for, ``None`` if the client failed."""
        if self._asked is None:
            return self.verdict
        gpa, before, differed = self._asked
        self._asked = None
        after = self._page(gpa)
        if data is None or len(data) != len(before):
            self._enabled = False
        elif data in (before, after):
            if any(data):
                self.verdict = Verdict.SHARED
        elif before == after:
            # Once may be a coincidence: the guest wrote, and wrote back.
            if differed:
                self.verdict = Verdict.PRIVATE
            else:
                self._todo.appendleft((gpa, True))
        return self.verdict

    def _wanted(self) -> bool:
        return self._enabled and self.verdict is Verdict.UNKNOWN and self._reads < _MAX_READS

    def _page(self, gpa: int) -> bytes:
        try:
            return self._memory.read(gpa, _PAGE)
        except GuestMemoryError:  # gone since it was chosen, or a hint that led nowhere
            return b""

    def _spread(self) -> list[int]:
        """Return the addresses of some pages, spread evenly over memory that has a file."""
        regions = [r for r in self._memory.regions() if r.shared and r.readable and r.writable]
        total = sum(region.size // _PAGE for region in regions)
        samples = min(_SAMPLES, total)
        wanted = iter([total * i // samples for i in range(samples)])
        number = next(wanted, None)
        pages: list[int] = []
        first = 0
        for region in regions:
            count = region.size // _PAGE
            while number is not None and number < first + count:
                pages.append(region.gpa + (number - first) * _PAGE)
                number = next(wanted, None)
            first += count
        return pages
