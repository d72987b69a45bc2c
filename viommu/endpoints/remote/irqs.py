"""Interrupts of a device in another process: it has the VMM's eventfds and signals them itself."""

from __future__ import annotations

import logging
import os
from itertools import groupby
from typing import TYPE_CHECKING, Final

from viommu.errors import ViommuError
from viommu.spec import vfio
from viommu.vfio_user import IrqInfo, requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from viommu.deferred import Deferred
    from viommu.loop import Loop, Timer
    from viommu.vfio_user import IrqLines
    from viommu.vfio_user.irqs import IrqSet
    from viommu.vfio_user.loop_client import LoopClient

__all__ = ["RemoteIrqs"]

_log: Final = logging.getLogger(__name__)

_ASSIGN: Final = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
_DISABLE: Final = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER

# Eventfds in a message, whatever the device takes: a client has only so many under way.
_MAX_FDS: Final = 32
# Seconds until it is tried again to send what the connection had no room for.
_PAUSE: Final = 0.01

# QEMU warns of a device that has none of these; nobody else misses them.
_ALWAYS_THERE: Final = (vfio.PCI_ERR_IRQ_INDEX, vfio.PCI_REQ_IRQ_INDEX)


class RemoteIrqs:
    """Passes what a VMM's :class:`~viommu.vfio_user.irqs.IrqLines` are told on to a device.

    The VMM is answered before the device is: what a device refuses is logged, and what
    the connection has no room for waits.
    """

    def __init__(self, name: str, theirs: Sequence[IrqInfo], loop: Loop) -> None:
        self.refused = 0
        self._name = name
        self._theirs = theirs
        self._loop = loop
        self._client: LoopClient | None = None
        self._lines: IrqLines | None = None
        self._vectors: dict[int, int] = {}  # how many the device has of each kind
        self._mask_fds: dict[int, int] = {}  # eventfds that mask or unmask the pin, by action; ours
        self._untold: dict[int, set[int]] = {}  # vectors of which there was no room to speak
        self._timer: Timer | None = None

    @property
    def lines(self) -> IrqLines | None:
        """The interrupts of the VMM that is connected."""
        return self._lines

    def info(self, index: int) -> IrqInfo:
        """Describe one kind of interrupt to a VMM."""
        theirs = self._theirs[index]
        if index in _ALWAYS_THERE:
            return IrqInfo(1, vfio.IRQ_INFO_EVENTFD)
        # Which vectors a device can add to those that it has is ours to know.
        return IrqInfo(theirs.count, theirs.flags & ~vfio.IRQ_INFO_NORESIZE)

    def follow(self, lines: IrqLines) -> None:
        """Give the device what this VMM gives."""
        self._lines = lines
        lines.on_change(self._changed)
        lines.on_masking(self._masked)

    def leave(self) -> None:
        """Have the device signal nobody any more, and follow nobody."""
        if self._lines is not None:
            self._lines.on_change(None)
            self._lines.on_masking(None)
            self._lines = None
        self._leave_untold()
        self._forget_mask_fds()
        for index in list(self._vectors):
            self._disable(index)

    def connected(self, client: LoopClient) -> None:
        """Give a device that is there again what the VMM has given."""
        self.lost()
        self._client = client
        for index in range(len(self._theirs)):
            fds = self._lines.fds(index) if self._lines is not None else []
            if fds and self._has(index, len(fds)):
                self._assign(index, 0, fds)
        for action, fd in self._mask_fds.items():
            flags = vfio.IRQ_SET_DATA_EVENTFD | action
            self._send(vfio.PCI_INTX_IRQ_INDEX, flags, 0, 1, fds=[fd])

    def lost(self) -> None:
        """The device has gone."""
        self._client = None
        self._vectors.clear()
        self._leave_untold()

    def _changed(self, index: int, start: int, fds: Sequence[int]) -> None:
        if not fds:
            self._disable(index)
            return
        end = start + len(fds)
        known = self._vectors.get(index, 0)
        if self._client is None or not self._has(index, end):
            return
        if known and end > known and self._theirs[index].flags & vfio.IRQ_INFO_NORESIZE:
            # It can't add one to those that it has: off and on again, with more.
            before = self._lines.fds(index) if self._lines is not None else []
            wanted = before + [-1] * (end - len(before))
            wanted[start:end] = fds
            self._disable(index)
            start, fds = 0, wanted
        self._assign(index, start, fds)

    def _masked(self, request: IrqSet, fds: Sequence[int]) -> None:
        """Pass on a mask, or an eventfd that unmasks, of the one kind that has them."""
        if not self._has(request.index, request.start + request.count):
            return
        pin = request.index == vfio.PCI_INTX_IRQ_INDEX
        if pin and request.data == vfio.IRQ_SET_DATA_EVENTFD:
            self._keep_mask_fd(request.action, fds)
        self._send(
            request.index,
            request.data | request.action,
            request.start,
            request.count,
            bools=request.bools,
            fds=fds,
        )

    def _keep_mask_fd(self, action: int, fds: Sequence[int]) -> None:
        """Keep what a device that starts again has to be given: nobody else does."""
        if (before := self._mask_fds.pop(action, None)) is not None:
            os.close(before)
        for fd in fds:
            try:
                self._mask_fds[action] = os.dup(fd)
            except OSError as error:
                _log.warning("%s: a mask can't be kept: %s", self._name, error)

    def _forget_mask_fds(self) -> None:
        for fd in self._mask_fds.values():
            os.close(fd)
        self._mask_fds.clear()

    def _has(self, index: int, vectors: int) -> bool:
        return vectors <= self._theirs[index].count

    def _assign(self, index: int, start: int, fds: Sequence[int]) -> None:
        assert self._client is not None  # noqa: S101 - the callers looked
        most = max(1, min(_MAX_FDS, self._client.capabilities.max_msg_fds))
        untold = self._untold.setdefault(index, set())
        for at, run in _runs(fds, most):
            given = run if run[0] >= 0 else ()
            vectors = range(start + at, start + at + len(run))
            request = requests.set_irqs(index, _ASSIGN, vectors.start, len(run), fds=given)
            if self._client.has_room_for(request):
                untold.difference_update(vectors)
                self._client.submit(request).then(self._answered)
            else:
                untold.update(vectors)
        self._vectors[index] = max(self._vectors.get(index, 0), start + len(fds))
        if untold and self._timer is None:
            # Not when something is answered: the room may be taken by requests of others.
            self._timer = self._loop.call_later(_PAUSE, self._tell_untold)

    def _tell_untold(self) -> None:
        """Assign, as they are by now, the vectors of which there was no room to speak."""
        self._timer = None
        for index, untold in self._untold.items():
            if self._client is None or self._lines is None:
                return
            known = dict(enumerate(self._lines.fds(index)))
            for _, run in groupby(enumerate(sorted(untold)), lambda place: place[1] - place[0]):
                vectors = [vector for _, vector in run]
                self._assign(index, vectors[0], [known.get(vector, -1) for vector in vectors])

    def _leave_untold(self) -> None:
        self._untold.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _disable(self, index: int) -> None:
        self._untold.pop(index, None)
        if index == vfio.PCI_INTX_IRQ_INDEX:
            self._forget_mask_fds()
        if self._vectors.pop(index, 0):
            self._send(index, _DISABLE, 0, 0)

    def _send(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        *,
        bools: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        if self._client is not None:
            request = requests.set_irqs(index, flags, start, count, bools=bools, fds=fds)
            self._client.submit(request).then(self._answered)

    def _answered(self, answer: Deferred[None]) -> None:
        try:
            answer.result()
        except ViommuError as error:
            if self._client is not None and not self._client.closed:
                self.refused += 1
                _log.warning("%s: interrupts can't be set up: %s", self._name, error)


def _runs(fds: Sequence[int], most: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Cut into runs of eventfds, ``most`` at a time, and of none at all; yield where each is."""
    at = 0
    for _, group in groupby(fds, lambda fd: fd >= 0):
        run = list(group)
        step = most if run[0] >= 0 else len(run)
        for first in range(0, len(run), step):
            yield at + first, run[first : first + step]
        at += len(run)
