"""The device side of a split virtqueue.

Source: virtio 1.2, 2.7 "Split Virtqueues". The driver owns every byte read here
and may change it at any time, so nothing is read twice and nothing read is
trusted. Only three exceptions leave this module: :exc:`RingError` (the queue is
unusable), :exc:`GuestMemoryError` and :exc:`TranslationFault` (an address can't
be reached).

A descriptor of length zero is tolerated and adds nothing: virtio 1.2 does not
forbid it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from viommu.errors import RingError, UsageError
from viommu.spec import virtio_ring as spec
from viommu.virtio.fence import WEAKLY_ORDERED, full_fence
from viommu.virtio.ring_memory import one_view, words
from viommu.virtio.ring_takeover import unreturned

if TYPE_CHECKING:
    from viommu.virtio.ring_memory import RingMemory, Words

__all__ = ["DEFAULT_MAX_CHAIN_BYTES", "DEFAULT_MAX_DESCRIPTORS", "Chain", "SplitQueue"]

DEFAULT_MAX_DESCRIPTORS: Final = 1024
DEFAULT_MAX_CHAIN_BYTES: Final = 64 << 20

# Words of either ring: flags, idx, the array, the other side's event index.
_FLAGS: Final = 0
_IDX: Final = 1
_RING: Final = 2

_WRAP: Final = 0xFFFF
_ADDRESS_SPACE: Final = 1 << 64

_NEXT: Final = spec.DESC_F_NEXT
_WRITE: Final = spec.DESC_F_WRITE
_INDIRECT: Final = spec.DESC_F_INDIRECT
_unpack_desc: Final = spec.DESC.unpack_from


class Chain:
    """One buffer of the driver: ``(address, length)`` pieces, readable ones first."""

    __slots__ = ("head", "readable", "readable_size", "writable", "writable_size")

    def __init__(
        self,
        head: int,
        readable: list[tuple[int, int]],
        writable: list[tuple[int, int]],
        readable_size: int,
        writable_size: int,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_size = readable_size
        self.writable_size = writable_size

    def __repr__(self) -> str:
        return f"Chain({self.head}, {self.readable}, {self.writable})"


class SplitQueue:
    """Takes chains that the driver made available and gives them back used.

    Nothing is touched before the first call that needs the rings. Used chains
    are staged by :meth:`push` and shown to the driver by :meth:`publish`, all
    with one store.

    Args:
        memory: Where the rings and the buffers are.
        index: The number of the queue, for messages.
        size: Entries, a power of two.
        desc: Address of the descriptor table.
        avail: Address of the available ring (the driver area).
        used: Address of the used ring (the device area).
        event_idx: Whether RING_EVENT_IDX was negotiated.
        indirect: Whether RING_INDIRECT_DESC was negotiated.
        max_chain_bytes: More bytes than this in one chain are an error.
        max_descriptors: More descriptors than this in one chain are an error.
            An indirect table may be longer than the queue, as Linux makes them.

    Raises:
        RingError: The size is no power of two, or an area is misaligned or
            passes the end of the address space.
    """

    def __init__(  # noqa: PLR0917 - the order of the registers of virtio 1.2, 4.1.4.3
        self,
        memory: RingMemory,
        index: int,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool,
        indirect: bool,
        max_chain_bytes: int = DEFAULT_MAX_CHAIN_BYTES,
        max_descriptors: int = DEFAULT_MAX_DESCRIPTORS,
    ) -> None:
        if not 0 < size <= spec.MAX_QUEUE_SIZE or size & (size - 1):
            raise RingError(f"queue {index}: the size {size} is not a power of two up to 32768")
        for name, address, length, align in (
            ("descriptor table", desc, spec.desc_size(size), spec.DESC_ALIGN),
            ("available ring", avail, spec.avail_size(size), spec.AVAIL_ALIGN),
            ("used ring", used, spec.used_size(size), spec.USED_ALIGN),
        ):
            if address % align or address + length > _ADDRESS_SPACE:
                raise RingError(
                    f"queue {index}: the {name} at {address:#x} is not aligned to {align} bytes"
                    " or passes the end of the address space"
                )
        self.index = index
        self.size = size
        self._memory = memory
        self._addresses = (desc, avail, used)
        self._event_idx = event_idx
        self._indirect = indirect
        self._max_chain_bytes = max_chain_bytes
        self._max_descriptors = max_descriptors
        self._max_direct = min(size, max_descriptors)
        self._mask = size - 1
        self._used_event = _RING + size
        self._avail_event = _RING + size * spec.USED_ELEM_SIZE // 2

        self._closed = False
        self._generation: int | None = None  # of the views below; None: none are held
        self._desc: memoryview | None = None  # None: the table has no single view
        self._avail: Words
        self._used: Words
        self._used_ring: Words

        self._next_avail = 0  # the next entry of the available ring to take
        self._avail_idx = 0  # what the driver's index was when last looked at
        self._next_used = 0  # the next entry of the used ring to fill
        self._published = 0  # the used index that the driver can see
        self._staged = 0  # entries filled but not published
        self._in_flight = 0  # chains that the driver has not got back

    @property
    def in_flight(self) -> int:
        """How many chains were taken and are not published as used."""
        return self._in_flight

    @property
    def avail_address(self) -> int:
        """Where the available ring is, which the driver writes."""
        return self._addresses[1]

    def close(self) -> None:
        """Let go of the memory: there is no work any more, and what comes back is dropped."""
        self._closed = True
        self._generation = None
        self._desc = None
        self._avail = self._used = self._used_ring = memoryview(bytearray()).cast("H")

    def has_work(self) -> bool:
        """Return whether :meth:`pop` has something to say, if only an error.

        Raises:
            GuestMemoryError: The rings can't be reached.
            TranslationFault: The rings are not mapped for the device.
        """
        if self._memory.generation != self._generation and not self._acquire():
            return False
        return self._avail[_IDX] != self._next_avail

    def pop(self) -> Chain | None:
        """Take the next chain; ``None`` when the driver has made no more available.

        Raises:
            RingError: The driver broke the queue; nothing was taken.
            GuestMemoryError: The rings or an indirect table can't be reached.
            TranslationFault: They are not mapped for the device.
        """
        if self._memory.generation != self._generation and not self._acquire():
            return None
        next_avail = self._next_avail
        if next_avail == self._avail_idx and not self._look():
            return None
        chain = self._walk(self._avail[_RING + (next_avail & self._mask)])
        self._next_avail = (next_avail + 1) & _WRAP
        self._in_flight += 1
        return chain

    def take_over(self) -> list[int]:
        """Go on where another device stopped; return the heads that it has not given back.

        To be called instead of the first :meth:`pop`. The chains count as taken: see
        :meth:`chain` for what they are, and :meth:`push` them.

        Raises:
            RingError: The driver broke the queue.
            GuestMemoryError: The rings can't be reached.
            TranslationFault: They are not mapped for the device.
        """
        if self._memory.generation != self._generation and not self._acquire():
            return []
        avail, used = self._avail[_IDX], self._used[_IDX]
        ring, elements = range(_RING, _RING + self.size), range(0, 2 * self.size, 2)
        heads = unreturned(
            avail,
            [self._avail[at] for at in ring],
            used,
            [(self._used_ring[at], self._used_ring[at + 1]) for at in elements],
        )
        self._next_avail = self._avail_idx = avail
        self._next_used = self._published = used
        self._in_flight = len(heads)
        return heads

    def chain(self, head: int) -> Chain:
        """Return the chain that begins at ``head``; raises as :meth:`pop` does."""
        if self._memory.generation != self._generation:
            self._acquire()
        return self._walk(head)

    def read(self, chain: Chain, limit: int | None = None) -> bytes:
        """Return a copy of the first ``limit`` readable bytes, by default of all.

        Raises:
            GuestMemoryError: A buffer can't be reached.
            TranslationFault: A buffer is not mapped for the device.
        """
        pieces = chain.readable
        if len(pieces) == 1 and limit is None:
            return self._memory.read(*pieces[0])
        left = chain.readable_size if limit is None else min(limit, chain.readable_size)
        copies = []
        for address, length in pieces:
            if not left:
                break
            copies.append(self._memory.read(address, min(length, left)))
            left -= len(copies[-1])
        return b"".join(copies)

    def write(self, chain: Chain, data: bytes, offset: int = 0) -> None:
        """Write ``data`` over the writable bytes, from ``offset`` on.

        Raises:
            GuestMemoryError: A buffer can't be reached; those before it are written.
            TranslationFault: A buffer is not mapped for the device; likewise.
            UsageError: The writable part is too short; nothing is written.
        """
        if offset + len(data) > chain.writable_size:
            raise UsageError(
                f"{len(data)} bytes at {offset} do not fit {chain.writable_size} writable bytes"
            )
        rest = memoryview(data)
        for address, length in chain.writable:
            if not rest:
                break
            if offset >= length:
                offset -= length
                continue
            part = rest[: length - offset]
            self._memory.write(address + offset, part)
            rest = rest[len(part) :]
            offset = 0

    def push(self, chain: Chain | int, used_length: int) -> None:
        """Stage a chain (or its head) as used, ``used_length`` bytes of it written.

        Raises:
            GuestMemoryError: The used ring can't be reached.
            TranslationFault: It is not mapped for the device.
            UsageError: More chains come back than were taken.
        """
        if self._memory.generation != self._generation and not self._acquire():
            return
        if self._staged >= self._in_flight:
            raise UsageError(f"queue {self.index}: no chain is in flight, but {chain} comes back")
        entry = (self._next_used & self._mask) * 2
        self._used_ring[entry] = chain if isinstance(chain, int) else chain.head
        self._used_ring[entry + 1] = used_length
        self._next_used = (self._next_used + 1) & _WRAP
        self._staged += 1

    def publish(self) -> bool:
        """Show the driver everything that was staged; return whether it wants an interrupt.

        Raises:
            GuestMemoryError: The rings can't be reached.
            TranslationFault: They are not mapped for the device.
        """
        if not self._staged:
            return False
        if self._memory.generation != self._generation and not self._acquire():
            return False
        old, new = self._published, self._next_used
        if WEAKLY_ORDERED:
            full_fence()
        self._used[_IDX] = new
        self._published = new
        self._in_flight -= self._staged
        self._staged = 0
        # The driver stores its wish, then looks at our index; we store the index,
        # then look at its wish. Without the fence both could miss each other.
        full_fence()
        if self._event_idx:
            event = self._avail[self._used_event]
            return (new - event - 1) & _WRAP < (new - old) & _WRAP
        return not self._avail[_FLAGS] & spec.AVAIL_F_NO_INTERRUPT

    def disable_notifications(self) -> None:
        """Tell the driver not to kick; it may kick all the same.

        With EVENT_IDX there is nothing to tell: the event index stays where the
        ring once was, and the driver kicks when it passes it.

        Raises:
            GuestMemoryError: The used ring can't be reached.
            TranslationFault: It is not mapped for the device.
        """
        if self._memory.generation != self._generation and not self._acquire():
            return
        if not self._event_idx:
            self._used[_FLAGS] = spec.USED_F_NO_NOTIFY

    def enable_notifications(self) -> bool:
        """Ask the driver to kick; return whether it added something before it could know.

        Raises:
            GuestMemoryError: The rings can't be reached.
            TranslationFault: They are not mapped for the device.
        """
        if self._memory.generation != self._generation and not self._acquire():
            return False
        if self._event_idx:
            self._used[self._avail_event] = self._next_avail
        else:
            self._used[_FLAGS] = 0
        # The mirror image of publish().
        full_fence()
        return self._avail[_IDX] != self._next_avail

    def _acquire(self) -> bool:
        """Get views on the rings; return whether the queue is open at all."""
        if self._closed:
            return False
        memory = self._memory
        desc, avail, used = self._addresses
        elements = used + spec.RING_OFFSET
        length = spec.USED_ELEM_SIZE * self.size
        self._generation = None
        # Asking for one view may reveal that those handed out before are stale.
        while self._generation != memory.generation:
            generation = memory.generation
            self._desc = one_view(memory, desc, spec.desc_size(self.size))
            self._avail = words(memory, avail, spec.avail_size(self.size), "H", write=False)
            self._used = words(memory, used, spec.used_size(self.size), "H", write=True)
            self._used_ring = words(memory, elements, length, "I", write=True)
            self._generation = generation
        return True

    def _look(self) -> bool:
        """Load the driver's index; return whether it has moved."""
        idx = self._avail[_IDX]
        waiting = (idx - self._next_avail) & _WRAP
        if waiting > self.size - self._in_flight:
            raise RingError(
                f"queue {self.index}: the available index {idx} is {waiting} ahead of"
                f" {self._next_avail}, with {self._in_flight} of {self.size} in flight"
            )
        self._avail_idx = idx
        if WEAKLY_ORDERED:
            full_fence()
        return waiting != 0

    def _descriptor(self, index: int) -> tuple[int, int, int, int]:
        """Return a descriptor of a table that has no single view."""
        address = self._addresses[0] + index * spec.DESC_SIZE
        addr, length, flags, following = spec.DESC.unpack(
            self._memory.read(address, spec.DESC_SIZE)
        )
        return addr, length, flags, following

    def _walk(self, head: int) -> Chain:
        """Follow a chain from its head.

        Raises:
            RingError: See the messages.
        """
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        readable_size = writable_size = 0
        table: memoryview | bytes | None = self._desc
        entries = self.size
        left = self._max_direct
        in_table = False
        index = head
        while True:
            if index >= entries:
                raise self._broken(head, f"refers to descriptor {index} of {entries}")
            if not left:
                raise self._broken(head, "is a loop, or has too many descriptors")
            address, length, flags, following = (
                self._descriptor(index) if table is None else _unpack_desc(table, index << 4)
            )
            if flags & _INDIRECT:
                # 2.7.5.3.2: after any number of direct descriptors, at most one
                # table; the WRITE flag of the descriptor that refers to it means nothing.
                self._check_table(head, length, flags, in_table=in_table)
                table = self._memory.read(address, length)
                entries = length >> 4
                left = entries
                in_table = True
                index = 0
                continue
            left -= 1
            if length:
                if address + length > _ADDRESS_SPACE:
                    raise self._broken(head, f"has a buffer of {length} bytes at {address:#x}")
                if flags & _WRITE:
                    writable.append((address, length))
                    writable_size += length
                elif writable:
                    raise self._broken(head, "has a readable buffer after a writable one")
                else:
                    readable.append((address, length))
                    readable_size += length
            if not flags & _NEXT:
                break
            index = following
        if readable_size + writable_size > self._max_chain_bytes:
            raise self._broken(
                head,
                f"has {readable_size + writable_size} bytes, more than {self._max_chain_bytes}",
            )
        return Chain(head, readable, writable, readable_size, writable_size)

    def _check_table(self, head: int, length: int, flags: int, *, in_table: bool) -> None:
        """Refuse an indirect table before it is read."""
        if not self._indirect:
            raise self._broken(head, "is indirect, which was not negotiated")
        if in_table:
            raise self._broken(head, "has an indirect table inside an indirect table")
        if flags & _NEXT:
            raise self._broken(head, "continues after its indirect table")
        if not length or length % spec.DESC_SIZE:
            raise self._broken(head, f"has an indirect table of {length} bytes")
        if length // spec.DESC_SIZE > self._max_descriptors:
            raise self._broken(
                head,
                f"has an indirect table of {length // spec.DESC_SIZE} descriptors,"
                f" more than {self._max_descriptors}",
            )

    def _broken(self, head: int, what: str) -> RingError:
        return RingError(f"queue {self.index}: the chain at head {head} {what}")
