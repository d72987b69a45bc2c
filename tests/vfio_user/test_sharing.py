from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from viommu.memory import FileKey, GuestMemory, MappedFiles, MemoryRegion
from viommu.vfio_user.sharing import (
    REMEDY,
    SharingProbe,
    Verdict,
    classify_maps,
    look_at_peer,
    why_out_of_reach,
    why_private,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from viommu.memory import MappedFile

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def ram(files: MappedFiles, memfd: Callable[..., int]) -> Iterator[MappedFile]:
    file = files.get(memfd(64 * PAGE), 0, 64 * PAGE, writable=True)
    yield file
    file.close()


@pytest.fixture
def memory(files: MappedFiles, memfd: Callable[..., int]) -> Iterator[GuestMemory]:
    """64 pages at 0, and what a client reads there is up to the test."""
    memory = GuestMemory()
    file = files.get(memfd(64 * PAGE), 0, 64 * PAGE, writable=True)
    memory.map(0, 64 * PAGE, readable=True, writable=True, file=file, offset=0)
    yield memory
    memory.close()


def region(
    gpa: int, file: MappedFile | None, *, size: int = PAGE, writable: bool = True
) -> MemoryRegion:
    return MemoryRegion(gpa, size, readable=True, writable=writable, file=file, offset=0)


class TestWithoutFile:
    def test_nothing_mapped_yet_is_fine(self) -> None:
        assert why_out_of_reach([]) is None

    def test_plain_ram_is_refused(self) -> None:
        why = why_out_of_reach([region(0, None, size=256 * MIB), region(1 << 32, None)])
        assert why is not None
        assert REMEDY in why
        assert "memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem" in why
        assert f"{256 * MIB:#x}" in why

    def test_firmware_does_not_hide_plain_ram(self, ram: MappedFile) -> None:
        """``-machine aux-ram-share=on``: a file behind the firmware, none behind the RAM."""
        regions = [region(0x40000000, None), region(0xFFFC0000, ram, writable=False)]
        assert why_out_of_reach(regions) is not None

    def test_a_file_behind_something_else_does_not_hide_it(self, ram: MappedFile) -> None:
        assert why_out_of_reach([region(0, None), region(0xFD000000, ram)]) is not None

    def test_shared_ram_is_accepted(self, ram: MappedFile) -> None:
        rom = region(0xFFFC0000, None, writable=False)
        bar = region(0xFD000000, None)
        assert why_out_of_reach([region(0, ram), rom]) is None
        assert why_out_of_reach([region(0, ram), bar, rom]) is None
        assert why_out_of_reach([rom]) is None


MAPS = """\
5581c0000000-5581c0400000 r-xp 00000000 fd:01 1234                       /usr/bin/qemu
7f0000000000-7f0010000000 rw-p 00000000 00:01 77                         /memfd:ram (deleted)
7f0020000000-7f0030000000 rw-s 00000000 00:01 78                         /memfd:a b (deleted)
7f0040000000-7f0050000000 rw-p 00000000 00:01 79                         /memfd:both (deleted)
7f0060000000-7f0070000000 rw-s 00000000 00:01 79                         /memfd:both (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
garbage
"""


@pytest.mark.parametrize(
    ("inode", "verdict"),
    [
        (77, Verdict.PRIVATE),
        (78, Verdict.SHARED),
        (79, Verdict.SHARED),
        (80, Verdict.UNKNOWN),
        (0, Verdict.UNKNOWN),
    ],
)
def test_maps_tell(inode: int, verdict: Verdict) -> None:
    key = FileKey(os.makedev(0, 1), inode)
    assert classify_maps(MAPS.splitlines(), key) is verdict
    other = FileKey(os.makedev(0, 2), inode)
    assert classify_maps(MAPS.splitlines(), other) is Verdict.UNKNOWN


PROGRAM = """\
import mmap, sys
flags = mmap.MAP_SHARED if sys.argv[2] == "shared" else mmap.MAP_PRIVATE
ram = mmap.mmap(int(sys.argv[1]), 4096, flags=flags)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("verdict", [Verdict.SHARED, Verdict.PRIVATE])
def test_another_process_is_looked_at(
    files: MappedFiles, memfd: Callable[..., int], verdict: Verdict
) -> None:
    fd = memfd()
    file = files.get(fd, 0, PAGE, writable=True)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", PROGRAM, str(fd), verdict.value],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        assert look_at_peer(process.pid, [region(0, file)]) is verdict
        rom = region(0, file, writable=False)
        assert look_at_peer(process.pid, [rom]) is Verdict.UNKNOWN
    assert look_at_peer(process.pid, [region(0, file)]) is Verdict.UNKNOWN  # it has gone
    file.close()


def test_what_says_nothing(ram: MappedFile) -> None:
    for pid in (0, os.getpid(), 2**22):
        assert look_at_peer(pid, [region(0, ram)]) is Verdict.UNKNOWN
    assert look_at_peer(1, [region(0, None)]) is Verdict.UNKNOWN


class Client:
    """Answers a probe's reads from ``memory``, as the client's own copy."""

    def __init__(self, probe: SharingProbe, memory: bytearray) -> None:
        self.probe = probe
        self.memory = memory
        self.reads: list[int] = []

    def run(self) -> Verdict:
        while (wanted := self.probe.next_read()) is not None:
            gpa, size = wanted
            assert self.probe.next_read() is None, "one read at a time"
            self.reads.append(gpa)
            self.probe.answer(bytes(self.memory[gpa : gpa + size]))
        return self.probe.verdict


@pytest.fixture
def probe(memory: GuestMemory) -> SharingProbe:
    return SharingProbe(memory, enabled=True)


def test_a_private_copy_is_found(probe: SharingProbe) -> None:
    copy = bytearray(64 * PAGE)
    copy[20 * PAGE] = 1
    client = Client(probe, copy)
    probe.touched()
    assert client.run() is Verdict.PRIVATE
    assert client.reads[-2:] == [20 * PAGE, 20 * PAGE], "seen twice"
    probe.suspect(0)
    assert probe.next_read() is None
    assert REMEDY in why_private()


def test_memory_that_is_written_raises_no_suspicion(
    probe: SharingProbe, memory: GuestMemory
) -> None:
    memory.write(4 * PAGE + 17, b"\1")
    probe.touched()
    assert probe.next_read() is None


def test_zero_on_both_sides_proves_nothing(probe: SharingProbe) -> None:
    client = Client(probe, bytearray(64 * PAGE))
    probe.touched()
    assert client.run() is Verdict.UNKNOWN
    assert len(client.reads) == 16
    assert client.reads[0] == 0
    assert len(set(client.reads)) == 16


def test_samples_are_taken_ever_more_rarely(probe: SharingProbe) -> None:
    client = Client(probe, bytearray(64 * PAGE))
    counts = []
    for _ in range(20):
        probe.touched()
        client.run()
        counts.append(len(client.reads) // 16)
    assert counts == [1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5]


def test_reads_are_bounded(probe: SharingProbe) -> None:
    client = Client(probe, bytearray(64 * PAGE))
    for _ in range(100):
        probe.suspect()
        for _ in range(1000):
            probe.touched()
        client.run()
    assert len(client.reads) == 256


def test_a_hint_is_compared_even_if_nothing_looks_wrong(
    probe: SharingProbe, memory: GuestMemory
) -> None:
    """A template file with ``share=off``: not zero, and still not the guest's."""
    memory.write(0, b"template" * 512)
    copy = bytearray(memory.read(0, 64 * PAGE))
    copy[5 * PAGE + 12] = 7
    probe.suspect(5 * PAGE + 12)
    assert Client(probe, copy).run() is Verdict.PRIVATE


def test_equal_contents_end_the_matter(probe: SharingProbe, memory: GuestMemory) -> None:
    memory.write(5 * PAGE, b"ring")
    probe.suspect(5 * PAGE)
    assert Client(probe, bytearray(memory.read(0, 64 * PAGE))).run() is Verdict.SHARED
    for gpa in (0, None):
        probe.suspect(gpa)
        assert probe.next_read() is None


def test_a_page_that_changes_proves_nothing(probe: SharingProbe, memory: GuestMemory) -> None:
    probe.suspect(0)
    for value in range(1, 3):
        assert probe.next_read() == (0, PAGE)
        memory.write(0, bytes([value * 16]))
        assert probe.answer(bytes([value]) + bytes(PAGE - 1)) is Verdict.UNKNOWN
        probe.suspect(0)


def test_a_coincidence_is_not_enough(probe: SharingProbe, memory: GuestMemory) -> None:
    """The guest wrote and wrote back while the read was on its way."""
    probe.suspect(0)
    assert probe.next_read() == (0, PAGE)
    assert probe.answer(b"\1" + bytes(PAGE - 1)) is Verdict.UNKNOWN
    assert probe.next_read() == (0, PAGE)
    assert probe.answer(bytes(PAGE)) is Verdict.UNKNOWN
    assert probe.next_read() is None


@pytest.mark.parametrize("data", [None, b"", b"short"])
def test_a_client_that_cannot_read_is_left_alone(probe: SharingProbe, data: bytes | None) -> None:
    probe.touched()
    assert probe.next_read() is not None
    assert probe.answer(data) is Verdict.UNKNOWN
    probe.suspect(0)
    assert probe.next_read() is None


def test_a_client_that_serves_no_dma_is_not_asked(memory: GuestMemory) -> None:
    probe = SharingProbe(memory, enabled=False)
    probe.touched()
    probe.suspect(0)
    assert probe.next_read() is None


def test_an_answer_nobody_asked_for_is_ignored(probe: SharingProbe) -> None:
    assert probe.answer(b"\1" * PAGE) is Verdict.UNKNOWN


def test_memory_that_goes_away_is_not_compared(probe: SharingProbe, memory: GuestMemory) -> None:
    probe.suspect(0)
    probe.suspect(1 << 40)
    memory.unmap_all()
    assert probe.next_read() is None
    probe.touched()
    probe.suspect()
    assert probe.next_read() is None


def test_pages_are_spread_over_all_regions(files: MappedFiles, memfd: Callable[..., int]) -> None:
    memory = GuestMemory()
    for index, pages in enumerate((2, 6)):
        file = files.get(memfd(), 0, PAGE, writable=True)
        memory.map(index << 32, pages * PAGE, readable=True, writable=True, file=file, offset=0)
    memory.map(1 << 40, PAGE, readable=True, writable=True, file=None)
    probe = SharingProbe(memory, enabled=True)
    expected = [page * PAGE for page in range(2)]
    expected += [(1 << 32) + page * PAGE for page in range(6)]
    assert probe._spread() == expected
    memory.close()
