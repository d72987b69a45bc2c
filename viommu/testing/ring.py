"""The driver side of a split virtqueue, and memory to put it in.

A well-behaved driver calls :meth:`DriverQueue.add`, :meth:`~DriverQueue.publish`
and :meth:`~DriverQueue.collect`; a fuzzer writes what it likes with
:meth:`~DriverQueue.write_desc` and friends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import GuestMemoryError
from viommu.spec import virtio_ring as spec
from viommu.virtio.fence import full_fence
from viommu.virtio.ring_memory import words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from viommu.virtio.ring_memory import RingMemory

__all__ = ["DriverQueue", "PieceMemory", "RingLayout", "Used"]

_WRAP: Final = 0xFFFF
_FLAGS: Final = 0
_IDX: Final = 1
_RING: Final = 2


class RingLayout(NamedTuple):
    """Where the three areas of a queue are, and the first byte after them."""

    desc: int
    avail: int
    used: int
    end: int

    @classmethod
    def at(cls, address: int, size: int) -> RingLayout:
        """Return areas one after the other, aligned as virtio 1.2, 2.7 demands."""
        desc = -(-address // spec.DESC_ALIGN) * spec.DESC_ALIGN
        avail = desc + spec.desc_size(size)
        used = -(-(avail + spec.avail_size(size)) // spec.USED_ALIGN) * spec.USED_ALIGN
        return cls(desc, avail, used, used + spec.used_size(size))


class Used(NamedTuple):
    """A chain that came back: its head and how many bytes the device says it wrote."""

    head: int
    length: int


class PieceMemory:
    """Memory from address 0 on that comes as several views, cut where the caller says.

    Satisfies :class:`~viommu.virtio.ring_memory.RingMemory`.

    Args:
        size: In bytes.
        cuts: Addresses at which one piece ends and the next begins.
        read_only: Half-open address range that the device may not write.
    """

    def __init__(
        self, size: int, cuts: Iterable[int] = (), read_only: tuple[int, int] = (0, 0)
    ) -> None:
        self.size = size
        self.generation = 0
        self.bytes = bytearray(size)
        self.read_only = read_only
        self._cuts = [*sorted(cut for cut in cuts if 0 < cut < size), size]

    def views(self, address: int, size: int, *, write: bool) -> list[memoryview]:
        """Return the pieces of a range.

        Raises:
            GuestMemoryError: Part of it is no memory, or is read-only and to be written.
        """
        end = address + size
        if not 0 <= address <= end <= self.size:
            raise GuestMemoryError(address, size, "is not (all) memory")
        if write and address < self.read_only[1] and end > self.read_only[0]:
            raise GuestMemoryError(address, size, "is read-only")
        whole = memoryview(self.bytes)
        pieces = []
        for cut in self._cuts:
            if address < cut and address < end:
                pieces.append(whole[address : min(cut, end)])
                address = min(cut, end)
        return pieces

    def read(self, address: int, size: int) -> bytes:
        """Return a copy of a range."""
        return b"".join(self.views(address, size, write=False))

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Write ``data`` at ``address``."""
        for view in self.views(address, len(data), write=True):
            view[:] = data[: len(view)]
            data = data[len(view) :]


class DriverQueue:
    """A split virtqueue as its driver sees it.

    Args:
        memory: Where the rings are.
        size: Entries, a power of two.
        layout: The addresses of the three areas, see :meth:`RingLayout.at`.
        event_idx: Whether RING_EVENT_IDX was negotiated.
    """

    def __init__(
        self, memory: RingMemory, size: int, layout: RingLayout, *, event_idx: bool = False
    ) -> None:
        self.memory = memory
        self.size = size
        self.layout = layout
        self.event_idx = event_idx
        memory.write(layout.desc, bytes(layout.end - layout.desc))
        self._avail = words(memory, layout.avail, spec.avail_size(size), "H", write=True)
        self._used = words(memory, layout.used, spec.used_size(size), "H", write=False)
        self._free = list(range(size - 1, -1, -1))
        self._chains: dict[int, list[int]] = {}
        self._next_avail = 0
        self._published = 0
        self._last_used = 0

    @property
    def room(self) -> int:
        """How many descriptors are free."""
        return len(self._free)

    @property
    def outstanding(self) -> int:
        """How many chains the device has."""
        return len(self._chains)

    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]] = (),
        *,
        table: int | None = None,
    ) -> int:
        """Put a chain of ``(address, length)`` buffers in the ring; return its head.

        With ``table``, the descriptors go into an indirect table at that address.
        The device does not see it before :meth:`publish`.
        """
        buffers = [(address, length, 0) for address, length in readable]
        buffers += [(address, length, spec.DESC_F_WRITE) for address, length in writable]
        taken = [self._free.pop() for _ in range(len(buffers) if table is None else 1)]
        head = taken[0]
        self._chains[head] = taken
        following = list(range(1, len(buffers))) if table is not None else taken[1:]
        for number, (address, length, flags) in enumerate(buffers):
            last = number == len(buffers) - 1
            entry = spec.DESC.pack(
                address,
                length,
                flags if last else flags | spec.DESC_F_NEXT,
                0 if last else following[number],
            )
            if table is None:
                self.memory.write(self.layout.desc + spec.DESC_SIZE * taken[number], entry)
            else:
                self.memory.write(table + spec.DESC_SIZE * number, entry)
        if table is not None:
            self.write_desc(head, table, spec.DESC_SIZE * len(buffers), spec.DESC_F_INDIRECT)
        self._avail[_RING + self._next_avail % self.size] = head
        self._next_avail = (self._next_avail + 1) & _WRAP
        return head

    def publish(self) -> bool:
        """Make everything added available; return whether the device wants a kick."""
        old, new = self._published, self._next_avail
        full_fence()
        self._avail[_IDX] = new
        self._published = new
        full_fence()
        if self.event_idx:
            event = self._used[_RING + self.size * spec.USED_ELEM_SIZE // 2]
            return (new - event - 1) & _WRAP < (new - old) & _WRAP
        return not self._used[_FLAGS] & spec.USED_F_NO_NOTIFY

    def has_used(self) -> bool:
        """Return whether the device has given something back."""
        return self._used[_IDX] != self._last_used

    def collect(self) -> list[Used]:
        """Take back every used chain and free its descriptors.

        Raises:
            AssertionError: The device gave back a chain that it does not have.
        """
        done = []
        idx = self._used[_IDX]
        full_fence()
        while self._last_used != idx:
            entry = spec.RING_OFFSET + spec.USED_ELEM_SIZE * (self._last_used % self.size)
            used = Used(
                *spec.USED_ELEM.unpack(
                    self.memory.read(self.layout.used + entry, spec.USED_ELEM_SIZE)
                )
            )
            assert used.head in self._chains, f"{used} is not the head of a chain"
            self._free.extend(reversed(self._chains.pop(used.head)))
            self._last_used = (self._last_used + 1) & _WRAP
            done.append(used)
        return done

    def disable_interrupts(self) -> None:
        """Ask for no interrupts; with EVENT_IDX the event index just stays behind."""
        if not self.event_idx:
            self._avail[_FLAGS] = spec.AVAIL_F_NO_INTERRUPT

    def enable_interrupts(self, after: int = 0) -> bool:
        """Ask for an interrupt; return whether it may be too late for one.

        ``after`` is how many more chains must come back first (EVENT_IDX only).
        """
        if self.event_idx:
            self._avail[_RING + self.size] = (self._last_used + after) & _WRAP
        else:
            self._avail[_FLAGS] = 0
        full_fence()
        return (self._used[_IDX] - self._last_used) & _WRAP > after

    def close(self) -> None:
        """Let go of the memory; the queue is used no more."""
        self._avail = self._used = memoryview(bytearray()).cast("H")

    def write_desc(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Write one descriptor, whatever it means."""
        entry = spec.DESC.pack(address, length, flags, following)
        self.memory.write(self.layout.desc + spec.DESC_SIZE * index, entry)

    def write_avail(self, *heads: int, idx: int | None = None, flags: int | None = None) -> None:
        """Append heads without looking at them; ``idx`` and ``flags`` replace what is there."""
        for head in heads:
            self._avail[_RING + self._next_avail % self.size] = head
            self._next_avail = (self._next_avail + 1) & _WRAP
        self._avail[_IDX] = self._next_avail if idx is None else idx
        if flags is not None:
            self._avail[_FLAGS] = flags
