"""A client's interrupts: the eventfds it gave, and how they are changed (SET_IRQS)."""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from viommu.errors import PeerError
from viommu.spec import vfio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Observer = Callable[[int, int, Sequence[int]], None]
    MaskObserver = Callable[["IrqSet", Sequence[int]], None]

__all__ = ["IrqLines", "IrqSet"]

_ONE: Final = (1).to_bytes(8, "little")
_DATA: Final = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_DATA_BOOL | vfio.IRQ_SET_DATA_EVENTFD
_ACTION: Final = vfio.IRQ_SET_ACTION_MASK | vfio.IRQ_SET_ACTION_UNMASK | vfio.IRQ_SET_ACTION_TRIGGER


@dataclass(frozen=True, slots=True)
class IrqSet:
    """A decoded and validated SET_IRQS: vectors ``[start, start + count)`` of kind ``index``."""

    index: int
    start: int
    count: int
    data: int
    action: int
    bools: bytes = b""

    @classmethod
    def decode(cls, payload: bytes, nr_fds: int, counts: Sequence[int]) -> IrqSet:
        """Decode the payload of a SET_IRQS that came with ``nr_fds`` file descriptors.

        ``counts`` has the number of vectors of each kind of interrupt.

        Raises:
            PeerError: EINVAL, as libvfio-user answers.
        """
        if len(payload) < vfio.IRQ_SET.size:
            raise _invalid(f"{len(payload)} bytes of payload are too few")
        argsz, flags, index, start, count = vfio.IRQ_SET.unpack_from(payload)
        bools = payload[vfio.IRQ_SET.size :]
        data, action = flags & _DATA, flags & _ACTION
        if argsz < vfio.IRQ_SET.size:
            raise _invalid(f"argsz {argsz} is less than {vfio.IRQ_SET.size}")
        if flags & ~(_DATA | _ACTION) or data.bit_count() != 1 or action.bit_count() != 1:
            raise _invalid(f"flags {flags:#x} don't name one kind of data and one action")
        if index >= len(counts):
            raise _invalid(f"interrupt index {index} is not below {len(counts)}")
        if start + count > counts[index] or not counts[index]:
            raise _invalid(f"vectors {start} + {count}, interrupt {index} has {counts[index]}")
        trigger = action == vfio.IRQ_SET_ACTION_TRIGGER
        if not count and (start or data != vfio.IRQ_SET_DATA_NONE or not trigger):
            raise _invalid(f"no vectors, and flags {flags:#x} from {start} don't disable all")
        if index in (vfio.PCI_ERR_IRQ_INDEX, vfio.PCI_REQ_IRQ_INDEX) and not trigger:
            raise _invalid(f"interrupt {index} can't be masked")
        if data != vfio.IRQ_SET_DATA_BOOL:
            bools = b""  # whatever follows is ignored
        elif len(bools) != count:
            raise _invalid(f"{len(bools)} booleans for {count} vectors")
        wanted = (0, count) if data == vfio.IRQ_SET_DATA_EVENTFD else (0,)
        if nr_fds not in wanted:
            raise _invalid(f"{nr_fds} file descriptors for {count} vectors, flags {flags:#x}")
        return cls(index, start, count, data, action, bools)


class IrqLines:
    """The eventfds of one client, by kind of interrupt and vector.

    A client may share an eventfd with anybody and fill it up, so each is polled
    before it is written: a full one already says what there is to say. (Its own
    O_NONBLOCK belongs to the client, who may clear it at any time.)
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = tuple(counts)
        self._lines: dict[tuple[int, int], tuple[int, select.poll]] = {}
        self._masked: set[tuple[int, int]] = set()
        self._pending: set[tuple[int, int]] = set()
        self._observer: Observer | None = None
        self._mask_observer: MaskObserver | None = None

    def on_change(self, observer: Observer | None) -> None:
        """Have ``observer`` told of eventfds before they are kept; ``None`` tells nobody.

        It is for a device whose interrupts others raise. It gets the kind, the first
        vector and the new eventfds from there on, -1 for none, which are valid during
        the call; or no eventfds at all, when all of this kind are dropped. What it
        raises refuses the change, unless eventfds are dropped: then it must not raise.
        """
        self._observer = observer

    def on_masking(self, observer: MaskObserver | None) -> None:
        """Have ``observer`` told what masks or unmasks, for a device that does it itself.

        It gets the request and its eventfds, valid during the call, and must not raise.
        """
        self._mask_observer = observer

    def trigger(self, index: int, vector: int) -> bool:
        """Raise an interrupt; return whether an eventfd was signalled.

        Without an eventfd, or with one that is full, this does nothing. A masked
        interrupt is raised when it is unmasked.
        """
        key = (index, vector)
        line = self._lines.get(key)
        if line is None:
            return False
        if key in self._masked:
            self._pending.add(key)
            return False
        fd, poll = line
        if not any(events & select.POLLOUT for _, events in poll.poll(0)):
            return False
        try:
            os.write(fd, _ONE)
        except BlockingIOError:
            return False  # filled by another holder since it was polled
        return True

    def vectors(self, index: int) -> list[int]:
        """Return which vectors of a kind have an eventfd."""
        return sorted(vector for kind, vector in self._lines if kind == index)

    def fds(self, index: int) -> list[int]:
        """Return the eventfds of a kind by vector, up to the last one; -1 for none."""
        vectors = self.vectors(index)
        found = [-1] * (vectors[-1] + 1) if vectors else []
        for vector in vectors:
            found[vector] = self._lines[index, vector][0]
        return found

    def set_irqs(self, payload: bytes, fds: list[int]) -> None:
        """Do what a SET_IRQS message says; file descriptors that are kept leave ``fds``.

        All is validated before anything changes. Eventfds are replaced one by
        one, each at once; an old one is closed. ``MASK`` and ``UNMASK`` with
        eventfds (KVM's resample fds) are accepted and have no effect, because
        no interrupt here needs an end-of-interrupt.

        Raises:
            PeerError: EINVAL; nothing has changed.
            ViommuError: The observer refused; nothing has changed.
        """
        request = IrqSet.decode(payload, len(fds), self._counts)
        for fd in fds:
            if not _is_eventfd(fd):
                raise _invalid(f"file descriptor {fd} is not an eventfd")
        trigger = request.action == vfio.IRQ_SET_ACTION_TRIGGER
        if not trigger and self._mask_observer is not None:
            self._mask_observer(request, fds)
        if request.data == vfio.IRQ_SET_DATA_EVENTFD:
            if trigger:
                self._assign(request, fds)
            return
        if not request.count:
            self.disable(request.index)
            return
        for vector in range(request.start, request.start + request.count):
            if request.bools and not request.bools[vector - request.start]:
                continue
            if trigger:
                self.trigger(request.index, vector)
            elif request.action == vfio.IRQ_SET_ACTION_MASK:
                self._masked.add((request.index, vector))
            else:
                self._unmask((request.index, vector))

    def disable(self, index: int) -> None:
        """Drop and close every eventfd of a kind; masks are forgotten."""
        if self._observer is not None:
            self._observer(index, 0, ())
        for key in [key for key in self._lines if key[0] == index]:
            self._drop(key)
        self._masked = {key for key in self._masked if key[0] != index}

    def close(self) -> None:
        """Drop and close every eventfd; from now on nothing is triggered."""
        for index in range(len(self._counts)):
            self.disable(index)

    def _assign(self, request: IrqSet, fds: list[int]) -> None:
        if self._observer is not None:
            self._observer(request.index, request.start, fds or [-1] * request.count)
        for vector in range(request.start, request.start + request.count):
            key = (request.index, vector)
            old = self._lines.get(key)
            if not fds:  # "no vector": de-assign
                self._drop(key)
                continue
            fd = fds.pop(0)
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            self._lines[key] = (fd, poll)
            if old:
                os.close(old[0])

    def _unmask(self, key: tuple[int, int]) -> None:
        self._masked.discard(key)
        if key in self._pending:
            self._pending.discard(key)
            self.trigger(*key)

    def _drop(self, key: tuple[int, int]) -> None:
        self._pending.discard(key)
        if line := self._lines.pop(key, None):
            os.close(line[0])


def _is_eventfd(fd: int) -> bool:
    # Anything else might block, or be a file that a client wants written with our rights.
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"
    except OSError:
        return False


def _invalid(why: str) -> PeerError:
    return PeerError(errno.EINVAL, f"SET_IRQS: {why}")
